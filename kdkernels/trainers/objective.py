"""The loss of a step, built once from the configuration: `kd.distillation_loss` over `LinearLogits`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

import kdkernels as kd
from kdkernels import divergences
from kdkernels.errors import UserError
from kdkernels.trainers.cached import CachedTeacher
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.heads import Head, hidden_states
from kdkernels.trainers.heldout import uniform_teacher


def build_divergence(name: str, parameters: dict[str, float]) -> Any:
    """The divergence `name` with `parameters`; what the registry refuses is a `UserError`."""
    try:
        default = divergences.get(name)
        known = [item.name for item in dataclasses.fields(default)]
        for parameter in parameters:
            if parameter not in known:
                allowed = ", ".join(known) or "none"
                raise UserError(f"divergence_args names {parameter!r}; {name} takes: {allowed}; correct it")
        return dataclasses.replace(default, **parameters) if parameters else default
    except UserError:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(str(error.args[0] if error.args else error)) from error


@dataclass(frozen=True)
class Objective:
    """`__call__` gives the loss of one batch, divided by `items`, and the sums that the log wants."""

    config: DistillConfig
    divergence: Any
    teacher: Any
    student: Any
    teacher_head: Head | None
    student_head: Head
    vocab_size: int | None
    dtype: torch.dtype
    device: torch.device
    cached: CachedTeacher | None = None  # in the place of teacher and teacher_head

    def __call__(
        self, batch: dict[str, torch.Tensor], items: int, kd_weight: float | None = None, ce_weight: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, sums [4] of divergence, nll, top-1 agreement, student entropy over the tokens that count).

        batch: `input_ids`, `position_ids`, `labels` [B, L]. items: the tokens that count in the whole
        accumulated batch. kd_weight, ce_weight: in the place of the configuration's.
        """
        config = self.config
        kd_weight = config.kd_weight if kd_weight is None else kd_weight
        ce_weight = config.ce_weight if ce_weight is None else ce_weight
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = hidden_states(self.student, batch)
        teacher = self._teacher_logits(batch, hidden, kd_weight)
        out = kd.distillation_loss(
            self.student_head.logits(hidden, self.dtype),
            teacher,
            self.divergence,
            temperature=config.temperature,
            temperature_scaling=config.temperature_scaling,
            labels=batch["labels"],
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            shift=True,
            num_items=items,
            vocab_size=self.vocab_size,
            sparse_mode="ghost" if not isinstance(teacher, kd.SparseLogits) else self._mode(),
            backend=config.backend,
            chunk_bytes=max(1, round(config.chunk_mib * 2**20)) if config.chunk_mib else None,
            return_stats=True,
        )
        assert isinstance(out, kd.DistillationOutput)
        stats = out.stats
        parts = (stats.divergence, stats.nll, stats.top1_agreement, stats.student_entropy)
        return out.loss, torch.stack([part.detach().double().sum() for part in parts])

    def _mode(self) -> str:
        assert self.cached is not None
        return self.cached.mode(self.config.sparse_mode)

    def _teacher_logits(
        self, batch: dict[str, torch.Tensor], hidden: torch.Tensor, kd_weight: float
    ) -> kd.LinearLogits | kd.SparseLogits:
        if kd_weight == 0:  # the teacher would be ignored: spare its forward pass
            return uniform_teacher(hidden.detach().to(self.dtype), self.student_head.vocab)
        if self.cached is not None:
            return self.cached.of(batch["input_ids"], self.config.temperature)
        assert self.teacher_head is not None
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.teacher_head.logits(hidden_states(self.teacher, batch), self.dtype)
