"""The readable definition of the SWITCH gate, in plain torch: any device, any dtype.

Divergence and masses are float64 whatever the logits are. It makes a dozen ``[B, V]`` temporaries and, for top-k and
top-p, sorts whole rows, which is what the other backends exist to avoid.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels.eager import _bad_rows, _logits
from kdkernels.eager_topk import invert

if TYPE_CHECKING:
    from kdkernels.ops.gate import Sampling, SwitchDecision
    from kdkernels.ops.rows import Side


def gate_rows_(
    student: Side, teacher: Side, threshold: Tensor, sampling: Sampling, vocab: int, out: SwitchDecision
) -> None:
    """Fill ``out``; see `kdkernels.ops.gate.gate_rows_`."""
    zs, zt = _logits(student, vocab).double(), _logits(teacher, vocab).double()
    bad = _bad_rows(zs) | _bad_rows(zt) | threshold.isnan()
    zs, zt = (torch.where(bad[:, None], 0.0, z) for z in (zs, zt))
    out.jsd.copy_(torch.where(bad, torch.nan, jsd_bits(zs, zt)))
    torch.gt(out.jsd, threshold, out=out.from_teacher)  # NaN > anything is false
    z = torch.where(out.from_teacher[:, None], zt, zs)
    out.token.copy_(torch.where(bad, -1, _token(z, sampling)))


def jsd_bits(zs: Tensor, zt: Tensor) -> Tensor:
    """Jensen-Shannon divergence ``[B]`` of softmax(zs) and softmax(zt) ``[B, V]``, in bits, in [0, 1]."""
    lq, lp = torch.log_softmax(zs, -1), torch.log_softmax(zt, -1)
    lm = torch.logaddexp(lp, lq) - math.log(2)
    halves = (0.5 * torch.where(lx == -torch.inf, 0.0, lx.exp() * (lx - lm)) for lx in (lp, lq))
    return (sum(halves).sum(-1) / math.log(2)).clamp(0.0, 1.0)  # type: ignore[union-attr]


def _token(z: Tensor, sampling: Sampling) -> Tensor:
    if sampling.uniforms is None:
        return (z == z.amax(-1, keepdim=True)).long().argmax(-1)  # of equal ones the first: argmax of z promises none
    mass = ((z - z.amax(-1, keepdim=True)) / sampling.temperature).exp()
    if sampling.top_k or sampling.top_p < 1:
        mass = torch.where(kept(z, mass, sampling.top_k, sampling.top_p), mass, 0.0)
    return invert(mass, sampling.uniforms[:, None])[:, 0]


def kept(z: Tensor, mass: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which entries of rows ``z [B, V]`` may be drawn: the ``top_k`` most likely (0: all), and of these the fewest
    most likely ones whose mass reaches the share ``top_p`` of theirs. Of equal entries the lower ids stay."""
    order = z.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(z.shape[-1], device=z.device)
    sorted_mass = mass.gather(-1, order)
    if top_k:
        sorted_mass = torch.where(rank < top_k, sorted_mass, 0.0)
    stays = (rank < top_k) if top_k else torch.ones_like(rank, dtype=torch.bool)
    stays = stays.expand(z.shape)
    if top_p < 1:
        before = sorted_mass.cumsum(-1) - sorted_mass
        stays = stays & (before < top_p * sorted_mass.sum(-1, keepdim=True))
    return torch.zeros_like(stays).scatter(-1, order, stays)
