"""Skewed forward KL."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels.divergences._base import Divergence, Kernel, parameter, tl


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p || m) with m = alpha p + (1 - alpha) q (DistiLLM, arXiv 2402.03898).

    `alpha` lies in [0, 1): 0 is forward KL (and runs as such); at 1, an error, the loss would be KL(p || p) = 0.
    """

    name = "skew_kl"
    alpha: float = parameter(
        0.1, low=0, high=1, open_high=True, remedy="alpha is the teacher's share in the mixture; DistiLLM uses 0.1"
    )

    def kernel(self) -> Kernel:
        return Kernel(self.name, self.alpha) if self.alpha else Kernel("forward_kl")

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        m = q + a * (p - q)
        return tl.kl(p, m, lp - tl.log(m))

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        m = q + a * (p - q)
        return ((1.0 - a) * (a - 1.0)) * (p - q) * (q / m)  # (1 - a) q (1 - p / m)

    @staticmethod
    def excess(a: float, b: float) -> float:
        return 1.0 - a
