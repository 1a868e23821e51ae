"""The dense kernel: one program turns one row of student and teacher logits into loss, statistics and gradient."""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kdkernels.triton.careful import careful_sums, careful_tops
from kdkernels.triton.forms import ELEMENT
from kdkernels.triton.gradients import gradient_sweep
from kdkernels.triton.rows import (
    FORWARD,
    HOPELESS,
    INFINITY,
    LN_2,
    MASKED,
    NOTHING,
    anchor,
    fill_row,
    larger2,
    natural,
    read_one,
    side_of,
)  # fmt: skip
from kdkernels.triton.sweeps import first_place, first_sweep, stats_sweep

SMALL = tl.constexpr(1e-3)
"""Nats. An online sum is off by 1e-7; a row whose divergence comes out below is summed again entry by entry."""


@triton.jit
def online_divergence(s, t, cross, CARRY: tl.constexpr):
    """D by the first sweep's cross term; sides as (top, R, sum)."""
    log_s, log_t = libdevice.log(s[2]), libdevice.log(t[2])
    if CARRY == FORWARD:
        return tl.fma(cross / t[2], LN_2, log_s - log_t)
    else:
        return tl.fma(cross / s[2], -LN_2, log_t - log_s)


@triton.jit
def online_numbers(s, t, c, d, kd, ce_hot, CARRY: tl.constexpr):
    """What `online_gradient` needs: w_s and w_t are the weights of e^xs and of the rest; kd is w_kd / T."""
    if CARRY == FORWARD:
        return c, s[1], t[1], (kd + ce_hot) / s[2], -kd / t[2]
    else:
        w = kd * (libdevice.log(t[2]) - libdevice.log(s[2]) - d) + ce_hot
        return c, s[1], t[1], w / s[2], -kd * LN_2 / s[2]


@triton.jit
def log_sum(side, c):
    """log of the sum, relative to the top itself: R is top * c rounded."""
    return libdevice.log(side[2]) - tl.fma(side[0], c, -side[1]) * LN_2


@triton.jit
def label_loss(z, top, log_cold):
    """Negative log-likelihood at temperature 1; a masked label costs 1e4."""
    l = (z - top) - log_cold
    return tl.where(l < HOPELESS, -MASKED, -l)


@triton.jit
def entropy(side, heat):
    return libdevice.log(side[2]) - LN_2 * (heat / side[2])


@triton.jit
def store_row(out, d, nll, entropies, firsts, weights, label):
    """Loss and statistics of one row."""
    kd, ce = weights
    tl.store(out[0], tl.where(kd == 0, 0.0, kd * d) + tl.where(ce == 0, 0.0, ce * nll))
    if out[1] is not None:
        tl.store(out[1], d)
        tl.store(out[1] + 1, entropies[1])
        tl.store(out[1] + 2, entropies[0])
        tl.store(out[1] + 3, tl.where(firsts[0] == firsts[1], 1.0, 0.0))
        tl.store(out[1] + 4, nll)
        tl.store(out[1] + 5, tl.where((firsts[0] == label[1]) & label[2], 1.0, 0.0))


@triton.jit
def store_everything(out, vocab, value, COUNT: tl.constexpr):
    """A row that does not count (0), or is no distribution (NaN)."""
    tl.store(out[0], value)
    if out[1] is not None:
        for i in tl.static_range(6):
            tl.store(out[1] + i, value)
    if out[2] is not None:
        fill_row(out[2], 0, vocab, value, COUNT)


