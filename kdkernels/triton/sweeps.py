"""The sweeps over a row that give its sums; `gradients` has the one that follows. See `rows` for tiles, sides and the
meaning of x, c and R.

A sweep takes ``student`` and ``teacher`` as sides (address, bias, scale, cap), ``span`` as (first place, end) and
constexpr: the forms of both sides, LAYOUT, ROWS, VEC. Bytes: every sweep reads both operands once.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.forms import FURTHEST, POWERS
from kdkernels.triton.rows import (
    DOUBTFUL,
    FAR,
    FILL,
    FORWARD,
    HOPELESS,
    INFINITY,
    LOG2_E,
    MASKED,
    NOTHING,
    SHIFTED,
    WHOLE,
    add2,
    add3,
    add4,
    larger2,
    read,
    tile,
    within,
)  # fmt: skip


@triton.jit
def borders(span, CAREFUL: tl.constexpr, LAYOUT: tl.constexpr, SIZE: tl.constexpr, VEC: tl.constexpr):
    """(head, full): whole tiles cover the places head .. full, tiles with a mask what is before and behind.

    The rest of the vocabulary comes first, where a mask is needed anyway, and nothing is left at the end; rows that
    begin between 16-byte boundaries need a mask at both ends. The careful sweeps take every tile with a mask.
    """
    if CAREFUL:
        return 0, 0
    elif LAYOUT == SHIFTED:
        return SIZE, tl.maximum(span[1] // SIZE, 1) * SIZE
    elif LAYOUT == WHOLE:  # such that the compiler sees multiples of VEC
        vectors = span[1] // VEC
        return vectors % (SIZE // VEC) * VEC, vectors * VEC
    else:
        return span[1] % SIZE, span[1]


@triton.jit
def gather(
    acc, student, teacher, o, at, span, m_s, m_t, c,
    CARRY: tl.constexpr, COLD: tl.constexpr, STATS: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, WHOLE_TILE: tl.constexpr,
):  # fmt: skip
    """Adds the tile that begins at place ``at`` to the sums of the first sweep."""
    sum_s, sum_t, cross, spread, cold, heat_s, heat_t, top_s, at_s, top_t, at_t = acc
    zs = read(student, o + at, span, FILL, FORM_S, LAYOUT, WHOLE_TILE, False)
    zt = read(teacher, o + at, span, FILL, FORM_T, LAYOUT, WHOLE_TILE, False)
    xs, xt = tl.fma(zs, c, -(m_s * c)), tl.fma(zt, c, -(m_t * c))
    es, et = tl.exp2(xs), tl.exp2(xt)
    sum_s += tl.sum(es, 1)
    sum_t += tl.sum(et, 1)
    if CARRY != NOTHING:
        d = xt - xs
        cross += tl.sum((et if CARRY == FORWARD else es) * d, 1)
        spread += tl.sum(d * d, 1)
    if COLD:
        cold += tl.sum(tl.exp2((zs - m_s) * LOG2_E), 1)
    if STATS:
        heat_s += tl.sum(es * xs, 1)
        heat_t += tl.sum(et * xt, 1)
        best_s, best_t = tl.max(zs, 1), tl.max(zt, 1)
        at_s, at_t = tl.where(best_s > top_s, at, at_s), tl.where(best_t > top_t, at, at_t)
        top_s, top_t = tl.maximum(top_s, best_s), tl.maximum(top_t, best_t)
    return sum_s, sum_t, cross, spread, cold, heat_s, heat_t, top_s, at_s, top_t, at_t


@triton.jit
def first_sweep(
    student, teacher, span, c,
    CARRY: tl.constexpr, COLD: tl.constexpr, STATS: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One sweep with the maximum of the first tile for a reference: a later maximum somewhat above it is as good, as
    float32 keeps its digits from 2^-126 to 2^127.

    Returns whether the row is fine (no masked entries, no NaN, no sum above `FAR`), (reference, R, sum) of both sides,
    the cross term, the sum at temperature 1, the sums of e x for entropies and, for the largest logits, the first tiles
    that hold them. The square of x_t - x_s goes to infinity for a logit that is finite but hopeless.
    """
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    head, full = borders(span, False, LAYOUT, size, VEC)
    if head == 0:
        head += size
    first = (span[0], tl.minimum(head, span[1]))
    zs = read(student, o, first, -INFINITY, FORM_S, LAYOUT, False, False)
    zt = read(teacher, o, first, -INFINITY, FORM_T, LAYOUT, False, False)
    m_s, m_t = tl.reduce((tl.max(zs, 1), tl.max(zt, 1)), 0, larger2)
    zero, start = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32)
    none = zero - INFINITY
    acc = (zero, zero, zero, zero, zero, zero, zero, none, start, none, start)
    acc = gather(acc, student, teacher, o, 0, first, m_s, m_t, c,
                 CARRY, COLD, STATS, FORM_S, FORM_T, LAYOUT, False)  # fmt: skip
    for at in range(head, full, size):
        acc = gather(acc, student, teacher, o, at, span, m_s, m_t, c,
                     CARRY, COLD, STATS, FORM_S, FORM_T, LAYOUT, True)  # fmt: skip
    if LAYOUT == SHIFTED:
        for at in range(full, span[1], size):
            acc = gather(acc, student, teacher, o, at, span, m_s, m_t, c,
                         CARRY, COLD, STATS, FORM_S, FORM_T, LAYOUT, False)  # fmt: skip
    cross, spread, cold, heat = 0.0, 0.0, 1.0, (0.0, 0.0)
    if CARRY == NOTHING:
        sum_s, sum_t = tl.reduce((acc[0], acc[1]), 0, add2)
    else:
        sum_s, sum_t, cross, spread = tl.reduce((acc[0], acc[1], acc[2], acc[3]), 0, add4)
    if COLD:
        cold = tl.sum(acc[4], 0)
    if STATS:
        heat = tl.reduce((acc[5], acc[6]), 0, add2)
    fine = ((tl.abs(cross) + spread) < INFINITY) & ((sum_s + sum_t + cold) < FAR)
    tops = (acc[7], acc[8], acc[9], acc[10])
    return fine, (m_s, m_s * c, sum_s), (m_t, m_t * c, sum_t), cross, cold, heat, tops


