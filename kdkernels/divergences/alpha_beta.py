"""The alpha-beta divergence and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels.divergences._base import Divergence, Elements, Kernel, parameter, tl

_REMEDY = "below 0.05 float32 loses the digits: use 0, which takes the limit; above 100 its powers overflow"


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] for a = alpha, b = beta (ABKD, arXiv 2505.04560).

    Each of `alpha` and `beta` is 0 or in [0.05, 100]; at 0 the limits below are taken. (1, 0) is forward KL and (0, 1)
    reverse KL (both run as such), (1/2, 1/2) four times the squared Hellinger distance, (1, 1) half the squared L2
    distance.
    """

    name = "alpha_beta"
    alpha: float = parameter(0.2, low=0.05, high=100, or_zero=True, remedy=_REMEDY)
    beta: float = parameter(0.7, low=0.05, high=100, or_zero=True, remedy=_REMEDY)

    def kernel(self) -> Kernel:
        known = {(1.0, 0.0): Kernel("forward_kl"), (0.0, 1.0): Kernel("reverse_kl")}
        limit = ("" if self.alpha else "_a0") + ("" if self.beta else "_b0")
        return known.get((self.alpha, self.beta), Kernel(self.name + limit, self.alpha, self.beta))

    # With t = log q - log p and w = (at if q > p else -bt), the three powers are e = max(p, q)^(a+b), e e^-|(a+b)t| and
    # p^a q^b = e e^-w: a rounding error of the large logarithms is common to all three and keeps their balance.

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        s = a + b
        t = lq - lp
        e = tl.exp(s * tl.maximum(lp, lq))
        minor = tl.exp(-tl.abs(s * t))
        w = tl.maximum(a * t, -(b * t))
        mixed = tl.exp(-w)
        few = w * (1.0 - w * (1 / 2 - w * (1 / 6 - w * (1 / 24 - w * (1 / 120 - w * (1 / 720))))))
        lost = tl.where(tl.near(w), few, 1.0 - mixed)  # 1 - e^-w: a small a or b would lose its digits
        far = e * (s * lost - tl.where(lq > lp, a * (1.0 - minor), b * (1.0 - minor))) * (1.0 / (a * b * s))
        # (a e^(-bt) + b e^(at) - s) / (abs), whose Taylor series divides by nothing
        c3 = (a - b) / 6.0
        c4 = (a * a - a * b + b * b) / 24.0
        c5 = (a - b) * (a * a + b * b) / 120.0
        c6 = (a * a * a * (a - b) + a * a * b * b - b * b * b * (a - b)) / 720.0
        series = 0.5 + t * (c3 + t * (c4 + t * (c5 + t * c6)))
        return tl.where(tl.near(s * t), e * mixed * (t * t) * series, far)

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        s = a + b
        t = lq - lp
        e = tl.exp(s * tl.maximum(lp, lq))
        minor = tl.exp(-tl.abs(s * t))
        mixed = tl.exp(-tl.maximum(a * t, -(b * t)))
        far = e * (tl.where(lq > lp, 1.0, minor) - mixed) * (1.0 / a)
        u = a * t
        series = 1.0 + u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720)))))
        return tl.where(tl.near(s * t), e * mixed * t * series, far)  # p^a q^b (e^(at) - 1) / a


class AlphaBetaB0(Elements):
    """b = 0: 1/a^2 sum [p^a log(p^a / q^a) - p^a + q^a]."""

    name = "alpha_beta_b0"

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        pa = tl.exp(a * lp)
        qa = tl.exp(a * lq)
        return tl.kl(pa, qa, a * (lp - lq)) * (1.0 / (a * a))

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        pa = tl.exp(a * lp)
        qa = tl.exp(a * lq)
        u = a * (lq - lp)
        series = 1.0 + u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720)))))
        return tl.where(tl.near(u), pa * (lq - lp) * series, (qa - pa) * (1.0 / a))  # p^a (e^u - 1) / a


class AlphaBetaA0(Elements):
    """a = 0: 1/b^2 sum [q^b log(q^b / p^b) - q^b + p^b]."""

    name = "alpha_beta_a0"

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        pb = tl.exp(b * lp)
        qb = tl.exp(b * lq)
        return tl.kl(qb, pb, b * (lq - lp)) * (1.0 / (b * b))

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        qb = tl.exp(b * lq)
        return qb * (lq - lp)


class AlphaBetaA0B0(Elements):
    """a = b = 0: 1/2 sum (log p - log q)^2."""

    name = "alpha_beta_a0_b0"

    @staticmethod
    def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        t = lq - lp
        return 0.5 * t * t

    @staticmethod
    def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        return lq - lp
