"""Forward Kullback-Leibler divergence, KL(teacher || student)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels.divergences._base import Divergence, tl


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """sum p (log p - log q): the student must cover everything the teacher does (Hinton 2015, arXiv 1503.02531)."""

    name = "forward_kl"

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        return tl.kl(p, q, lp - lq)

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        return q - p

    @staticmethod
    def excess(a: float, b: float) -> float:
        return 1.0
