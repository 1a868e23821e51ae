"""`OnPolicy` under transformers' Trainer: batches of a step replaced before their tokens are counted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdkernels._checks import fail, require_finite_number
from kdkernels.data import BlockOrder, counted
from kdkernels.errors import UserError
from kdkernels.optional import need
from kdkernels.trainers.on_policy import OnPolicy, Writer, figures, padded, prompt_of, stop_tokens
from kdkernels.trainers.replay import Written

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = need("transformers", "a Trainer with on_policy=").TrainerCallback

STATE = "on_policy.pt"
GENERATED, LANGUAGE = "on_policy_generated", "lm_batch"
"""Keys that `compute_loss` finds in a batch: whether it was generated; the second text's batch and its tokens."""


class OnPolicyCallback(TrainerCallback):
    """Writes the batches of generated steps, and keeps the replay buffer in checkpoints.

    Rows are numbered over ranks and accumulated batches as the Trainer deals them out, and every rank keeps the same
    replay buffer: the same rows, in however many ranks and batches, get the same text.
    """

    def __init__(self, trainer: Any, policy: OnPolicy) -> None:
        if not isinstance(policy, OnPolicy):
            fail(TypeError, "on_policy", type(policy).__name__, "a kdkernels.trainers.OnPolicy, or None")
        if not isinstance(trainer.teacher, torch.nn.Module):
            fail(ValueError, "teacher", type(trainer.teacher).__name__, "a model with on_policy=", "the text is new")
        if trainer.is_fsdp_enabled:
            fail(ValueError, "on_policy with FSDP", True, "off", "use DDP: generation needs whole parameters")
        if trainer.loss_options["kd_weight"] == 0:
            fail(ValueError, "kd_weight", 0, "above 0 with on_policy=", "written text has no other loss")
        args = trainer.args
        self.trainer, self.world, self.rank = trainer, args.world_size, args.process_index
        rows = args.train_batch_size * args.gradient_accumulation_steps * self.world
        if 0 < policy.replay < rows:
            fail(ValueError, "replay", policy.replay, f"0, or at least the {rows} sequences of a step")
        student = trainer.accelerator.unwrap_model(trainer.model)
        words = trainer.processing_class
        self.pad = getattr(words, "pad_token_id", None) or 0
        self.writer = Writer(
            policy, student, trainer.teacher, vocab_size=trainer.vocab_size, autocast=trainer.accelerator.autocast,
            stops=stop_tokens(policy, student, trainer.teacher, words),
            progress=not args.disable_tqdm and trainer.is_local_process_zero(),
        )  # fmt: skip

    def replaced(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches of a step: as they are, or each with as many rows of generated text."""
        step = self.trainer.state.global_step
        size = self.trainer.args.train_batch_size
        generated, replayed = self.writer.plan(step, size * self.world * len(batches))
        if not generated:
            self.writer.commit(step, False, None, None)
            return batches
        numbers = [self._rows(micro, len(batch["input_ids"])) for micro, batch in enumerate(batches)]
        flat = [row for rows in numbers for row in rows]
        if replayed is not None:
            self.writer.commit(step, True, None, None)
            found = {row: replayed[row] for row in flat}
        else:
            prompts = [self._prompt(b, i, step, row) for b, rows in zip(batches, numbers, strict=True)
                       for i, row in enumerate(rows)]  # fmt: skip
            written, sums = self.writer.write(step, prompts, flat)
            found = dict(zip(flat, written, strict=True))
            self.writer.commit(step, True, self._of_all_ranks(found), sums)
        made = [padded([found[row] for row in rows], self.pad) for rows in numbers]
        place = self.trainer.args.device
        return [{**{k: v.to(place) for k, v in batch.items()}, GENERATED: True} for batch in made]

    def _rows(self, micro: int, count: int) -> list[int]:
        """Numbers of this rank's rows of an accumulated batch among all rows of the step."""
        first = (micro * self.world + self.rank) * self.trainer.args.train_batch_size
        return list(range(first, first + count))

    def _prompt(self, batch: dict[str, Any], index: int, step: int, row: int) -> list[int]:
        if batch.get("labels") is None:
            fail(UserError, "labels", None, "in every batch", "use a dataset or a collator that gives them")
        names = [name for name in ("input_ids", "labels", "position_ids") if name in batch]
        sample: dict[str, Any] = {name: batch[name][index].cpu() for name in names}
        mask = batch.get("attention_mask")
        policy = self.writer.policy
        row_mask = None if mask is None else mask[index].cpu()
        return prompt_of(sample, policy.prompt_tokens, policy.seed, step, row, row_mask)

    def _of_all_ranks(self, found: dict[int, Written]) -> list[Written]:
        """What every rank has written, in the order of the rows; this rank's alone where nothing is kept."""
        if self.world > 1 and self.writer.policy.replay:
            parts: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(parts, found)
            found = {row: written for part in parts for row, written in part.items()}
        return [found[row] for row in sorted(found)]

    def means(self) -> dict[str, float]:
        """Figures over all ranks since the last call; every rank has to call."""
        accelerator = self.trainer.accelerator
        return figures(accelerator.reduce(self.writer.take_sums().to(accelerator.device), "sum"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The replay buffer, beside the checkpoint's other files."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.writer.buffer.state_dict(), folder / STATE)

    def load(self, checkpoint: str) -> None:
        """Go on with the replay buffer of a checkpoint."""
        path = Path(checkpoint) / STATE
        if not path.is_file():
            fail(UserError, "resume_from_checkpoint", checkpoint, f"a checkpoint with {STATE}", "on_policy= was not on")
        self.writer.buffer.load_state_dict(torch.load(path, weights_only=True))


class SecondText:
    """Samples of a second dataset beside every batch, for a language-model loss; a function of the step alone."""

    def __init__(self, trainer: Any, dataset: Any, weight: float, seed: int) -> None:
        kind = "a map-style dataset of samples with input_ids and labels"
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            fail(TypeError, "lm_dataset", type(dataset).__name__, kind)
        if not len(dataset):
            fail(ValueError, "lm_dataset", "empty", kind)
        require_finite_number("lm_weight", weight)
        if not weight > 0:
            fail(ValueError, "lm_weight", weight, "above 0")
        self.trainer, self.dataset, self.weight = trainer, dataset, float(weight)
        self.order = BlockOrder({"lm": len(dataset)}, "proportional", seed)

    def beside(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches of a step, each with its samples under `LANGUAGE`, and the tokens that count in all of them."""
        trainer, args = self.trainer, self.trainer.args
        size, world, device = args.train_batch_size, args.world_size, args.device
        first = trainer.state.global_step * args.gradient_accumulation_steps * world * size
        second = []
        for micro in range(len(batches)):
            draw = first + (micro * world + args.process_index) * size
            rows = [self.dataset[self.order[draw + i][1]] for i in range(size)]
            made = trainer.data_collator(rows)
            if "labels" not in made:
                fail(UserError, "labels", None, "in every batch of lm_dataset", "use a dataset or collator with them")
            second.append({k: v.to(device) for k, v in made.items() if isinstance(v, torch.Tensor)})
        items = torch.tensor(sum(counted(batch["labels"]) for batch in second), device=device)
        if args.average_tokens_across_devices and world > 1:
            items = trainer.accelerator.gather(items).sum()
        return [{**batch, LANGUAGE: (other, items)} for batch, other in zip(batches, second, strict=True)]
