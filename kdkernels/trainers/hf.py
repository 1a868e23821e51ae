"""Distillation under transformers' Trainer, or any subclass of it.

from kdkernels.trainers import DistillationTrainer
DistillationTrainer(student, args, train_dataset=data, data_collator=collator, teacher=teacher,
                    divergence="jsd", temperature=2.0, ce_weight=0.5).train()

class DistillSFT(kd.trainers.DistillationMixin, trl.SFTTrainer): ...
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels._checks import fail
from kdkernels.errors import UserError
from kdkernels.sparse_logits import SparseLogits
from kdkernels.trainers.domains import DomainCallback, domain_arguments, load_domains
from kdkernels.trainers.heads import check_head, logits_of, vocabulary
from kdkernels.trainers.heldout import uniform_teacher
from kdkernels.trainers.lora import causal_lm
from kdkernels.trainers.models import common_vocabulary
from kdkernels.trainers.on_policy import OnPolicy
from kdkernels.trainers.on_policy_hf import GENERATED, LANGUAGE, OnPolicyCallback, SecondText
from kdkernels.trainers.redirect import through
from kdkernels.trainers.tally import Tally

OWN_COLUMNS = ("example_id", "teacher_hidden")


class DistillationMixin:
    """Puts the fused distillation loss in place of a Trainer's own; the student's logits are never built.

    Left of a Trainer class in the bases. Takes the Trainer's arguments, and:

    Args:
        teacher: a causal language model; a `kdkernels.TeacherCache` (the dataset then has a column ``example_id``); or
            None where the dataset has a column ``teacher_hidden [L, Ht]`` of hidden states computed elsewhere, with
            ``teacher_head`` to turn them into logits.
        teacher_head: `torch.nn.Linear` for ``teacher_hidden``.
        domains: a `kdkernels.ddk.DomainSchedule`, instead of train_dataset: each epoch is an interval, after which the
            student is measured and the weights of the domains are set anew. They are logged as ``ddk_weight_<domain>``
            and ``ddk_discrepancy_<domain>``, drawn to ``ddk.png`` in the output folder, and kept in checkpoints.
        on_policy: a `kdkernels.trainers.OnPolicy`: part of the steps is trained on text that the student writes and
            the teacher corrects. There ``ce_weight`` does not count. Logged: ``generated_share``, ``replayed_share``,
            ``teacher_share``, ``jsd``, ``response_length``.
        lm_dataset, lm_weight: samples of a second text, taken by the Trainer's collator; lm_weight times their mean
            cross-entropy is added to the loss of every step.
        divergence, temperature, temperature_scaling, ce_weight, kd_weight, sparse_mode, chunk_bytes, vocab_size,
            backend: as in `kdkernels.distillation_loss`; the divergence is by default forward_kl, with on_policy
            skew_reverse_kl. The labels' shift is the Trainer's: position i is judged by
            label i + 1, and tokens labelled -100 count for nothing.

    Logged with the loss, per token that counts, over all ranks and accumulated batches: ``divergence``,
    ``teacher_entropy``, ``student_entropy``, ``top1_agreement``, ``nll``, ``accuracy``; with ``eval_`` in evaluation.
    Gradient accumulation equals one large batch. A model's own auxiliary losses (mixtures of experts) are not added.

    Raises:
        ValueError: options of the Trainer that would change the loss or that it cannot honour: label smoothing,
            ``compute_loss_func``, ``torch_compile``, several GPUs in one process, ZeRO-3.
    """

    loss_is_scaled_for_ga: bool | None = True

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        teacher_head: torch.nn.Linear | None = None,
        domains: Any = None,
        on_policy: OnPolicy | None = None,
        lm_dataset: Any = None,
        lm_weight: float = 1.0,
        divergence: str | kd.Divergence | None = None,
        temperature: float = 1.0,
        temperature_scaling: str = "none",
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        sparse_mode: str | None = None,
        chunk_bytes: int | None = None,
        vocab_size: int | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        if domains is not None:
            kwargs = domain_arguments(domains, args, kwargs)
        super().__init__(*args, **kwargs)
        self.domains = domains
        if domains is not None:
            self.add_callback(DomainCallback(self))  # type: ignore[attr-defined]
        self.divergence = divergence or ("forward_kl" if on_policy is None else "skew_reverse_kl")
        self.loss_options: dict[str, Any] = {
            "temperature": temperature, "temperature_scaling": temperature_scaling, "ce_weight": ce_weight,
            "kd_weight": kd_weight, "chunk_bytes": chunk_bytes, "backend": backend,
        }  # fmt: skip
        self.teacher_head = teacher_head
        self.teacher = self._prepared(teacher)
        if sparse_mode is not None:
            self.loss_options["sparse_mode"] = sparse_mode
        elif getattr(getattr(teacher, "settings", None), "kind", "") == "sampled":
            self.loss_options["sparse_mode"] = "sampled"
        self._check_trainer()
        self.vocab_size = self._common_vocabulary(vocab_size)
        # the Trainer counts the tokens of an accumulated batch only for models that it believes take the count
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, True
        self._tallies = {"train": Tally(), "eval": Tally()}
        self.on_policy = None if on_policy is None else OnPolicyCallback(self, on_policy)
        if self.on_policy is not None:
            self.add_callback(self.on_policy)  # type: ignore[attr-defined]
        seed = self.args.seed  # type: ignore[attr-defined]
        self.second_text = None if lm_dataset is None else SecondText(self, lm_dataset, lm_weight, seed)

    # --- what is checked once ---

    def _prepared(self, teacher: Any) -> Any:
        """A model in eval mode on the Trainer's device; anything else as it is."""
        if not isinstance(teacher, torch.nn.Module):
            if teacher is None and self.teacher_head is None:
                remedy = "or teacher_head= with a column 'teacher_hidden'"
                fail(ValueError, "teacher", None, "a model or a kdkernels.TeacherCache", remedy)
            if teacher is not None and not isinstance(teacher, kd.TeacherCache):
                remedy = "load a model by from_pretrained, a cache by kdkernels.TeacherCache.open"
                fail(TypeError, "teacher", repr(teacher), "a model, a kdkernels.TeacherCache or None", remedy)
            return teacher
        teacher.eval().requires_grad_(False)
        trainer: Any = self
        if trainer.is_fsdp_enabled:
            return trainer.accelerator.prepare_model(teacher, evaluation_mode=True)
        return teacher.to(trainer.args.device)

    def _check_trainer(self) -> None:
        trainer: Any = self
        args = trainer.args
        check_loss_options(trainer)
        if args.torch_compile:
            fail(ValueError, "torch_compile", True, "False", "compile the base model: model.model.compile()")
        if args.n_gpu > 1:
            fail(ValueError, "GPUs in one process", args.n_gpu, "1", "start with torchrun, one process a GPU")
        model = trainer.accelerator.unwrap_model(trainer.model)
        if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
            fail(ValueError, "peft_config", "prompt learning", "an adapter inside the model, such as LoRA")
        model = causal_lm(model)
        if getattr(model.config, "output_router_logits", False):
            fail(ValueError, "output_router_logits", True, "False", "auxiliary losses are not part of this loss")
        if not trainer.is_fsdp_enabled:
            check_head(model, None, "student", next(model.parameters()).device)

    def _common_vocabulary(self, vocab_size: int | None) -> int | None:
        trainer: Any = self
        ours = vocabulary(causal_lm(trainer.accelerator.unwrap_model(trainer.model)))
        if isinstance(self.teacher, torch.nn.Module):
            theirs = vocabulary(causal_lm(trainer.accelerator.unwrap_model(self.teacher)))
        elif self.teacher_head is not None:
            theirs = self.teacher_head.weight.shape[0]
        else:
            theirs = self.teacher.settings.vocab_size
        words = trainer.processing_class
        known = len(words) if hasattr(words, "__len__") else 0
        return common_vocabulary(theirs, ours, known, vocab_size or 0)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        trainer: Any = self
        trainer._signature_columns = list(dict.fromkeys([*trainer._signature_columns, *OWN_COLUMNS]))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        inherited = super()._get_train_sampler  # type: ignore[misc]
        return inherited(*args, **kwargs) if self.domains is None else self.domains.sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        if self.domains is not None:
            load_domains(self.domains, resume_from_checkpoint)
        if self.on_policy is not None:
            self.on_policy.load(resume_from_checkpoint)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's batches of a step with their number of tokens, after some were replaced by generated text."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if batches and self.on_policy is not None:
            batches = self.on_policy.replaced(batches)
        if self.second_text is not None:
            batches = self.second_text.beside(batches)
        return super().get_batch_samples(iter(batches), num_batches, *args, **kwargs)  # type: ignore[misc]

    # --- the loss ---

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch, scaled so that ranks and accumulated batches add up to one large batch."""
        trainer: Any = self
        batch = dict(inputs)
        generated, second = batch.pop(GENERATED, False), batch.pop(LANGUAGE, None)
        labels = batch.pop("labels", None)
        if labels is None:
            remedy = "use DataCollatorForLanguageModeling(tokenizer, mlm=False) or a dataset with labels"
            fail(UserError, "labels", None, "in every batch", remedy)
        inner = trainer.accelerator.unwrap_model(model)
        teacher = self._teacher_side({k: batch.pop(k) for k in OWN_COLUMNS if k in batch}, batch)

        def work() -> tuple[Tensor, Tensor]:
            with trainer.accelerator.autocast():
                student = logits_of(causal_lm(inner), batch, "student")
                hard = {"ce_weight": 0.0} if generated else {}  # hard labels are for text that somebody meant
                found, sums = self._loss(student, teacher(student), labels, num_items_in_batch, **hard)
                return found if second is None else found + self._second_loss(causal_lm(inner), *second), sums

        loss, sums = through(model, inner, work)
        self._tallies["train" if model.training else "eval"].add(sums)
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * trainer.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss(
        self, student: kd.LinearLogits, teacher: Any, labels: Tensor, num_items: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        output = kd.distillation_loss(
            student, teacher, self.divergence, labels=labels, shift=True, num_items=num_items,
            vocab_size=self.vocab_size, return_stats=True, **{**self.loss_options, **options},
        )  # fmt: skip
        return output.loss, Tally.sums_of(output.stats)

    def _second_loss(self, model: Any, batch: dict[str, Tensor], items: Tensor) -> Tensor:
        """The weighted cross-entropy on samples of the second text."""
        assert self.second_text is not None
        batch = dict(batch)
        labels = batch.pop("labels")
        student = logits_of(model, batch, "student")
        nobody = uniform_teacher(student.hidden.detach(), student.weight.shape[0])
        options = {"kd_weight": 0.0, "ce_weight": self.second_text.weight, "sparse_mode": "ghost"}
        return self._loss(student, nobody, labels, items, **options)[0]

    def _teacher_side(self, columns: dict[str, Any], batch: dict[str, Any]) -> Any:
        """A function from the student's side to the teacher's: its dtype is the student's."""
        if self.teacher_head is not None:
            hidden, head = columns.get("teacher_hidden"), self.teacher_head
            if hidden is None:
                fail(UserError, "teacher_hidden", None, "in every batch", "teacher_head= turns it into logits")
            return lambda like: kd.LinearLogits(
                hidden.to(like.device, like.dtype), head.weight.detach().to(like.device, like.dtype),
                None if head.bias is None else head.bias.detach().to(like.device, like.dtype),
            )  # fmt: skip
        if isinstance(self.teacher, torch.nn.Module):
            side = self._from_model(batch)
            return lambda like: in_dtype(side, like.dtype)
        kept = self._from_cache(columns.get("example_id"), batch)
        return lambda like: kept.to(like.device)

    def _from_model(self, batch: dict[str, Any]) -> kd.LinearLogits:
        trainer: Any = self
        inner = trainer.accelerator.unwrap_model(self.teacher)
        with torch.no_grad(), trainer.accelerator.autocast():
            return through(self.teacher, inner, lambda: logits_of(causal_lm(inner), batch, "teacher"))

    def _from_cache(self, ids: Any, batch: dict[str, Any]) -> SparseLogits:
        if ids is None:
            fail(UserError, "example_id", None, "in every batch", "a TeacherCache is looked up by that column")
        from kdkernels.compression.dataset import stack

        tokens = batch["input_ids"].cpu()
        found = stack([self.teacher.get(int(i), input_ids=row) for i, row in zip(ids, tokens, strict=True)])
        return found.at_temperature(self.loss_options["temperature"])

    # --- what is logged ---

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with the means over the tokens since the last one."""
        if "loss" in logs:
            logs = {**logs, **self._tallies["train"].means(self.accelerator)}  # type: ignore[attr-defined]
            logs |= {} if self.on_policy is None else self.on_policy.means()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's evaluation, with the means over its tokens."""
        self._tallies["eval"] = Tally()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        means = self._tallies["eval"].means(self.accelerator)  # type: ignore[attr-defined]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output


def check_loss_options(trainer: Any) -> None:
    """Options of a Trainer that would silently change the loss, or under which a head has no weight."""
    smoothing = trainer.args.label_smoothing_factor
    if smoothing:
        remedy = "it would change the loss; hard labels enter with ce_weight="
        fail(ValueError, "label_smoothing_factor", smoothing, "0", remedy)
    if trainer.compute_loss_func is not None:
        fail(ValueError, "compute_loss_func", trainer.compute_loss_func, "None", "the loss is kdkernels' here")
    sharded = getattr(trainer, "is_deepspeed_enabled", False)
    if sharded and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        fail(ValueError, "zero_stage", 3, "0, 1 or 2", "to shard parameters use FSDP")


def in_dtype(side: kd.LinearLogits, dtype: torch.dtype) -> kd.LinearLogits:
    """The same logits, computed in another dtype."""
    bias = None if side.bias is None else side.bias.to(dtype)
    return kd.LinearLogits(side.hidden.to(dtype), side.weight.to(dtype), bias, side.softcap, side.scale)
