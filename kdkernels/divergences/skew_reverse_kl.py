"""Skewed reverse KL."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels.divergences._base import Divergence, Kernel, parameter, tl


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || m) with m = (1 - alpha) p + alpha q (DistiLLM, arXiv 2402.03898; SWITCH trains with alpha = 0.1).

    `alpha` lies in [0, 1): 0 is reverse KL (and runs as such); at 1, an error, the loss would be KL(q || q) = 0.
    """

    name = "skew_reverse_kl"
    alpha: float = parameter(
        0.1, low=0, high=1, open_high=True, remedy="alpha is the student's share in the mixture; DistiLLM uses 0.1"
    )

    def kernel(self) -> Kernel:
        return Kernel(self.name, self.alpha) if self.alpha else Kernel("reverse_kl")

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        m = p + a * (q - p)
        return tl.kl(q, m, lq - tl.log(m))

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        m = p + a * (q - p)
        return q * (lq - tl.log(m) - (a * (1.0 - a)) * ((q - p) / m))  # log(q / m) + a (1 - q / m)

    @staticmethod
    def excess(a: float, b: float) -> float:
        return a - 1.0
