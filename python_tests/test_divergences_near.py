"""Near convergence: what float32 keeps of a loss of 1e-4 to 1e-7 nats.

Worst relative error of a row's loss, as measured here against float64 on the same logits (vocabularies 301 and 32000,
16 rows, 3 seeds), and that of the plain sum of p (log p - log q) in float32:

    nats                    1e-4    1e-5    1e-6    1e-7
    forward_kl              1e-5    4e-5    1e-4    3e-4
    reverse_kl              1e-5    4e-5    1e-4    3e-4
    jsd(.1), (.5), (.9)     5e-6    2e-5    4e-5    2e-4
    skew_kl(.1), (.9)       1e-5    4e-5    8e-5    4e-4
    skew_reverse_kl         8e-6    3e-5    9e-5    4e-4
    alpha_beta(.2, .7)      1e-5    4e-5    2e-4    6e-4
    alpha_beta(1/2, 0)      8e-5    1e-4    6e-4    2e-3
    alpha_beta(0, 0)        1e-3    3e-3    1e-2    7e-2
    plain forward KL        5e-3    4e-2    5e-1    5e+0

alpha_beta with a + b far below 1 weighs improbable tokens like probable ones: there the rounding of float32
log-probabilities themselves (5e-7 at -11) is what remains, in the gradient as well.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.divergences import JSD, AlphaBeta, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL

KL_LIKE = [
    ForwardKL(),
    ReverseKL(),
    JSD(0.1),
    JSD(0.5),
    JSD(0.9),
    SkewKL(0.1),
    SkewKL(0.9),
    SkewReverseKL(0.1),
    SkewReverseKL(0.9),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.5, 0.5),
    AlphaBeta(1.0, 1.0),
]


def log_probs(z: Tensor) -> Tensor:
    """Log-softmax in the dtype of z with the normaliser kept as (max, log-sum), as every backend has it."""
    z = z - z.amax(-1, keepdim=True)
    return z - z.exp().sum(-1, keepdim=True).log()


def close_rows(divergence: Divergence, nats: float, vocab: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Float32 logits (teacher, student) [16, vocab] whose divergence is close to `nats` in every row."""
    kernel = divergence.kernel()
    generator = torch.Generator().manual_seed(seed)
    zt, noise = torch.randn(2, 16, vocab, generator=generator) * torch.tensor([scale, 1.0])[:, None, None]
    term = divergences.elements(kernel.name).term
    lp, lq = (z.double().log_softmax(-1) for z in (zt, zt + 1e-3 * noise))
    step = 1e-3 * (nats / term(lp, lq, kernel.a, kernel.b).sum(-1)).sqrt()  # D grows with the square of the step
    return zt, zt + step.float()[:, None] * noise


def relative_error(divergence: Divergence, zt: Tensor, zs: Tensor) -> float:
    kernel = divergence.kernel()
    term = divergences.elements(kernel.name).term
    exact = term(zt.double().log_softmax(-1), zs.double().log_softmax(-1), kernel.a, kernel.b).sum(-1)
    found = term(log_probs(zt), log_probs(zs), kernel.a, kernel.b).sum(-1)
    return float(((found - exact) / exact).abs().max())


@pytest.mark.parametrize(("vocab", "scale"), [(301, 3.0), (32000, 1.0)])
@pytest.mark.parametrize("nats", [1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("divergence", KL_LIKE, ids=repr)
def test_three_digits_of_a_small_loss(divergence, nats, vocab, scale):
    for seed in range(3):
        assert relative_error(divergence, *close_rows(divergence, nats, vocab, scale, seed)) < 1e-3


def test_the_plain_sum_has_no_digits_left():
    """The reason for `tl.kl`: at 1e-7 nats the textbook sum is mostly rounding error."""
    zt, zs = close_rows(ForwardKL(), 1e-7, 301, 3.0, seed=0)
    lp, lq = log_probs(zt), log_probs(zs)
    exact = divergences.elements("forward_kl").term(lp.double(), lq.double(), 0.0, 0.0).sum(-1)
    assert float((((lp.exp() * (lp - lq)).sum(-1) - exact) / exact).abs().max()) > 0.1


@pytest.mark.parametrize(("divergence", "at_1e5"), [(AlphaBeta(0.5, 0.0), 2e-4), (AlphaBeta(0.0, 0.0), 1e-2)], ids=repr)
def test_what_remains_where_improbable_tokens_weigh(divergence, at_1e5):
    assert relative_error(divergence, *close_rows(divergence, 1e-5, 301, 3.0, seed=0)) < at_1e5
