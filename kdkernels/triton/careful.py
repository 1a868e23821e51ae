"""Maxima and sums of a row that may hold masked entries, NaN or infinity; see `rows` for tiles, sides and spans.

Nothing is assumed of the row: the maximum comes from a sweep of its own, NaN is carried along, and every tile has a
mask. Bytes: each function reads both operands once.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.rows import INFINITY, LOG2_E, add4, larger, read, tile


@triton.jit
def careful_tops(
    student, teacher, span, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The largest logits of both sides (NaN where a row has one) and, per thread, of which tile."""
    o = tile(ROWS, VEC, LAYOUT)
    top_s = tl.full([ROWS], -INFINITY, tl.float32)
    top_t, at_s, at_t = top_s, tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for at in range(0, span[1], ROWS * VEC):
        best_s = tl.reduce(read(student, o + at, span, -INFINITY, FORM_S, LAYOUT, False, False), 1, larger)
        best_t = tl.reduce(read(teacher, o + at, span, -INFINITY, FORM_T, LAYOUT, False, False), 1, larger)
        at_s, at_t = tl.where(best_s > top_s, at, at_s), tl.where(best_t > top_t, at, at_t)
        top_s, top_t = larger(top_s, best_s), larger(top_t, best_t)
    return top_s, at_s, top_t, at_t


@triton.jit
def careful_sums(
    student, teacher, span, m_s, m_t, c, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of e^x of both sides, of e^(z - m_s), and of e^x x of both sides, for any row; NaN where one is due."""
    o = tile(ROWS, VEC, LAYOUT)
    zero = tl.zeros([ROWS], tl.float32)
    sum_s, sum_t, cold, heat_s, heat_t = zero, zero, zero, zero, zero
    for at in range(0, span[1], ROWS * VEC):
        ds = read(student, o + at, span, -INFINITY, FORM_S, LAYOUT, False, False) - m_s
        dt = read(teacher, o + at, span, -INFINITY, FORM_T, LAYOUT, False, False) - m_t
        es, et = tl.exp2(ds * c), tl.exp2(dt * c)
        sum_s += tl.sum(es, 1)
        sum_t += tl.sum(et, 1)
        cold += tl.sum(tl.exp2(ds * LOG2_E), 1)
        heat_s += tl.sum(tl.where(es == 0, 0.0, es * (ds * c)), 1)
        heat_t += tl.sum(tl.where(et == 0, 0.0, et * (dt * c)), 1)
    sum_s, sum_t, heat_s, heat_t = tl.reduce((sum_s, sum_t, heat_s, heat_t), 0, add4)
    return sum_s, sum_t, tl.sum(cold, 0), (heat_s, heat_t)
