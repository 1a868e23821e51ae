"""The sweep that writes a row's gradient; see `rows` for tiles and sides, `sweeps` for what else a sweep takes."""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.element import exp as clamped_exp
from kdkernels.triton.forms import ELEMENT
from kdkernels.triton.rows import FILL, FORWARD, LOG2_E, NOTHING, PLAIN, SHIFTED, head_slope, read, tile, write
from kdkernels.triton.sweeps import borders, log_prob


@triton.jit
def put(
    to, g, z, o, span, at, student, ce, label, cold,
    COLD: tl.constexpr, FORM_S: tl.constexpr, LAYOUT: tl.constexpr, WHOLE_TILE: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the gradient, after the label's share and the chain rule of the student's form."""
    if COLD:
        g += tl.exp2((z - cold[0]) * LOG2_E) * (ce * cold[1])
    if label is not None:  # noqa: SIM102  # known when compiling; the other is not
        if (label >= at) & (label < at + o.shape[0] * o.shape[1]):
            g = tl.where(o == label, g - ce, g)
    if FORM_S != PLAIN:
        g *= head_slope(z, student[2], student[3], FORM_S)
    write(to, o, span, g, LAYOUT, WHOLE_TILE)


@triton.jit
def online_gradient(zs, zt, numbers, CARRY: tl.constexpr):
    """Gradient of forward or reverse KL: ``numbers`` is (c, R of both sides, weights of e^xs and of the rest)."""
    c, r_s, r_t, w_s, w_t = numbers
    xs, xt = tl.fma(zs, c, -r_s), tl.fma(zt, c, -r_t)
    if CARRY == FORWARD:
        return tl.fma(tl.exp2(xs), w_s, tl.exp2(xt) * w_t)
    else:
        return tl.exp2(xs) * tl.fma(xt - xs, w_t, w_s)


@triton.jit
def separable_gradient(zs, zt, numbers, GRAD: tl.constexpr, KIND: tl.constexpr, CAREFUL: tl.constexpr):
    """``grad k + q w``: numbers is (both normalisers, 1 / T, a, b, k, w)."""
    norm_s, norm_t, per_t, a, b, k, w = numbers
    lq, lp = log_prob(zs, norm_s, per_t, CAREFUL), log_prob(zt, norm_t, per_t, CAREFUL)
    q = clamped_exp(lq) if CAREFUL else tl.exp2(lq * LOG2_E)
    if KIND == ELEMENT:
        return tl.fma(q, w, GRAD(lp, lq, a, b) * k)
    else:
        return tl.fma(q, w, GRAD(lp, lq, a, b, k))


@triton.jit
def gradient_tile(
    to, student, teacher, o, at, span, numbers, ce, label, cold,
    GRAD: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr, CAREFUL: tl.constexpr, COLD: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, WHOLE_TILE: tl.constexpr,
):  # fmt: skip
    zs = read(student, o + at, span, FILL, FORM_S, LAYOUT, WHOLE_TILE, True)
    zt = read(teacher, o + at, span, FILL, FORM_T, LAYOUT, WHOLE_TILE, True)
    if CARRY == NOTHING:
        g = separable_gradient(zs, zt, numbers, GRAD, KIND, CAREFUL)
    else:
        g = online_gradient(zs, zt, numbers, CARRY)
    put(to, g, zs, o + at, span, at, student, ce, label, cold, COLD, FORM_S, LAYOUT, WHOLE_TILE)


@triton.jit
def gradient_sweep(
    to, student, teacher, span, numbers, ce, label, cold,
    GRAD: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr, CAREFUL: tl.constexpr, COLD: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Writes the gradient: ``to`` may be the student's address. ``numbers``: see the two gradients; ``ce`` the weight
    of the label's loss, ``label`` its place (None: no labels), ``cold`` the student's top and 1 / sum at temperature 1.
    """
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    head, full = borders(span, CAREFUL, LAYOUT, size, VEC)
    if CARRY == NOTHING:  # the sweep before ended at the row's begin
        if head > 0:
            gradient_tile(to, student, teacher, o, 0, (span[0], tl.minimum(head, span[1])), numbers, ce, label, cold,
                          GRAD, KIND, CARRY, CAREFUL, COLD, FORM_S, FORM_T, LAYOUT, False)  # fmt: skip
        for at in range(head, full, size):
            gradient_tile(to, student, teacher, o, at, span, numbers, ce, label, cold,
                          GRAD, KIND, CARRY, CAREFUL, COLD, FORM_S, FORM_T, LAYOUT, True)  # fmt: skip
    if CAREFUL or (LAYOUT == SHIFTED):
        for at in range(full, span[1], size):
            gradient_tile(to, student, teacher, o, at, span, numbers, ce, label, cold,
                          GRAD, KIND, CARRY, CAREFUL, COLD, FORM_S, FORM_T, LAYOUT, False)  # fmt: skip
    if CARRY != NOTHING:  # ended at the row's end
        for back in range(0, full - head, size):
            gradient_tile(to, student, teacher, o, full - size - back, span, numbers, ce, label, cold,
                          GRAD, KIND, CARRY, CAREFUL, COLD, FORM_S, FORM_T, LAYOUT, True)  # fmt: skip
        if head > 0:
            gradient_tile(to, student, teacher, o, 0, (span[0], tl.minimum(head, span[1])), numbers, ce, label, cold,
                          GRAD, KIND, CARRY, CAREFUL, COLD, FORM_S, FORM_T, LAYOUT, False)  # fmt: skip
