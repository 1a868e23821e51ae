"""A row in vocabulary shards: the dense kernel cut at its two reductions, one launch for each part.

Every rank holds some columns of both sides. `norms_kernel` gives its share of the normalisers; ranks merge them
(largest reference, rescaled sums); `sums_kernel` gives its share of the sums of term and grad under the merged
normalisers; ranks add those; `gradient_kernel` writes its columns of the gradient. A shard may be empty or masked
throughout. Every entry is treated as careful rows are: masks are rare, but which rank has one is not known elsewhere.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.careful import careful_sums, careful_tops
from kdkernels.triton.forms import ELEMENT
from kdkernels.triton.gradients import gradient_sweep
from kdkernels.triton.rows import INFINITY, NOTHING, anchor, fill_row, larger2, read_one, side_of
from kdkernels.triton.sweeps import first_place, stats_sweep


@triton.jit
def shard_sides(
    r, student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap, vocab, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Both sides and the span of row r."""
    begin_s, shift = anchor(student, r, student_stride, LAYOUT)
    begin_t, _ = anchor(teacher, r, teacher_stride, LAYOUT)
    side_s = side_of(begin_s, (student_bias, student_scale, student_cap), shift)
    side_t = side_of(begin_t, (teacher_bias, teacher_scale, teacher_cap), shift)
    return side_s, side_t, (shift, shift + vocab)


@triton.jit
def row_counts(w_kd, w_ce, r):
    """Weights of row r, and whether it counts."""
    kd, ce = tl.load(w_kd + r), 0.0
    if w_ce is not None:
        ce = tl.load(w_ce + r)
    return kd, ce, (kd != 0) | (ce != 0)


