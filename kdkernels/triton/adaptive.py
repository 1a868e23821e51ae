"""adaptive_kl: forward and reverse KL, weighted by how far apart the distributions are over the teacher's head (the
smallest set of entries with mass >= mu, equal ones entering by lower index) and over its tail.

The head ends at one logit and, among its equals, at one index. Both are found by bisection, a sweep over the teacher
for each bit of the logit's order-preserving integer (32) and of the index (up to 18), which sums the mass above. A row
of 128 k bfloat16 logits is 256 KB and stays in L2 meanwhile. Then a sweep over both sides for the sums, one for the
gradient. Masses are summed in float64, so that the head is the same whatever the order.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kdkernels.triton.careful import careful_sums, careful_tops
from kdkernels.triton.dense import entropy, firsts_of, label_loss, store_everything, store_row
from kdkernels.triton.element import exp, kl
from kdkernels.triton.rows import FILL, INFINITY, add4, anchor, fill_row, larger2, natural, read, read_one, tile, within
from kdkernels.triton.sweeps import log_prob, put


@triton.jit
def order_bits(z):
    """Integers in the order of the floating-point numbers; the two zeros are one number."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def mass_above(
    teacher, span, m_t, c, key, index, EQUAL: tl.constexpr,
    FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Mass of the entries whose integer is above ``key``; EQUAL: and of those that equal it with a place < index."""
    o = tile(ROWS, VEC, LAYOUT)
    total = tl.zeros([ROWS], tl.float64)
    for at in range(0, span[1], ROWS * VEC):
        z = read(teacher, o + at, span, -INFINITY, FORM_T, LAYOUT, False, False)
        bits = order_bits(z)
        taken = bits > key
        if EQUAL:
            taken = taken | ((bits == key) & (o + at < index))
        mass = tl.exp2((z - m_t) * c)
        total += tl.sum(tl.where(taken, mass, 0.0).to(tl.float64), 1)
    return tl.sum(total, 0)


@triton.jit
def teacher_head(
    teacher, span, m_t, c, enough, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr
):
    """(key, last): in the head are the entries above key, and those that equal it up to place last. An entry is in the
    head where the mass of those before it is below ``enough``."""
    # the lowest key such that the mass above it is below enough
    low, high = tl.cast(-2147483648, tl.int64), tl.cast(2147483647, tl.int64)
    while low < high:
        middle = (low + high) >> 1
        if mass_above(teacher, span, m_t, c, middle.to(tl.int32), 0, False, FORM_T, LAYOUT, ROWS, VEC) < enough:
            high = middle
        else:
            low = middle + 1
    key = low.to(tl.int32)
    # the highest place such that the mass before it is below enough
    first, last = span[0], span[1] - 1
    while first < last:
        place = (first + last + 1) >> 1
        if mass_above(teacher, span, m_t, c, key, place, True, FORM_T, LAYOUT, ROWS, VEC) < enough:
            first = place
        else:
            last = place - 1
    return key, first


@triton.jit
def adaptive_sums(
    student, teacher, span, norm_s, norm_t, per_t, key, last, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of |p - q| over head and tail, forward and reverse KL."""
    o = tile(ROWS, VEC, LAYOUT)
    zero = tl.zeros([ROWS], tl.float32)
    head, tail, forward, reverse = zero, zero, zero, zero
    for at in range(0, span[1], ROWS * VEC):
        zs = read(student, o + at, span, FILL, FORM_S, LAYOUT, False, False)
        zt = read(teacher, o + at, span, FILL, FORM_T, LAYOUT, False, False)
        lq, lp = log_prob(zs, norm_s, per_t, True), log_prob(zt, norm_t, per_t, True)
        q, p = exp(lq), exp(lp)
        bits, inside = order_bits(zt), within(o + at, span[0], span[1], LAYOUT)
        in_head = (bits > key) | ((bits == key) & (o + at <= last))
        gap = tl.where(inside, tl.abs(p - q), 0.0)
        head += tl.sum(tl.where(in_head, gap, 0.0), 1)
        tail += tl.sum(tl.where(in_head, 0.0, gap), 1)
        forward += tl.sum(tl.where(inside, kl(p, q, lp - lq), 0.0), 1)
        reverse += tl.sum(tl.where(inside, kl(q, p, lq - lp), 0.0), 1)
    return tl.reduce((head, tail, forward, reverse), 0, add4)


