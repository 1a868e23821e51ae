"""The element language for blocks whose log-probabilities are all above -87: `exp` is a multiplication and an ex2.

Two instructions an exponential fewer than in `element`, which holds the argument from below. Products of a
log-probability with a parameter may lie lower: their exponentials are then 0, where `element` has 1.6e-38.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

import triton
import triton.language as _language

from kdkernels.triton.element import abs, maximum, minimum, where

__all__ = ["abs", "exp", "kl", "log", "maximum", "minimum", "near", "where"]


@triton.jit
def exp(x):
    """e^x; 0 below -87."""
    return _language.exp2(x * 1.4426950408889634)


@triton.jit
def log(x):
    """Natural logarithm by lg2, to 2^-22 of its value (or absolutely, where x is near 1); x is no denormal."""
    return 0.6931471805599453 * _language.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=_language.float32, is_pure=True, pack=1
    )


@triton.jit
def near(x):
    """|x| < 1/4; the square is at hand where a series follows."""
    return x * x < 0.0625


@triton.jit
def kl(p, q, d):
    """p d - p + q for d = log p - log q; near d = 0 a series, exact to 4e-6."""
    series = 1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120)))
    return _language.where(d * d < 0.03515625, p * (d * d) * series, p * (d - 1.0) + q)
