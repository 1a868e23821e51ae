"""The gate on vocabulary shards, from what sharded losses, selection and draws are made of.

The divergence is the sharded loss `kdkernels.JSD`; the token comes from the speaker's shards as `kdkernels.compress`
draws or selects. Under top-p without top-k every rank sees all of the speaker's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backends, eager_gate, shard_agreement
from kdkernels.collectives import Ranks
from kdkernels.compression import shards
from kdkernels.divergences.jsd import JSD
from kdkernels.eager_topk import invert
from kdkernels.logits import LinearLogits
from kdkernels.losses import distillation_loss
from kdkernels.ops.gate import Sampling, SwitchDecision
from kdkernels.shard_columns import Columns, columns_of


class Call(NamedTuple):
    """What this rank makes of its arguments; both sides are its columns."""

    student: Tensor | LinearLogits
    teacher: Tensor | LinearLogits
    threshold: Tensor
    sampling: Sampling
    vocab_size: int | None
    backend: str

    @property
    def dtype(self) -> torch.dtype:
        """In which the two are compared."""
        return torch.promote_types(self.student.dtype, self.teacher.dtype)

    @property
    def whole(self) -> bool:
        """Whether every entry may be drawn."""
        sampling = self.sampling
        return sampling.uniforms is not None and not sampling.top_k and sampling.top_p == 1


def agree(
    group: object | None, student: Any, teacher: Any, threshold: float | Tensor, prepare: Callable[[], Call]
) -> tuple[Call, Columns, Ranks]:
    """The call that ``prepare`` makes, this rank's columns, and the ranks.

    Where a rank's arguments are wrong or differ, an error on all.
    """

    def prepared() -> tuple[Call, dict[str, Any], tuple[int, int]]:
        call = prepare()
        call = call._replace(backend=_serving(call))
        page = {f"student {name}": value for name, value in shard_agreement.form_of(call.student).items()}
        page |= {f"teacher {name}": value for name, value in shard_agreement.form_of(call.teacher).items()}
        page["threshold"] = shard_agreement.digest(call.threshold) if isinstance(threshold, Tensor) else threshold
        page |= {name: getattr(call.sampling, name) for name in ("temperature", "top_k", "top_p")}
        page["do_sample"] = call.sampling.uniforms is not None
        page |= {"vocab_size": call.vocab_size, "backend": call.backend}
        return call, page, (call.student.shape[-1], call.teacher.shape[-1])

    ranks = shard_agreement.ranks_of(group, student, teacher)
    call, columns = shard_agreement.agreed(ranks, student, prepared)
    pages = [{"columns": of_rank} for of_rank in columns]
    return call, columns_of(pages, ranks.rank, call.vocab_size), ranks


def _serving(call: Call) -> str:
    kernel = backends.DRAWS if call.whole else backends.SELECTION
    return backends.choose(call.backend, call.student.device, call.dtype, kernel)


def decide(call: Call, columns: Columns, group: Any) -> SwitchDecision:
    """The same answer on every rank of ``group``; see `kdkernels.ops.gate.gate_rows_`."""
    zs, zt = (_logits(side)[:, : columns.local].to(call.dtype) for side in (call.student, call.teacher))
    jsd = distillation_loss(zs, zt, JSD(0.5), group=group, reduction="none")
    jsd = (jsd / math.log(2)).clamp(0.0, 1.0)  # NaN stays
    bad = jsd.isnan() | call.threshold.isnan()
    jsd = torch.where(bad, torch.nan, jsd)
    from_teacher = jsd > call.threshold
    speaker = torch.where(bad[:, None], 0.0, torch.where(from_teacher[:, None], zt, zs))
    share = shards.Share(columns.whole, columns.offset, columns.local, group)
    return SwitchDecision(torch.where(bad, -1, _token(call, speaker, share)), from_teacher, jsd)


def _logits(side: Tensor | LinearLogits) -> Tensor:
    return side.materialize() if isinstance(side, LinearLogits) else side


def _token(call: Call, z: Tensor, share: shards.Share) -> Tensor:
    sampling = call.sampling
    part = shards.part_of(z, share, sampling.temperature, call.backend, None)
    if sampling.uniforms is None:
        return part.largest(1, [], False).ids[:, 0].long()
    uniforms = shards.of_first_rank(sampling.uniforms[:, None].clone(), share.group)
    if call.whole:
        return part.drawn_at(uniforms)[:, 0].long()
    kept = part.largest(min(sampling.top_k or share.vocab, share.vocab), [], False)
    mass = kept.log_probs.double().exp()
    stays = eager_gate.kept(kept.log_probs, mass, 0, sampling.top_p)
    place = invert(torch.where(stays, mass, 0.0), uniforms)
    token = kept.ids.gather(-1, place.clamp(min=0))
    return torch.where(place >= 0, token, -1)[:, 0].long()