@triton.jit
def adaptive_gradient(
    to, student, teacher, span, norm_s, norm_t, per_t, k, ahead, behind, total, ce_hot, ce, label, cold,
    COLD: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Writes k (ahead (q - p) + behind q (lq - lp) - q total) and the label's share."""
    o = tile(ROWS, VEC, LAYOUT)
    for at in range(0, span[1], ROWS * VEC):
        zs = read(student, o + at, span, FILL, FORM_S, LAYOUT, False, False)
        zt = read(teacher, o + at, span, FILL, FORM_T, LAYOUT, False, False)
        lq, lp = log_prob(zs, norm_s, per_t, True), log_prob(zt, norm_t, per_t, True)
        q, p = exp(lq), exp(lp)
        g = k * (ahead * (q - p) + q * (behind * (lq - lp) - total)) + q * ce_hot
        put(to, g, zs, o + at, span, at, student, ce, label, cold, COLD, FORM_S, LAYOUT, False)


@triton.jit
def adaptive_row(
    student, teacher, span, vocab, out, weights, label, numbers,
    COLD: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    kd, ce = weights
    per_t, c, mu = numbers
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
        every = mass_above(teacher, span, m_t, c, -2147483648, 0, False, FORM_T, LAYOUT, ROWS, VEC)
        key, last = teacher_head(teacher, span, m_t, c, every * mu, FORM_T, LAYOUT, ROWS, VEC)
        head, tail, forward, reverse = adaptive_sums(
            student, teacher, span, norm_s, norm_t, per_t, key, last, FORM_S, FORM_T, LAYOUT, ROWS, VEC
        )
        apart = head + tail  # 0: p = q, every weight is 0
        ahead, behind = tl.where(apart > 0, head / apart, 0.0), tl.where(apart > 0, tail / apart, 0.0)
        d = ahead * forward + behind * reverse
        store_row(out, d, nll, (entropy(s, heat[0]), entropy(t, heat[1])), firsts, weights, label)
        if out[3] is not None:
            adaptive_gradient(out[3], student, teacher, span, norm_s, norm_t, per_t, kd * per_t, ahead, behind,
                              behind * reverse, 0.0 if COLD else ce, ce, label[0], (m_s, 1.0 / cold_sum),
                              COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
    else:
        store_everything(out, vocab, float("nan"), ROWS)


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "dlogits_stride", "dlogits_vocab", "vocab"])
def adaptive_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    dlogits, dlogits_stride, dlogits_vocab, loss, stats, w_kd, w_ce, labels, vocab, per_t, c, a,
    COLD: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``; arguments as of `kdkernels.triton.dense.dense_kernel`, a is mu."""
    r = tl.program_id(0).to(tl.int64)
    begin_s, shift = anchor(student, r, student_stride, LAYOUT)
    begin_t, _ = anchor(teacher, r, teacher_stride, LAYOUT)
    row_d, begin_d, row_stats = None, None, None
    if dlogits is not None:
        row_d = dlogits + r * dlogits_stride
        begin_d, _ = anchor(dlogits, r, dlogits_stride, LAYOUT)
        fill_row(row_d, vocab, dlogits_vocab, 0.0, ROWS)
    if stats is not None:
        row_stats = stats + r * 6
    out = (loss + r, row_stats, row_d, begin_d)
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
    if (kd == 0) & (ce == 0):
        store_everything(out, vocab, 0.0, ROWS)
    elif (ce != 0) & (label[2] == 0):
        store_everything(out, vocab, float("nan"), ROWS)
    else:
        sides = (
            (begin_s, None if student_bias is None else student_bias - shift, student_scale, student_cap),
            (begin_t, None if teacher_bias is None else teacher_bias - shift, teacher_scale, teacher_cap),
        )
        adaptive_row(sides[0], sides[1], (shift, shift + vocab), vocab, out, (kd, ce), label, (per_t, c, a),
                     COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
