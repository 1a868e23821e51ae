"""The gate on vocabulary shards, from what sharded losses, selection and draws are made of.

The divergence is the sharded loss `kdkernels.JSD`; the token comes from the speaker's shards as `kdkernels.compress`
draws or selects. Under top-p without top-k every rank sees all of the speaker's logits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels import backends, eager_gate
from kdkernels.compression import shards
from kdkernels.divergences.jsd import JSD
from kdkernels.eager_topk import invert
from kdkernels.logits import LinearLogits
from kdkernels.losses import distillation_loss
from kdkernels.ops.gate import Sampling, SwitchDecision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def decide(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits,
    threshold: Tensor,
    sampling: Sampling,
    vocab_size: int | None,
    group: ProcessGroup | DeviceMesh,
    backend: str,
) -> SwitchDecision:
    """The same answer on every rank of ``group``; see `kdkernels.ops.gate.gate_rows_`."""
    zs, zt = _logits(student), _logits(teacher)
    dtype = torch.promote_types(zs.dtype, zt.dtype)
    zs, zt = zs.to(dtype), zt.to(dtype)
    options: dict[str, Any] = {"vocab_size": vocab_size, "group": group, "reduction": "none"}
    jsd = (distillation_loss(zs, zt, JSD(0.5), **options) / math.log(2)).clamp(0.0, 1.0)  # NaN stays
    bad = jsd.isnan() | threshold.isnan()
    jsd = torch.where(bad, torch.nan, jsd)
    from_teacher = jsd > threshold
    speaker = torch.where(bad[:, None], 0.0, torch.where(from_teacher[:, None], zt, zs))
    token = _token(speaker, sampling, vocab_size, group, backend)
    return SwitchDecision(torch.where(bad, -1, token), from_teacher, jsd)


def _logits(side: Tensor | LinearLogits) -> Tensor:
    return side.materialize() if isinstance(side, LinearLogits) else side


def _token(z: Tensor, sampling: Sampling, vocab_size: int | None, group: Any, backend: str) -> Tensor:
    share = shards.Share.of(z, vocab_size, group, sampling.top_k, 0, 0, sampling.uniforms is None)
    whole = sampling.uniforms is not None and not sampling.top_k and sampling.top_p == 1
    kernel = backends.DRAWS if whole else backends.SELECTION
    serving = backends.choose(backend, z.device, z.dtype, kernel)
    part = shards.part_of(z, share, sampling.temperature, serving, None)
    if sampling.uniforms is None:
        return part.largest(1, [], False).ids[:, 0].long()
    uniforms = shards.of_first_rank(sampling.uniforms[:, None].clone(), share.group)
    if whole:
        return part.drawn_at(uniforms)[:, 0].long()
    kept = part.largest(min(sampling.top_k or share.vocab, share.vocab), [], False)
    mass = kept.log_probs.double().exp()
    stays = eager_gate.kept(kept.log_probs, mass, 0, sampling.top_p)
    place = invert(torch.where(stays, mass, 0.0), uniforms)
    token = kept.ids.gather(-1, place.clamp(min=0))
    return torch.where(place >= 0, token, -1)[:, 0].long()
