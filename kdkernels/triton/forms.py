"""Divergences on rows without masked entries, in fewer instructions than their element functions; see `FORMS`.

A form is three functions: ``term(lp, lq, a, b)``, ``grad(lp, lq, a, b)`` for the sum of grad, and
``weighed(lp, lq, a, b, k)``, grad times k, for the gradient. What depends on a, b and k alone is computed once a row.

Powers, for the alpha-beta divergence: with t = lq - lp and the mixed power m = p^a q^b every sum has the factor m: term
= m (e^(-bt) / (b s) + e^(at) / (a s) - 1 / (a b)) with s = a + b, grad = m (e^(at) - 1) / a; for b = 0 term =
m (e^(at) - 1 - at) / a^2. Near t = 0 stand their Taylor series. A rounding error of m's exponent is common to a whole
term and keeps its balance. They hold where |t| max(a, b) < `FURTHEST`: no exponential overflows and none vanishes that
matters. If b > 0, the sum of grad does without the series: should all entries err alike, by 2^-22 m / a, the sum of m,
at most V^(1 - s), keeps that small for s near 1.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdkernels.triton.quick import exp, log
from kdkernels.triton.rows import LOG2_E

ELEMENT = tl.constexpr(0)
"""Kind of a kernel's quick functions: element functions."""
FORM = tl.constexpr(1)
"""A form."""
POWERS = tl.constexpr(2)
"""A form that holds for log-ratios that are not too large."""
NEAR = tl.constexpr(0.1875)
"""Of |t| max(a, b): below, the series are exact to 4e-7."""
FURTHEST = tl.constexpr(80.0)


@triton.jit
def jsd_term(lp, lq, a, b):
    p, q = a * exp(lp), (1.0 - a) * exp(lq)
    m = p + q
    lm = log(m)
    t = lq - lp
    c, s = a * (1.0 - a), 2.0 * a - 1.0
    c6 = (1.0 - 30.0 * c + 120.0 * c * c) / 144.0
    series = tl.fma(t, c * c6, c * (s * (1.0 - 12.0 * c) / 30.0))
    series = tl.fma(t, tl.fma(t, tl.fma(t, series, c * ((1.0 - 6.0 * c) / 8.0)), c * (s / 3.0)), 0.5 * c)
    return tl.where(t * t < 0.0625, m * (t * t) * series, tl.fma(q, lq - lm, p * (lp - lm)))


@triton.jit
def jsd_grad(lp, lq, a, b):
    p, q = a * exp(lp), (1.0 - a) * exp(lq)
    return q * (lq - log(p + q))


@triton.jit
def jsd_weighed(lp, lq, a, b, k):
    q = exp(lq)
    return q * (((1.0 - a) * k) * (lq - log(tl.fma(exp(lp), a, (1.0 - a) * q))))


@triton.jit
def mixed_power(lp, lq, a, b):
    return tl.exp2(tl.fma(lp, a * LOG2_E, lq * (b * LOG2_E)))


@triton.jit
def is_near(t, a, b):
    limit = NEAR / tl.maximum(a, b)
    return t * t < limit * limit


@triton.jit
def lost_power(t, a, k):
    """k (e^(at) - 1) / a, without care for t near 0."""
    return tl.fma(tl.exp2(t * (a * LOG2_E)), k / a, -k / a)


@triton.jit
def kept_power(t, a, b, k):
    """k (e^(at) - 1) / a."""
    series = tl.fma(t, tl.fma(t, a * a * a * a / 120.0 * k, a * a * a / 24.0 * k), a * a / 6.0 * k)
    return tl.where(is_near(t, a, b), t * tl.fma(t, tl.fma(t, series, a / 2.0 * k), k), lost_power(t, a, k))


@triton.jit
def powers_term(lp, lq, a, b):
    t = lq - lp
    s = a + b
    forth, back = 1.0 / (a * s), 1.0 / (b * s)
    far = tl.fma(tl.exp2(t * (a * LOG2_E)), forth, tl.fma(tl.exp2(t * (-b * LOG2_E)), back, -(forth + back)))
    c3, c4, c5 = (a - b) / 6.0, (a * a - a * b + b * b) / 24.0, (a - b) * (a * a + b * b) / 120.0
    near = t * t * tl.fma(t, tl.fma(t, tl.fma(t, c5, c4), c3), 0.5)
    return mixed_power(lp, lq, a, b) * tl.where(is_near(t, a, b), near, far)


@triton.jit
def powers_grad(lp, lq, a, b):
    return mixed_power(lp, lq, a, b) * lost_power(lq - lp, a, 1.0)


@triton.jit
def powers_weighed(lp, lq, a, b, k):
    return mixed_power(lp, lq, a, b) * kept_power(lq - lp, a, b, k)


@triton.jit
def second_order(t, a):
    """(e^(at) - 1 - at) / a^2."""
    scale = 1.0 / (a * a)
    far = tl.fma(tl.exp2(t * (a * LOG2_E)), scale, tl.fma(t, -1.0 / a, -scale))
    near = t * t * tl.fma(t, tl.fma(t, tl.fma(t, a * a * a / 120.0, a * a / 24.0), a / 6.0), 0.5)
    return tl.where(is_near(t, a, 0.0), near, far)


@triton.jit
def powers_b0_term(lp, lq, a, b):
    return tl.exp2(lp * (a * LOG2_E)) * second_order(lq - lp, a)


@triton.jit
def powers_b0_grad(lp, lq, a, b):
    t = lq - lp
    first = tl.where(is_near(t, a, 0.0), tl.fma(second_order(t, a), a, t), lost_power(t, a, 1.0))
    return tl.exp2(lp * (a * LOG2_E)) * first


@triton.jit
def powers_b0_weighed(lp, lq, a, b, k):
    return tl.exp2(lp * (a * LOG2_E)) * kept_power(lq - lp, a, 0.0, k)


class Form(NamedTuple):
    """The functions of a form, and its kind."""

    term: Any
    grad: Any
    weighed: Any
    kind: int


FORMS = {
    "jsd": Form(jsd_term, jsd_grad, jsd_weighed, 1),
    "alpha_beta": Form(powers_term, powers_grad, powers_weighed, 2),
    "alpha_beta_b0": Form(powers_b0_term, powers_b0_grad, powers_b0_weighed, 2),
}


def find(kernel: str, a: float, b: float) -> Form | None:
    """The form of an element function with these parameters, if there is one. Powers need a and b of at least 0.2, as
    1 / (a b) magnifies the error of an exponential, 2^-22; a + b of at most 1, or m could vanish alone; and, if b > 0,
    of at least 0.8, or the sum of m is large."""
    least = {"jsd": True, "alpha_beta": min(a, b) >= 0.2 and a + b >= 0.8, "alpha_beta_b0": a >= 0.2}
    most = kernel == "jsd" or a + b <= 1 + 1e-6
    return FORMS[kernel] if least.get(kernel, False) and most else None
