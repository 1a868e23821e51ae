"""Generalised Jensen-Shannon divergence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels.divergences._base import Divergence, Kernel, parameter, tl


@dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    `beta` lies in [0, 1]. For 0 < beta < 1 this is the definition, which goes to 0 at both ends. Exactly 0 and exactly
    1 are taken as in TRL's GKDTrainer: forward KL and reverse KL, the limits of JSD / beta and JSD / (1 - beta), so the
    scale jumps there.
    """

    name = "jsd"
    beta: float = parameter(
        0.5, low=0, high=1, remedy="beta weighs the teacher in the mixture; 0.5 is the symmetric choice"
    )

    def kernel(self) -> Kernel:
        limits = {0.0: Kernel("forward_kl"), 1.0: Kernel("reverse_kl")}
        return limits.get(self.beta, Kernel(self.name, self.beta))

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        m = q + a * (p - q)  # never below both, unlike a p + (1 - a) q, whose products can leave the normal range
        lm = tl.log(m)
        far = a * p * (lp - lm) + (1.0 - a) * q * (lq - lm)
        # With t = log q - log p, term / m = t K'(t) - K(t) for K(t) = log(a + (1 - a) e^t), the sum over k >= 2 of
        # (k - 1) / k! c_k t^k with c_k the cumulants of a coin of variance c: up to k = 6, exact to float32 where near.
        t = lq - lp
        c = a * (1.0 - a)
        s = 2.0 * a - 1.0
        c3 = s / 3.0
        c4 = (1.0 - 6.0 * c) / 8.0
        c5 = s * (1.0 - 12.0 * c) / 30.0
        c6 = (1.0 - 30.0 * c + 120.0 * c * c) / 144.0
        series = 0.5 + t * (c3 + t * (c4 + t * (c5 + t * c6)))
        return tl.where(tl.near(t), c * m * (t * t) * series, far)

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        p = tl.exp(lp)
        q = tl.exp(lq)
        m = q + a * (p - q)
        lm = tl.log(m)
        return (1.0 - a) * q * (lq - lm)