@triton.jit
def first_place(side, span, top, at, FORM: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr):
    """The lowest index of the largest logit: ``top`` and ``at [ROWS]`` are each thread's largest and its tile."""
    most = tl.max(top, 0)
    first = tl.min(tl.where(top == most, at, 2147483647), 0)
    o = first // VEC * VEC + tile(ROWS, VEC, LAYOUT)
    z = read(side, o, span, -INFINITY, FORM, LAYOUT, False, False)
    return tl.min(tl.min(tl.where(z == most, o, 2147483647), 1), 0) - span[0]


@triton.jit
def log_prob(z, norm, per_t, MEND: tl.constexpr):
    """Log-probabilities; MEND: a masked entry's is -1e4 (NaN compares false and stays)."""
    l = tl.fma(z, per_t, -norm[0]) - norm[1]
    if MEND:
        l = tl.where(l < HOPELESS, MASKED, l)
    return l


@triton.jit
def add_kahan(total, lost, x):
    y = x - lost
    after = total + y
    return after, (after - total) - y


@triton.jit
def add_stats(
    sums, student, teacher, o, at, span, norm_s, norm_t, per_t, a, b,
    TERM: tl.constexpr, GRAD: tl.constexpr, CAREFUL: tl.constexpr, KIND: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, WHOLE_TILE: tl.constexpr,
):  # fmt: skip
    zs = read(student, o + at, span, FILL, FORM_S, LAYOUT, WHOLE_TILE, False)
    zt = read(teacher, o + at, span, FILL, FORM_T, LAYOUT, WHOLE_TILE, False)
    lq, lp = log_prob(zs, norm_s, per_t, CAREFUL), log_prob(zt, norm_t, per_t, CAREFUL)
    term, grad = TERM(lp, lq, a, b), GRAD(lp, lq, a, b)
    doubt = (lq - lp) * (lq - lp) if KIND == POWERS else lp * lq
    if not WHOLE_TILE:
        inside = within(o + at, span[0], span[1], LAYOUT)
        term, grad = tl.where(inside, term, 0.0), tl.where(inside, grad, 0.0)
        doubt = tl.where(inside, doubt, 0.0)
    if CAREFUL:  # one masked entry may cost 1e4 nats beside thousands of 1e-7
        term, lost_term = add_kahan(sums[0], sums[2], tl.sum(term, 1))
        grad, lost_grad = add_kahan(sums[1], sums[3], tl.sum(grad, 1))
        return term, grad, lost_term, lost_grad
    else:
        most = tl.maximum(sums[2], tl.max(doubt, 1)) if KIND == POWERS else sums[2] + tl.sum(doubt, 1)
        return sums[0] + tl.sum(term, 1), sums[1] + tl.sum(grad, 1), most, sums[3]


@triton.jit
def stats_sweep(
    student, teacher, span, norm_s, norm_t, per_t, a, b,
    TERM: tl.constexpr, GRAD: tl.constexpr, CAREFUL: tl.constexpr, KIND: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of term and grad, and whether they can be trusted, which not CAREFUL asks: a hopeless logit makes the sum of
    lp lq large, unless the other side has all its mass there, and then counts as it should. KIND: of TERM and
    GRAD; for powers the largest log-ratio decides. From the row's end: what the sweep before read last is still in the
    cache."""
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    zero = tl.zeros([ROWS], tl.float32)
    sums = (zero, zero, zero, zero)
    head, full = borders(span, CAREFUL, LAYOUT, size, VEC)
    if CAREFUL or (LAYOUT == SHIFTED):
        for at in range(full, span[1], size):
            sums = add_stats(sums, student, teacher, o, at, span, norm_s, norm_t, per_t, a, b,
                             TERM, GRAD, CAREFUL, KIND, FORM_S, FORM_T, LAYOUT, False)  # fmt: skip
    if not CAREFUL:
        for back in range(0, full - head, size):
            sums = add_stats(sums, student, teacher, o, full - size - back, span, norm_s, norm_t, per_t, a, b,
                             TERM, GRAD, False, KIND, FORM_S, FORM_T, LAYOUT, True)  # fmt: skip
        if head > 0:
            start = (span[0], tl.minimum(head, span[1]))
            sums = add_stats(sums, student, teacher, o, 0, start, norm_s, norm_t, per_t, a, b,
                             TERM, GRAD, False, KIND, FORM_S, FORM_T, LAYOUT, False)  # fmt: skip
    if CAREFUL:
        term, grad = tl.reduce((sums[0], sums[1]), 0, add2)
        return term, grad, True
    elif KIND == POWERS:
        term, grad = tl.reduce((sums[0], sums[1]), 0, add2)
        furthest = FURTHEST / tl.maximum(a, b)
        return term, grad, (tl.max(sums[2], 0) < furthest * furthest) & (tl.abs(term) + tl.abs(grad) < DOUBTFUL)
    else:
        term, grad, product = tl.reduce((sums[0], sums[1], sums[2]), 0, add3)
        return term, grad, (tl.abs(term) + tl.abs(grad) + product) < DOUBTFUL