@triton.jit
def firsts_of(
    student, teacher, span, tops, STATS: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The most likely entry of both sides."""
    first_s, first_t = 0, 0
    if STATS:
        first_s = first_place(student, span, tops[0], tops[1], FORM_S, LAYOUT, ROWS, VEC)
        first_t = first_place(teacher, span, tops[2], tops[3], FORM_T, LAYOUT, ROWS, VEC)
    return first_s, first_t


@triton.jit
def fast_row(
    student, teacher, span, s, t, d, total, cold_sum, heat, tops, norms, out, weights, label, numbers,
    QUICK_GRAD: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr, COLD: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row without masked entries, after its first sweep."""
    kd, ce = weights
    per_t, c, a, b = numbers
    firsts = firsts_of(student, teacher, span, tops, out[1] is not None, FORM_S, FORM_T, LAYOUT, ROWS, VEC)
    nll, ce_hot = 0.0, 0.0
    if label[0] is not None:
        log_cold = libdevice.log(cold_sum) if COLD else log_sum(s, c)
        nll = tl.where(label[2], label_loss(label[3], s[0], log_cold), 0.0)
        ce_hot = 0.0 if COLD else ce
    store_row(out, d, nll, (entropy(s, heat[0]), entropy(t, heat[1])), firsts, weights, label)
    if out[3] is not None:
        k = kd * per_t
        if CARRY == NOTHING:
            given = (norms[0], norms[1], per_t, a, b, k, ce_hot - total * k)
        else:
            given = online_numbers(s, t, c, d, k, ce_hot, CARRY)
        gradient_sweep(out[3], student, teacher, span, given, ce, label[0], (s[0], 1.0 / cold_sum),
                       QUICK_GRAD, KIND, CARRY, False, COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip


@triton.jit
def careful_row(
    student, teacher, span, vocab, out, weights, label, numbers,
    TERM: tl.constexpr, GRAD: tl.constexpr, COLD: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Any row: masked entries count as log-probability -1e4, NaN and +inf make it NaN."""
    kd, ce = weights
    per_t, c, a, b = numbers
    tops = careful_tops(student, teacher, span, FORM_S, FORM_T, LAYOUT, ROWS, VEC)
    m_s, m_t = tl.reduce((tops[0], tops[2]), 0, larger2)
    sum_s, sum_t, cold_sum, heat = careful_sums(student, teacher, span, m_s, m_t, c, FORM_S, FORM_T, LAYOUT, ROWS, VEC)
    if (sum_s > 0) & (sum_s < INFINITY) & (sum_t > 0) & (sum_t < INFINITY):
        firsts = firsts_of(student, teacher, span, tops, out[1] is not None, FORM_S, FORM_T, LAYOUT, ROWS, VEC)
        s, t = (m_s, 0.0, sum_s), (m_t, 0.0, sum_t)
        norm_s, norm_t = natural(m_s, libdevice.log(sum_s), per_t), natural(m_t, libdevice.log(sum_t), per_t)
        nll = 0.0
        if label[0] is not None:
            nll = tl.where(label[2], label_loss(label[3], m_s, libdevice.log(cold_sum)), 0.0)
        d, total, _ = stats_sweep(student, teacher, span, norm_s, norm_t, per_t, a, b,
                                  TERM, GRAD, True, ELEMENT, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
        store_row(out, d, nll, (entropy(s, heat[0]), entropy(t, heat[1])), firsts, weights, label)
        if out[3] is not None:
            given = (norm_s, norm_t, per_t, a, b, kd * per_t, (0.0 if COLD else ce) - total * (kd * per_t))
            gradient_sweep(out[3], student, teacher, span, given, ce, label[0], (m_s, 1.0 / cold_sum),
                           GRAD, ELEMENT, NOTHING, True, COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
    else:
        store_everything(out, vocab, float("nan"), ROWS)


@triton.jit
def one_row(
    begin_s, begin_t, shift, out, given_s, given_t, vocab, weights, label, numbers,
    TERM: tl.constexpr, GRAD: tl.constexpr,
    QUICK_TERM: tl.constexpr, SUM_GRAD: tl.constexpr, QUICK_GRAD: tl.constexpr, KIND: tl.constexpr,
    CARRY: tl.constexpr, COLD: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row that counts. given_*: (bias, scale, cap); label: (place or None, index, legal, its logit)."""
    per_t, c, a, b = numbers
    student, teacher = side_of(begin_s, given_s, shift), side_of(begin_t, given_t, shift)
    span = (shift, shift + vocab)
    fine, s, t, cross, cold_sum, heat, tops = first_sweep(
        student, teacher, span, c, CARRY, COLD, out[1] is not None, FORM_S, FORM_T, LAYOUT, ROWS, VEC
    )
    norms = (natural(s[0], log_sum(s, c), per_t), natural(t[0], log_sum(t, c), per_t))
    d, total = 0.0, 0.0
    if fine:
        if CARRY == NOTHING:
            d, total, fine = stats_sweep(
                student, teacher, span, norms[0], norms[1], per_t, a, b,
                QUICK_TERM, SUM_GRAD, False, KIND, FORM_S, FORM_T, LAYOUT, ROWS, VEC,
            )  # fmt: skip
        else:
            d = online_divergence(s, t, cross, CARRY)
            if d < SMALL:
                d, total, _ = stats_sweep(student, teacher, span, norms[0], norms[1], per_t, a, b,
                                          TERM, GRAD, True, ELEMENT, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
    if fine:
        fast_row(student, teacher, span, s, t, d, total, cold_sum, heat, tops, norms, out, weights, label, numbers,
                 QUICK_GRAD, KIND, CARRY, COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
    else:
        careful_row(student, teacher, span, vocab, out, weights, label, numbers,
                    TERM, GRAD, COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip


@triton.jit
def row_arguments(
    r, student, student_stride, student_bias, student_scale, student_cap, teacher, teacher_stride,
    dlogits, dlogits_stride, dlogits_vocab, loss, stats, w_kd, w_ce, labels, vocab,
    FORM_S: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a kernel's arguments say of row r: (place of the first entry, where both sides begin, where results go,
    weights, label as (place or None, index, legal, its logit)). Writes the gradient of the vocabulary's padding."""
    begin_s, shift = anchor(student, r, student_stride, LAYOUT)
    begin_t, row_d, begin_d, row_stats = None, None, None, None
    if teacher is not None:
        begin_t, _ = anchor(teacher, r, teacher_stride, LAYOUT)
    if dlogits is not None:
        row_d = dlogits + r * dlogits_stride
        begin_d, _ = anchor(dlogits, r, dlogits_stride, LAYOUT)
        fill_row(row_d, vocab, dlogits_vocab, 0.0, ROWS)
    if stats is not None:
        row_stats = stats + r * 6
    kd, ce = tl.load(w_kd + r), 0.0
    if w_ce is not None:
        ce = tl.load(w_ce + r)
    label = (None, 0, False, 0.0)
    if labels is not None:
        index = tl.load(labels + r)
        legal = (index >= 0) & (index < vocab)
        index = tl.where(legal, index, 0).to(tl.int32)
        z = read_one(student + r * student_stride, student_bias, student_scale, student_cap, index, FORM_S)
        label = (index + shift, index, legal, z)
    return shift, (begin_s, begin_t), (loss + r, row_stats, row_d, begin_d), (kd, ce), label


@triton.jit
def row_counts(out, weights, label, vocab, ROWS: tl.constexpr):
    """Whether there is anything to compute; if not, stores 0, or NaN where the label that counts is none."""
    kd, ce = weights
    idle, wrong = (kd == 0) & (ce == 0), (ce != 0) & (label[2] == 0)
    if idle | wrong:
        store_everything(out, vocab, tl.where(idle, 0.0, float("nan")), ROWS)
    return (idle | wrong) == 0


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "dlogits_stride", "dlogits_vocab", "vocab"])
def dense_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    dlogits, dlogits_stride, dlogits_vocab, loss, stats, w_kd, w_ce, labels, vocab, per_t, c, a, b,
    TERM: tl.constexpr, GRAD: tl.constexpr,
    QUICK_TERM: tl.constexpr, SUM_GRAD: tl.constexpr, QUICK_GRAD: tl.constexpr, KIND: tl.constexpr,
    CARRY: tl.constexpr, COLD: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of a call of `kdkernels.ops.rows.divergence_rows_`.

    Args:
        student, teacher: logits ``[N, >= vocab]`` of one dtype (float32, float16, bfloat16), strides in entries.
        *_bias: float32 ``[vocab]`` or None; *_scale, *_cap: read where FORM_S, FORM_T (see `rows`) say so.
        dlogits: ``[N, dlogits_vocab]`` in the logits' dtype, may be ``student``, or None.
        loss: float32 ``[N]``; stats: float32 ``[N, 6]`` or None.
        w_kd, w_ce: float32 ``[N]``, w_ce or None; labels: int64 ``[N]`` or None.
        per_t, c: 1 / T and log2(e) / T; a, b: parameters of TERM and GRAD.
        TERM, GRAD: element functions. QUICK_*: the same without the clamp of exp for rows that need none, or a
            form of `forms`, which KIND says; SUM_GRAD for the sum of grad.
        CARRY: `NOTHING`, or `FORWARD`, `REVERSE` for the two divergences that one sweep settles.
        COLD: labels at T != 1 need sums of their own.

    Bytes: both operands read twice (forward and reverse KL) or three times, the gradient written once.
    """
    r = tl.program_id(0).to(tl.int64)
    shift, begins, out, weights, label = row_arguments(
        r, student, student_stride, student_bias, student_scale, student_cap, teacher, teacher_stride,
        dlogits, dlogits_stride, dlogits_vocab, loss, stats, w_kd, w_ce, labels, vocab, FORM_S, LAYOUT, ROWS,
    )  # fmt: skip
    if row_counts(out, weights, label, vocab, ROWS):
        one_row(begins[0], begins[1], shift, out, (student_bias, student_scale, student_cap),
                (teacher_bias, teacher_scale, teacher_cap), vocab, weights, label, (per_t, c, a, b),
                TERM, GRAD, QUICK_TERM, SUM_GRAD, QUICK_GRAD, KIND, CARRY, COLD,
                FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
