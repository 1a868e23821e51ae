"""TRL's on-policy distillation trainer with kdkernels' loss: they generate, this scores.

from trl import DistillationTrainer
class Distill(kd.trainers.TRLDistillationMixin, DistillationTrainer): ...
Distill(student, teacher, args, train_dataset=prompts, processing_class=tokenizer, divergence="skew_reverse_kl")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.trainers.heads import head_logits, vocabulary
from kdkernels.trainers.hf import check_loss_options, in_dtype
from kdkernels.trainers.lora import causal_lm
from kdkernels.trainers.models import common_vocabulary

IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
"""What TRL's trainer hands to models that see images, beside the ids."""


class TRLDistillationMixin:
    """Left of `trl.DistillationTrainer` (TRL >= 1.16) in the bases. Takes its arguments, and:

    Args:
        divergence: as in `kdkernels.distillation_loss`. Default: what TRL's ``beta`` means, forward KL at 0, reverse KL
            at 1, ``JSD(beta)`` between (the teacher has weight beta in the mixture).
        temperature_scaling, chunk_bytes, vocab_size, backend: as in `kdkernels.distillation_loss`; the temperature is
            TRL's.

    Unequal padding of the two vocabularies, which TRL refuses, is cut off.

    Raises:
        ValueError: label smoothing, ``compute_loss_func``, ZeRO-3.
    """

    def __init__(
        self,
        *args: Any,
        divergence: str | kd.Divergence | None = None,
        temperature_scaling: str = "none",
        chunk_bytes: int | None = None,
        vocab_size: int | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        check_loss_options(trainer)
        self.divergence = _by_beta(float(trainer.beta)) if divergence is None else divergence
        self.loss_options: dict[str, Any] = {
            "temperature_scaling": temperature_scaling, "chunk_bytes": chunk_bytes, "backend": backend,
        }  # fmt: skip
        heads = [trainer.accelerator.unwrap_model(model) for model in (trainer.teacher_model, trainer.model)]
        theirs, ours = (vocabulary(causal_lm(model)) for model in heads)
        self.vocab_size = common_vocabulary(theirs, ours, len(trainer._tokenizer), vocab_size or 0)

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """TRL's hook: the loss, the sum of the student's entropies, and the number of tokens that count."""
        trainer: Any = self
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        student = self._side(unwrapped_student, inputs, "student")
        unwrapped = trainer.accelerator.unwrap_model(trainer.teacher_model)
        with torch.no_grad():
            teacher = trainer._forward_redirection(
                trainer.teacher_model, unwrapped, self._side, unwrapped, inputs, "teacher"
            )
        output = kd.distillation_loss(
            student, in_dtype(teacher, student.dtype), self.divergence, temperature=trainer.temperature,
            token_weights=mask.to(torch.float32), num_items=num_items_in_batch, vocab_size=self.vocab_size,
            return_stats=True, **self.loss_options,
        )  # fmt: skip
        counted: Tensor = output.stats.counted.sum()
        return output.loss, output.stats.student_entropy.sum(), counted

    def _side(self, model: Any, inputs: dict[str, Any], role: str) -> kd.LinearLogits:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_ids"].size(1)
        images = {key: inputs[key] for key in IMAGES if key in inputs}
        hidden = self._get_last_hidden_state(model, ids, mask, keep, **images)  # type: ignore[attr-defined]
        return head_logits(causal_lm(model), hidden, role)


def _by_beta(beta: float) -> kd.Divergence:
    if beta == 0:
        return kd.ForwardKL()
    return kd.ReverseKL() if beta == 1 else kd.JSD(beta=beta)