@triton.jit
def row_norms(merged, r):
    """The normalisers of both sides of row r, each as (K, r)."""
    at = merged + r * 4
    return (tl.load(at), tl.load(at + 1)), (tl.load(at + 2), tl.load(at + 3))


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "vocab", "offset"])
def norms_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    norms, places, w_kd, w_ce, labels, vocab, offset, c,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """This shard's share of row ``program_id(0)``.

    norms: float32 ``[N, 8]``: largest logit and sum of e^((z - largest) / T) of the student and of the teacher, the
    student's sum at T = 1, sums of e x (x the exponent to base 2) of both, and the label's logit, -inf where another
    rank holds it. A shard without entries, or with none that has mass, has largest logits -inf and sums 0; NaN and
    +inf make the sums NaN. places: int64 ``[N, 2]``, where the largest logits stand in the whole vocabulary, or None.
    ``offset``: the shard's first column there. Rows whose weights are 0 are not read; what stands for them is 0.
    """
    r = tl.program_id(0).to(tl.int64)
    to = norms + r * 8
    _kd, _ce, counts = row_counts(w_kd, w_ce, r)
    if counts:
        student_, teacher_, span = shard_sides(
            r, student, student_stride, student_bias, student_scale, student_cap,
            teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap, vocab, LAYOUT,
        )  # fmt: skip
        tops = careful_tops(student_, teacher_, span, FORM_S, FORM_T, LAYOUT, ROWS, VEC)
        m_s, m_t = tl.reduce((tops[0], tops[2]), 0, larger2)
        base_s, base_t = tl.where(m_s == -INFINITY, 0.0, m_s), tl.where(m_t == -INFINITY, 0.0, m_t)
        sum_s, sum_t, cold, heat = careful_sums(
            student_, teacher_, span, base_s, base_t, c, FORM_S, FORM_T, LAYOUT, ROWS, VEC
        )
        z = -INFINITY
        if labels is not None:
            index = tl.load(labels + r) - offset
            if (index >= 0) & (index < vocab):
                row = student + r * student_stride
                z = read_one(row, student_bias, student_scale, student_cap, index.to(tl.int32), FORM_S)
        tl.store(to, m_s)
        tl.store(to + 1, sum_s)
        tl.store(to + 2, m_t)
        tl.store(to + 3, sum_t)
        tl.store(to + 4, cold)
        tl.store(to + 5, heat[0])
        tl.store(to + 6, heat[1])
        tl.store(to + 7, z)
        if places is not None:
            first_s = first_place(student_, span, tops[0], tops[1], FORM_S, LAYOUT, ROWS, VEC)
            first_t = first_place(teacher_, span, tops[2], tops[3], FORM_T, LAYOUT, ROWS, VEC)
            tl.store(places + r * 2, offset.to(tl.int64) + first_s)
            tl.store(places + r * 2 + 1, offset.to(tl.int64) + first_t)
    else:
        fill_row(to, 0, 8, 0.0, 32)
        if places is not None:
            fill_row(places + r * 2, 0, 2, 0.0, 2)


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "vocab"])
def sums_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    merged, sums, w_kd, w_ce, vocab, per_t, a, b,
    TERM: tl.constexpr, GRAD: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of term and grad over this shard's columns: ``sums [N, 2]`` float32, 0 for rows that do not count.

    merged: float32 ``[N, 4]``, for student and teacher the normaliser as (K, r), log-probability = z / T - K - r.
    """
    r = tl.program_id(0).to(tl.int64)
    _kd, _ce, counts = row_counts(w_kd, w_ce, r)
    term, grad = 0.0, 0.0
    if counts:
        student_, teacher_, span = shard_sides(
            r, student, student_stride, student_bias, student_scale, student_cap,
            teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap, vocab, LAYOUT,
        )  # fmt: skip
        norm_s, norm_t = row_norms(merged, r)
        term, grad, _fine = stats_sweep(student_, teacher_, span, norm_s, norm_t, per_t, a, b,
                                    TERM, GRAD, True, ELEMENT, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
    tl.store(sums + r * 2, term)
    tl.store(sums + r * 2 + 1, grad)


@triton.jit(
    do_not_specialize=["student_stride", "teacher_stride", "dlogits_stride", "dlogits_vocab", "vocab", "offset"]
)
def gradient_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    dlogits, dlogits_stride, dlogits_vocab, merged, totals, cold, w_kd, w_ce, labels, vocab, offset, per_t, a, b,
    GRAD: tl.constexpr, COLD: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """This shard's columns of the gradient; ``dlogits`` may be ``student``.

    totals: float32 ``[N]``, the merged sum of grad; NaN makes the row NaN. cold: float32 ``[N, 2]``, the student's
    largest logit and sum at temperature 1 (read where COLD). labels: in the whole vocabulary; ``offset`` as before.
    """
    r = tl.program_id(0).to(tl.int64)
    row = dlogits + r * dlogits_stride
    fill_row(row, vocab, dlogits_vocab, 0.0, ROWS)
    kd, ce, counts = row_counts(w_kd, w_ce, r)
    if counts:
        student_, teacher_, span = shard_sides(
            r, student, student_stride, student_bias, student_scale, student_cap,
            teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap, vocab, LAYOUT,
        )  # fmt: skip
        norm_s, norm_t = row_norms(merged, r)
        total, k = tl.load(totals + r), kd * per_t
        place, frozen = None, (0.0, 0.0)
        if labels is not None:
            place = tl.load(labels + r) - offset + span[0]
        if COLD:
            frozen = (tl.load(cold + r * 2), 1.0 / tl.load(cold + r * 2 + 1))
        numbers = (norm_s, norm_t, per_t, a, b, k, (0.0 if COLD else ce) - total * k)
        begin, _ = anchor(dlogits, r, dlogits_stride, LAYOUT)
        gradient_sweep(begin, student_, teacher_, span, numbers, ce, place, frozen,
                       GRAD, ELEMENT, NOTHING, True, COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
    else:
        fill_row(row, 0, vocab, 0.0, ROWS)
