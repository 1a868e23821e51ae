"""The element language, spoken by torch: the few names a divergence's `term` and `grad` may use.

The same names exist as Triton device functions (`kdkernels/triton/element.py`) and as C++ functions `kd_exp`, `kd_log`,
... (printed by `_emit.py`, supplied by whoever includes the generated header). Beside them an element function may use
`+ - * /`, unary minus, one comparison at a time, numbers, and local names assigned once.

Every function takes and returns tensors of one shape in float32 or float64 (numbers too, where noted) and lets a NaN
through: a row that holds one must show it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 0.25  # |x| below this counts as near 0 in float32
_FLOOR = {torch.float64: -700.0}  # exp's lowest argument; -87 otherwise: e^-87 is the last normal float32


def exp(x: Tensor) -> Tensor:
    """e^x, with x held at -87 from below (-700 in float64): never 0, so a mixture never sees 0/0 or log 0."""
    floor = _FLOOR.get(x.dtype, -87.0)
    return torch.exp(torch.where(x < floor, floor, x))  # max(x, floor) would turn a NaN into the floor


def log(x: Tensor) -> Tensor:
    """Natural logarithm."""
    return torch.log(x)


def abs(x: Tensor) -> Tensor:
    """Absolute value."""
    return torch.abs(x)


def where(condition: Tensor, x: Tensor | float, y: Tensor | float) -> Tensor:
    """`x` where the comparison `condition` holds, else `y`; both are evaluated, either may be a number."""
    return torch.where(condition, x, y)


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """The larger of the two; NaN if either is NaN."""
    return torch.maximum(x, y)


def minimum(x: Tensor, y: Tensor) -> Tensor:
    """The smaller of the two; NaN if either is NaN."""
    return torch.minimum(x, y)


def near(x: Tensor) -> Tensor:
    """The comparison |x| < 1/4 in float32, and nowhere true in float64.

    It guards series that replace a difference of nearly equal numbers: float32 needs them, float64 has digits to spare.
    A series therefore only has to be exact to float32's 6e-8 for |x| < 1/4.
    """
    return torch.abs(x) < (0.0 if x.dtype == torch.float64 else NEAR)


def kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """`p d - p + q` for `d = log p - log q`: one entry of a Kullback-Leibler sum, never negative.

    Over two distributions it sums to KL(p || q), as `sum p = sum q`. Entry by entry it is `p (d - 1 + e^-d)`, about
    `p d^2 / 2`: near p = q the bare `p d` cancels against its neighbours (fp32 keeps no digit of a KL of 1e-7).
    """
    small = near(d)
    x = torch.where(small, d, 0.0)  # keeps the unused side finite for autograd
    series = 1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040)))))
    return torch.where(small, p * x * x * series, p * (d - 1) + q)
