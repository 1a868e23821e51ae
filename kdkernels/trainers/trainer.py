"""`DistillationTrainer`: the mixin over transformers' own Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdkernels.optional import need
from kdkernels.trainers.hf import DistillationMixin

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = need("transformers", "DistillationTrainer").Trainer


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` with the fused distillation loss; arguments as in `DistillationMixin`."""
