"""adaptive_kl: forward and reverse KL, weighted by how far apart the distributions are over the teacher's head (the
smallest set of entries with mass >= mu, equal ones entering by lower index) and over its tail.

The head ends at one logit and, among its equals, at one of them. The logit is found by sweeps over the teacher that sum
the mass above three keys each (integers in the order of the logits: 2^16 of bfloat16, 2^17 of float16, 2^32 else), a
quarter of the interval at a time: 8 sweeps, or 16. Its equals weigh the same, so their number follows by division, and
the place of the last by a sweep that counts. A row of 128 k bfloat16 logits is 256 KB and stays in L2 meanwhile. Then a
sweep over both sides for the sums, one for the gradient. Masses are summed in float64, so that the head is the same
whatever the order.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kdkernels.triton.careful import careful_sums, careful_tops
from kdkernels.triton.dense import (
    entropy,
    firsts_of,
    label_loss,
    row_arguments,
    row_counts,
    store_everything,
    store_row,
)
from kdkernels.triton.element import exp, kl
from kdkernels.triton.gradients import put
from kdkernels.triton.rows import FILL, INFINITY, PLAIN, add3, add4, larger2, natural, read, side_of, tile, within
from kdkernels.triton.sweeps import log_prob


@triton.jit
def order_bits(z):
    """Integers in the order of the floating-point numbers; the two zeros are one number."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def keys(z, SHIFT: tl.constexpr):
    """The order's integers without the bits that are alike for all numbers of the stored type."""
    return order_bits(z) >> SHIFT


@triton.jit
def from_key(key, SHIFT: tl.constexpr):
    """The logit of a key."""
    low: tl.constexpr = (1 << SHIFT) - 1
    bits = key << SHIFT
    return tl.where(key < 0, (bits | low) ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def masses_above(
    teacher, span, m_t, c, key1, key2, key3,
    SHIFT: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Mass of the entries above each of three keys."""
    o = tile(ROWS, VEC, LAYOUT)
    sum1 = tl.zeros([ROWS], tl.float64)
    sum2, sum3 = sum1, sum1
    for at in range(0, span[1], ROWS * VEC):
        z = read(teacher, o + at, span, -INFINITY, FORM_T, LAYOUT, False, False)
        key, mass = keys(z, SHIFT), tl.exp2((z - m_t) * c)
        sum1 += tl.sum(tl.where(key > key1, mass, 0.0).to(tl.float64), 1)
        sum2 += tl.sum(tl.where(key > key2, mass, 0.0).to(tl.float64), 1)
        sum3 += tl.sum(tl.where(key > key3, mass, 0.0).to(tl.float64), 1)
    return tl.reduce((sum1, sum2, sum3), 0, add3)


@triton.jit
def last_equal(
    teacher, span, key, count,
    SHIFT: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The place of the ``count``-th entry of this key, or of the last if there are fewer."""
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    before, begin, seen = 0, 0, 0  # before tile ``begin`` there are ``before`` equals, fewer than count
    for at in range(0, span[1], size):
        z = read(teacher, o + at, span, -INFINITY, FORM_T, LAYOUT, False, False)
        begin, before = tl.where(seen < count, at, begin), tl.where(seen < count, seen, before)
        seen += tl.sum(tl.sum((keys(z, SHIFT) == key).to(tl.int32), 1), 0)
    z = read(teacher, o + begin, span, -INFINITY, FORM_T, LAYOUT, False, False)
    equal = (keys(z, SHIFT) == key).to(tl.int32)
    first, last = 0, size - 1
    while first < last:
        middle = (first + last) >> 1
        if before + tl.sum(tl.sum(tl.where(o <= middle, equal, 0), 1), 0) >= count:
            last = middle
        else:
            first = middle + 1
    return begin + first


@triton.jit
def teacher_head(
    teacher, span, m_t, c, enough,
    SHIFT: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(key, last): in the head are the entries above key, and those that equal it up to place last. An entry is in the
    head where the mass of those before it is below ``enough``."""
    # the lowest key such that the mass above it is below enough; 150 octaves below the top nothing has mass
    low, high = keys(m_t - 150.0 / c, SHIFT).to(tl.int64), keys(m_t, SHIFT).to(tl.int64)
    above = tl.cast(0.0, tl.float64)  # high
    while low < high:
        width = high - low
        key1, key2, key3 = low + width // 4, low + width // 2, low + width * 3 // 4
        sum1, sum2, sum3 = masses_above(teacher, span, m_t, c, key1.to(tl.int32), key2.to(tl.int32), key3.to(tl.int32),
                                        SHIFT, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
        if sum1 < enough:
            high, above = key1, sum1
        elif sum2 < enough:
            low, high, above = key1 + 1, key2, sum2
        elif sum3 < enough:
            low, high, above = key2 + 1, key3, sum3
        else:
            low = key3 + 1
    key = low.to(tl.int32)
    each = tl.exp2((from_key(key, SHIFT) - m_t) * c).to(tl.float64)
    count = tl.minimum(tl.ceil((enough - above) / each), 1e9).to(tl.int32)
    return key, last_equal(teacher, span, key, count, SHIFT, FORM_T, LAYOUT, ROWS, VEC)


@triton.jit
def adaptive_sums(
    student, teacher, span, norm_s, norm_t, per_t, key, last,
    SHIFT: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
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
        place, inside = keys(zt, SHIFT), within(o + at, span[0], span[1], LAYOUT)
        in_head = (place > key) | ((place == key) & (o + at <= last))
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
    stored: tl.constexpr = teacher[0].dtype.element_ty
    SHIFT: tl.constexpr = (
        0 if FORM_T != PLAIN else (16 if stored == tl.bfloat16 else (13 if stored == tl.float16 else 0))
    )
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
        lowest: tl.constexpr = -2147483648
        every, _, _ = masses_above(teacher, span, m_t, c, lowest, lowest, lowest,
                                   SHIFT, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
        key, last = teacher_head(teacher, span, m_t, c, every * mu, SHIFT, FORM_T, LAYOUT, ROWS, VEC)
        head, tail, forward, reverse = adaptive_sums(
            student, teacher, span, norm_s, norm_t, per_t, key, last, SHIFT, FORM_S, FORM_T, LAYOUT, ROWS, VEC
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
    shift, begins, out, weights, label = row_arguments(
        r, student, student_stride, student_bias, student_scale, student_cap, teacher, teacher_stride,
        dlogits, dlogits_stride, dlogits_vocab, loss, stats, w_kd, w_ce, labels, vocab, FORM_S, LAYOUT, ROWS,
    )  # fmt: skip
    if row_counts(out, weights, label, vocab, ROWS):
        side_s = side_of(begins[0], (student_bias, student_scale, student_cap), shift)
        side_t = side_of(begins[1], (teacher_bias, teacher_scale, teacher_cap), shift)
        adaptive_row(side_s, side_t, (shift, shift + vocab), vocab, out, weights, label, (per_t, c, a),
                     COLD, FORM_S, FORM_T, LAYOUT, ROWS, VEC)  # fmt: skip
