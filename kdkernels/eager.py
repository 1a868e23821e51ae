"""The readable definition of the row function, in plain torch: any device, any dtype.

Low-precision logits are computed in float32; the only rounding is at the store of the gradient. It makes a handful of
``[C, V]`` temporaries, which is what the other backends exist to avoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.logits import transform

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.weights import RowWeights

MASKED = -1e4
"""Log-probability that stands for the -inf of a masked entry: its cost is large and finite."""

HOPELESS = -1e20
"""Below, a log-probability is a mask as well, written as finfo.min: 1e-38, the smallest exp, times it is a number."""


def divergence_rows_(
    student: Side,
    teacher: Side,
    weights: RowWeights,
    spec: RowSpec,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fill ``loss [C]``, ``dlogits [C, >= vocab]`` and ``stats [C, 6]``; see `kdkernels.ops.rows`."""
    kd = weights.kd
    ce = torch.zeros_like(kd) if weights.ce is None else weights.ce
    counts = (kd != 0) | (ce != 0)
    zs, zt = _logits(student, spec.vocab), _logits(teacher, spec.vocab)
    lq, lp = _log_probs(zs, spec.temperature), _log_probs(zt, spec.temperature)
    lq1 = lq if spec.temperature == 1 else _log_probs(zs, 1.0)
    divergence, gradient = _divergence(lp, lq, spec)
    nll, onehot = _cross_entropy(lq1, weights.labels, ce != 0)
    bad = (_bad_rows(zs) | _bad_rows(zt)) & counts
    loss.copy_(torch.where(bad, torch.nan, _gated(kd, divergence) + _gated(ce, nll)))
    if stats is not None:  # before the gradient, which may overwrite the logits
        rows = _statistics(zs, zt, lp, lq, divergence, nll, weights.labels)
        stats.copy_(torch.where(counts[:, None], torch.where(bad[:, None], torch.nan, rows), 0.0))
    if dlogits is not None:
        dz = _gated(kd[:, None], gradient / spec.temperature)
        dz = dz + _gated(ce[:, None], lq1.exp() - onehot + (nll * 0)[:, None])  # a label out of range: NaN
        dz = torch.where(bad[:, None], torch.nan, dz * _chain(student, zs))
        dlogits[:, : spec.vocab] = torch.where(counts[:, None], dz, 0.0)
        dlogits[:, spec.vocab :] = 0


def _logits(side: Side, vocab: int) -> Tensor:
    x = side.x[:, :vocab]
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return transform(x, side.bias, side.scale, side.softcap)


def _log_probs(z: Tensor, temperature: float) -> Tensor:
    """Log-softmax of z / T with the normaliser kept as the pair (max, log-sum): one fused number would cost digits, as
    would dividing before the maximum is gone (logits of 8192 at T = 0.7 lose 5e-4 nats)."""
    z = (z - z.amax(-1, keepdim=True)) / temperature
    return z - z.exp().sum(-1, keepdim=True).log()


def _mended(log_probs: Tensor) -> Tensor:
    return torch.where(log_probs < HOPELESS, MASKED, log_probs)  # NaN compares false and stays


def _bad_rows(z: Tensor) -> Tensor:
    """Rows with NaN, +inf, or nothing but -inf."""
    return ~torch.isfinite(z.amax(-1))


def _gated(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value``, where a weight of 0 wins over NaN and infinity."""
    return torch.where(weight == 0, 0.0, weight * value)


def _divergence(lp: Tensor, lq: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """D ``[C]`` and its gradient with respect to the scaled logits ``[C, V]``."""
    lp, lq = _mended(lp), _mended(lq)
    if spec.kernel == "adaptive_kl":
        return _adaptive_kl(lp, lq, spec.a)
    elements = divergences.elements(spec.kernel)
    divergence = elements.term(lp, lq, spec.a, spec.b).sum(-1)
    grad = elements.grad(lp, lq, spec.a, spec.b)
    return divergence, grad - lq.exp() * grad.sum(-1, keepdim=True)


def _adaptive_kl(lp: Tensor, lq: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL mixed by the distance |p - q| in the teacher's head and tail (arXiv 2404.02657)."""
    forward, d_forward = _named("forward_kl", lp, lq)
    reverse, d_reverse = _named("reverse_kl", lp, lq)
    p, q = lp.exp(), lq.exp()
    # stable: equal probabilities enter the head by lower id
    order = p.sort(dim=-1, descending=True, stable=True).indices
    mass = p.gather(-1, order).to(torch.float64).cumsum(-1)
    in_head = torch.zeros_like(p, dtype=torch.bool)
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), -1)
    in_head.scatter_(-1, order, before < mu * mass[:, -1:])
    distance = (p - q).abs()
    head = torch.where(in_head, distance, 0.0).sum(-1)
    tail = torch.where(in_head, 0.0, distance).sum(-1)
    total = head + tail
    w = torch.where(total == 0, 0.0, head / total)
    return w * forward + (1 - w) * reverse, w[:, None] * d_forward + (1 - w)[:, None] * d_reverse


def _named(kernel: str, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    elements = divergences.elements(kernel)
    grad = elements.grad(lp, lq, 0.0, 0.0)
    return elements.term(lp, lq, 0.0, 0.0).sum(-1), grad - lq.exp() * grad.sum(-1, keepdim=True)


def _cross_entropy(lq1: Tensor, labels: Tensor | None, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of the label ``[C]`` (0 without one, NaN where a wanted label is out of range) and its one-hot."""
    if labels is None:
        return lq1.new_zeros(lq1.shape[0]), torch.zeros_like(lq1)
    legal = (labels >= 0) & (labels < lq1.shape[1])
    index = torch.where(legal, labels, 0)[:, None]
    nll = -_mended(lq1).gather(-1, index)[:, 0]
    onehot = torch.zeros_like(lq1).scatter_(-1, index, legal[:, None].to(lq1.dtype))
    return torch.where(legal, nll, torch.where(wanted, torch.nan, 0.0)), onehot


def _chain(side: Side, z: Tensor) -> Tensor | float:
    """dz/dx of the student's stored numbers."""
    return side.scale if side.softcap == 0 else side.scale * (1 - (z / side.softcap) ** 2)


def _statistics(
    zs: Tensor, zt: Tensor, lp: Tensor, lq: Tensor, divergence: Tensor, nll: Tensor, labels: Tensor | None
) -> Tensor:
    def entropy(l: Tensor) -> Tensor:
        return -torch.where(l == -torch.inf, 0.0, l.exp() * l).sum(-1)

    top = zs.argmax(-1)
    agree = top == zt.argmax(-1)
    correct = torch.zeros_like(agree) if labels is None else top == labels
    columns = divergence, entropy(lp), entropy(lq), agree, nll, correct
    return torch.stack([c.to(divergence.dtype) for c in columns], -1)
