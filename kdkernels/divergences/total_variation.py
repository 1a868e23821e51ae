"""Total variation distance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels.divergences._base import Divergence, tl


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """1/2 sum |p - q|, in [0, 1] (f-distill, arXiv 2307.15190). The gradient jumps at p = q, where it is 0."""

    name = "total_variation"

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        return 0.5 * tl.abs(p - q)

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        q = tl.exp(lq)
        half = 0.5 * q
        return tl.where(lq > lp, half, tl.where(lq < lp, -half, 0.0 * q))
