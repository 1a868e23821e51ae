"""Reverse Kullback-Leibler divergence, KL(student || teacher)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels.divergences._base import Divergence, tl


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """sum q (log q - log p): the student may choose among the teacher's modes (MiniLLM, arXiv 2306.08543)."""

    name = "reverse_kl"

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        return tl.kl(q, p, lq - lp)

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        q = tl.exp(lq)
        return q * (lq - lp)

    @staticmethod
    def excess(a: float, b: float) -> float:
        return -1.0
