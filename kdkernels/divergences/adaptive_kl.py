"""Adaptive KL: forward and reverse KL, mixed by where each row disagrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kdkernels.divergences._base import Divergence, parameter


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t), the weights taken as constants (AKL, arXiv 2404.02657).

    g_h and g_t are the sums of |p - q| over the teacher's head, the smallest set of most probable tokens with mass
    >= `mu` (equal probabilities enter by lower id), and over the rest. Where p = q the loss is 0. 0 < mu < 1.
    Not separable, as the head depends on the whole row: kernel "adaptive_kl" with a = mu is an op of its own.
    """

    name = "adaptive_kl"
    separable: ClassVar[bool] = False
    mu: float = parameter(
        0.5,
        low=0,
        high=1,
        open_low=True,
        open_high=True,
        remedy="mu is the teacher's mass in the head; the paper uses 0.5",
    )
