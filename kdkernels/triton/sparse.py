"""The kernel for sparse teachers: one program turns a row of student logits and K entries of a teacher into loss,
statistics and gradient; no row of the teacher is ever built. See `kept` for the entries, `rows` for tiles and sides.

The student's tail is the sum over the entries that are not kept: a bit for each entry, in memory of the row's own,
tells which are, and in every tile they are cut out before the sum. That is 4 instructions an entry, whatever K is;
walking along the sorted ids costs every thread 13 for each of them, in all 92 an entry in place of 20 at K = 1024 of
128256.

The first sweep takes the largest logit of the first tile for a reference, as the dense kernel does; a row for which
that fails (all of the tile kept, NaN, a largest logit 28 nats further up) is swept again with the largest of all. The
gradient's sweep writes what entries outside get; the kept ones are then written over.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kdkernels.triton.dense import label_loss, row_arguments, row_counts, store_everything, store_row
from kdkernels.triton.gradients import put
from kdkernels.triton.kept import GHOST, RENORMALIZE, TRUNCATE, compare_kept, gather_kept, scatter_kept, sum_kept
from kdkernels.triton.rows import (
    FAR,
    FILL,
    INFINITY,
    LN_2,
    LOG2_E,
    LOOSE,
    SHIFTED,
    fill_row,
    larger,
    natural,
    read,
    side_of,
    tile,
)
from kdkernels.triton.sweeps import borders, first_place


@triton.jit
def cut(z, at, bits, end, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr):
    """The tile's logits, -inf where an entry is kept."""
    octets = bits.to(tl.pointer_type(tl.uint8), bitcast=True)
    if LAYOUT == LOOSE:
        place = at + tile(ROWS, VEC, LAYOUT)
        kept = tl.load(octets + place // 8, mask=place < end, other=0).to(tl.int32) >> (place % 8)
    else:
        first = at + tl.arange(0, ROWS)[:, None] * VEC
        kept = tl.load(octets + first // 8, mask=first < end, other=0).to(tl.int32)
        if VEC < 8:
            kept = kept >> (first % 8)
        kept = kept >> tl.arange(0, VEC)[None, :]
    return tl.where((kept & 1) != 0, -INFINITY, z)


@triton.jit
def add_others(acc, raw, z, at, m, c, COLD: tl.constexpr, STATS: tl.constexpr):
    """Adds a tile: ``raw`` logits and ``z``, those without the kept ones."""
    total, cold, heat, top, where = acc
    x = tl.fma(z, c, -(m * c))
    e = tl.exp2(x)
    total += tl.sum(e, 1)
    if COLD:
        cold += tl.sum(tl.exp2((z - m) * LOG2_E), 1)
    if STATS:
        heat += tl.sum(tl.where(e == 0, 0.0, e * x), 1)
        best = tl.max(raw, 1)
        where = tl.where(best > top, at, where)
        top = tl.maximum(top, best)
    return total, cold, heat, top, where


@triton.jit
def others_top(student, span, bits, FORM_S: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr):
    """The largest logit that is not kept; NaN where the row has one."""
    o = tile(ROWS, VEC, LAYOUT)
    top = tl.full([ROWS], -INFINITY, tl.float32)
    for at in range(0, span[1], ROWS * VEC):
        z = read(student, o + at, span, -INFINITY, FORM_S, LAYOUT, False, False)
        z = cut(z, at, bits, span[1], LAYOUT, ROWS, VEC)
        top = larger(top, tl.reduce(z, 1, larger))
    return tl.reduce(top, 0, larger)


@triton.jit
def sum_others(
    student, span, bits, m, c, CAREFUL: tl.constexpr, COLD: tl.constexpr, STATS: tl.constexpr,
    FORM_S: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums over the entries that are not kept, relative to m (CAREFUL) or to the first tile's largest: (reference, sum
    of e^x, of e^(z - reference), of e^x x), and where the largest logits of all are."""
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    zero = tl.zeros([ROWS], tl.float32)
    acc = (zero, zero, zero, zero - INFINITY, tl.zeros([ROWS], tl.int32))
    head, full = borders(span, CAREFUL, LAYOUT, size, VEC)
    if not CAREFUL:
        if head == 0:
            head += size
        end = tl.minimum(head, span[1])
        raw = read(student, o, (span[0], end), -INFINITY, FORM_S, LAYOUT, False, False)
        z = cut(raw, 0, bits, span[1], LAYOUT, ROWS, VEC)
        m = tl.max(tl.max(z, 1), 0)
        acc = add_others(acc, raw, z, 0, m, c, COLD, STATS)
        for at in range(head, full, size):
            raw = read(student, o + at, span, FILL, FORM_S, LAYOUT, True, False)
            z = cut(raw, at, bits, span[1], LAYOUT, ROWS, VEC)
            acc = add_others(acc, raw, z, at, m, c, COLD, STATS)
    if CAREFUL or (LAYOUT == SHIFTED):
        for at in range(full, span[1], size):
            raw = read(student, o + at, span, -INFINITY, FORM_S, LAYOUT, False, False)
            z = cut(raw, at, bits, span[1], LAYOUT, ROWS, VEC)
            acc = add_others(acc, raw, z, at, m, c, COLD, STATS)
    total, cold, heat = tl.sum(acc[0], 0), 1.0, 0.0
    if COLD:
        cold = tl.sum(acc[1], 0)
    if STATS:
        heat = tl.sum(acc[2], 0)
    return (m, total, cold, heat), (acc[3], acc[4])


@triton.jit
def others_gradient(
    to, student, span, m, c, weight, ce, label, cold, COLD: tl.constexpr,
    FORM_S: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Writes ``weight e^x`` and the label's share; from the row's end, where the sweep before ended."""
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    head, full = borders(span, False, LAYOUT, size, VEC)
    if LAYOUT == SHIFTED:
        for at in range(full, span[1], size):
            z = read(student, o + at, span, FILL, FORM_S, LAYOUT, False, True)
            g = tl.exp2(tl.fma(z, c, -(m * c))) * weight
            put(to, g, z, o + at, span, at, student, ce, label, cold, COLD, FORM_S, LAYOUT, False)
    for back in range(0, full - head, size):
        at = full - size - back
        z = read(student, o + at, span, FILL, FORM_S, LAYOUT, True, True)
        g = tl.exp2(tl.fma(z, c, -(m * c))) * weight
        put(to, g, z, o + at, span, at, student, ce, label, cold, COLD, FORM_S, LAYOUT, True)
    if head > 0:
        start = (span[0], tl.minimum(head, span[1]))
        z = read(student, o, start, FILL, FORM_S, LAYOUT, False, True)
        g = tl.exp2(tl.fma(z, c, -(m * c))) * weight
        put(to, g, z, o, start, 0, student, ce, label, cold, COLD, FORM_S, LAYOUT, False)


@triton.jit
def share(reference, top, total, per_t):
    """A part's sum relative to the row's top; 0 of an empty part."""
    return tl.where(total > 0, total * tl.exp((reference - top) * per_t), tl.where(total == 0, 0.0, float("nan")))


@triton.jit
def split_student(
    student, span, teacher, top_k, top_p, per_t, c, COLD: tl.constexpr, STATS: tl.constexpr,
    FORM_S: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The student's row in two parts: (others, where its largest are, kept, the row's top, its sum relative to that,
    the teacher's kept mass relative to top_p). others: reference, sum, sum at temperature 1, sum of e^x x, sum of e^x,
    where x is relative to the reference times c, rounded; kept: the same without the last."""
    ids, log_probs, _tail, kept, bits, count = teacher
    others, tops = sum_others(student, span, bits, 0.0, c, False, COLD, STATS, FORM_S, LAYOUT, ROWS, VEC)
    if ((others[1] > 0) & (others[1] < FAR) & (others[2] < FAR)) == 0:
        most = others_top(student, span, bits, FORM_S, LAYOUT, ROWS, VEC)
        others, tops = sum_others(student, span, bits, tl.where(most == -INFINITY, 0.0, most), c, True, COLD, STATS,
                                  FORM_S, LAYOUT, ROWS, VEC)  # fmt: skip
    m, x_sum, o_cold, o_heat = others
    off = tl.fma(m, c, -(m * c)) * LN_2
    o_sum = x_sum * tl.exp(-off)
    k_sum, k_cold, k_heat, mass = sum_kept(kept, ids, log_probs, count, top_k, top_p, c, ROWS)
    base = tl.where(top_k == -INFINITY, 0.0, top_k)
    top = tl.where(o_sum == 0, base, tl.where(k_sum == 0, m, larger(m, base)))
    whole = share(m, top, o_sum, per_t) + share(base, top, k_sum, per_t)
    return (m, o_sum, o_cold, o_heat, x_sum), tops, (base, k_sum, k_cold, k_heat), top, whole, mass


@triton.jit
def student_entropy(others, kept, top, whole, per_t):
    """log of the sum minus the mean of (z - top) / T."""
    m, o_sum, _oc, o_heat, x_sum = others
    base, k_sum, _kc, k_heat = kept
    o_mean = tl.where(o_sum > 0, o_heat / x_sum * LN_2 + libdevice.log(o_sum / x_sum) + (m - top) * per_t, 0.0)
    k_mean = tl.where(k_sum > 0, k_heat / k_sum * LN_2 + (base - top) * per_t, 0.0)
    o_share, k_share = share(m, top, o_sum, per_t), share(base, top, k_sum, per_t)
    return libdevice.log(whole) - (o_share * o_mean + k_share * k_mean) / whole


@triton.jit
def sparse_row(
    student, span, vocab, out, weights, label, numbers, teacher, held,
    TERM: tl.constexpr, GRAD: tl.constexpr, MODE: tl.constexpr, COLD: tl.constexpr,
    FORM_S: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row that counts. teacher: (ids, log_probs, log_tail, kept, bits, count); held: of `gather_kept`."""
    kd, ce = weights
    per_t, c, a, b, excess = numbers
    ids, log_probs, log_tail, kept, _bits, count = teacher
    top_k, top_p, first_t, number = held
    others, tops, inner, top, whole, mass = split_student(
        student, span, teacher, top_k, top_p, per_t, c, COLD, out[1] is not None, FORM_S, LAYOUT, ROWS, VEC
    )
    if (whole > 0) & (whole < INFINITY):
        log_whole = libdevice.log(whole)
        norm = natural(top, log_whole, per_t)
        m, o_sum = others[0], others[1]
        log_others = tl.where(o_sum == 0, -INFINITY, libdevice.log(o_sum))
        tails = (log_tail, (m - top) * per_t + log_others - log_whole, number < vocab)
        norm_q, norm_p = norm, 0.0
        if MODE == RENORMALIZE:
            norm_q, norm_p = natural(inner[0], libdevice.log(inner[1]), per_t), top_p + libdevice.log(mass)
        d, total, heat, tail_grad, tail_q = compare_kept(
            kept, ids, log_probs, count, tails, norm_q, norm_p, per_t, (a, b, excess), TERM, GRAD, MODE, ROWS
        )
        if (MODE != GHOST) & (MODE != RENORMALIZE):
            heat += tl.where(log_tail > -INFINITY, tl.exp(log_tail) * log_tail, 0.0)
            tail_q = tl.exp(tails[1])
        cold_sum, nll, entropy, first_s = 1.0, 0.0, 0.0, 0
        if COLD:
            cold_sum = share(m, top, others[2], 1.0) + share(inner[0], top, inner[2], 1.0)
        if label[0] is not None:
            log_cold = libdevice.log(cold_sum) if COLD else log_whole
            nll = tl.where(label[2], label_loss(label[3], top, log_cold), 0.0)
        if out[1] is not None:
            first_s = first_place(student, span, tops[0], tops[1], FORM_S, LAYOUT, ROWS, VEC)
            entropy = student_entropy(others, inner, top, whole, per_t)
        store_row(out, d, nll, (entropy, -heat), (first_s, first_t), weights, label)
        if out[3] is not None:
            k, cold = kd * per_t, (top, 1.0 / cold_sum)
            weight = 0.0 if MODE == RENORMALIZE else k * (tail_grad - tail_q * total) / o_sum
            if (label[0] is not None) & (not COLD):
                weight += ce * tl.exp((m - top) * per_t) / whole
            weight = tl.where(o_sum > 0, weight * (o_sum / others[4]), 0.0)
            others_gradient(out[3], student, span, m, c, weight, ce, label[0], cold,
                            COLD, FORM_S, LAYOUT, ROWS, VEC)  # fmt: skip
            tl.debug_barrier()  # the kept entries are written over
            scatter_kept(out[2], student, kept, ids, log_probs, count, tails, norm_q, norm_p, norm, per_t,
                         (a, b, excess), k, total, ce, None if label[0] is None else label[1], cold,
                         TERM, GRAD, MODE, COLD, FORM_S, ROWS)  # fmt: skip
    else:
        store_everything(out, vocab, float("nan"), ROWS)


@triton.jit(do_not_specialize=["student_stride", "dlogits_stride", "dlogits_vocab", "vocab", "count", "words"])
def sparse_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    ids, log_probs, log_tail, kept, count, bits, words,
    dlogits, dlogits_stride, dlogits_vocab, loss, stats, w_kd, w_ce, labels, vocab, per_t, c, a, b, excess,
    TERM: tl.constexpr, GRAD: tl.constexpr, MODE: tl.constexpr, COLD: tl.constexpr,
    FORM_S: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of a call of `kdkernels.ops.sparse.sparse_rows_`; see there what makes a row NaN.

    ids: int32 ``[N, count]``; log_probs, kept: float32 ``[N, count]``, kept is overwritten; log_tail: float32 ``[N]``;
    bits: int32 ``[N, words]``, overwritten with a bit for each place, 32 words >= vocab + 16; excess: of the
    divergence's term (`Elements.excess`). The rest as of `kdkernels.triton.dense.dense_kernel`.

    Bytes: the student's row read twice, the gradient written once, the bits each once (1/16 of a bfloat16 row), and 32
    for each kept entry and access to it.
    """
    r = tl.program_id(0).to(tl.int64)
    shift, begins, out, weights, label = row_arguments(
        r, student, student_stride, student_bias, student_scale, student_cap, None, 0,
        dlogits, dlogits_stride, dlogits_vocab, loss, stats, w_kd, w_ce, labels, vocab, FORM_S, LAYOUT, ROWS,
    )  # fmt: skip
    if row_counts(out, weights, label, vocab, ROWS):
        row_ids, row_lp, row_kept = ids + r * count, log_probs + r * count, kept + r * count
        row_bits, tail = bits + r * words, tl.load(log_tail + r)
        fill_row(row_bits, 0, words, 0, ROWS)
        tl.debug_barrier()
        row_s = student + r * student_stride
        top_k, top_p, first, number, wrong = gather_kept(
            row_s, student_bias, student_scale, student_cap, row_ids, row_lp, row_kept, row_bits, shift, count, vocab,
            FORM_S, ROWS,
        )  # fmt: skip
        tl.debug_barrier()  # other threads read kept and bits from here on
        mass = top_p > -INFINITY
        if (MODE == GHOST) | (MODE == TRUNCATE):
            mass = mass | ((tail > -INFINITY) & (number < vocab))
        if (wrong == 0) & mass & (top_p < INFINITY) & (tail < INFINITY):
            side = side_of(begins[0], (student_bias, student_scale, student_cap), shift)
            sparse_row(side, (shift, shift + vocab), vocab, out, weights, label, (per_t, c, a, b, excess),
                       (row_ids, row_lp, tail, row_kept, row_bits, count), (top_k, top_p, first, number),
                       TERM, GRAD, MODE, COLD, FORM_S, LAYOUT, ROWS, VEC)  # fmt: skip
        else:
            store_everything(out, vocab, float("nan"), ROWS)
