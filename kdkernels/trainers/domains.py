"""A `DomainSchedule` under transformers' Trainer: an epoch is an interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkernels._checks import fail
from kdkernels.errors import UserError
from kdkernels.optional import need
from kdkernels.trainers.lora import causal_lm

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = need("transformers", "a Trainer with domains").TrainerCallback

STATE = "ddk.json"


def domain_arguments(domains: Any, positional: tuple[Any, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments with the schedule's data for training."""
    if arguments.get("train_dataset") is not None or len(positional) > 3:
        fail(ValueError, "train_dataset", "given", "None with domains=", "the schedule holds the training data")
    if domains.sampler.world_size != 1:
        remedy = "the Trainer's loader shares the draws among ranks"
        fail(ValueError, "domains.sampler.world_size", domains.sampler.world_size, "1 under a Trainer", remedy)
    return {**arguments, "train_dataset": domains.sampler.dataset}


def load_domains(domains: Any, checkpoint: str) -> None:
    """The schedule as it was when the checkpoint's interval began; the Trainer itself skips what was drawn since."""
    path = Path(checkpoint) / STATE
    if not path.is_file():
        remedy = "it was made without domains"
        fail(UserError, "resume_from_checkpoint", checkpoint, f"a checkpoint with {STATE}", remedy)
    domains.load_state_dict(json.loads(path.read_text(encoding="utf-8")))


class DomainCallback(TrainerCallback):
    """Measures after each epoch, logs, keeps the state in checkpoints, and draws the course at the end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._measured = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whether intervals are whole steps."""
        samples, interval = self._samples(args), self.trainer.domains.sampler.interval_length
        if interval % samples:
            fail(ValueError, "interval", interval, f"a multiple of {samples}, the samples of a step over all ranks")

    def _samples(self, args: Any) -> int:
        return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was stopped between two intervals has not been measured yet."""
        if self.trainer.domains.sampler.finished:
            self._measure(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The interval is over: measure, weigh, log."""
        if state.global_step < state.max_steps:
            self._measure(state)

    def _measure(self, state: Any) -> None:
        if state.global_step == self._measured:
            return
        self._measured = state.global_step
        model = causal_lm(self.trainer.accelerator.unwrap_model(self.trainer.model))
        row = self.trainer.domains.remeasure(model, state.global_step)
        logs = {f"ddk_weight_{name}": share for name, share in row["weights"].items()}
        logs |= {f"ddk_discrepancy_{name}": x for name, x in row["discrepancy"].items()}
        self.trainer.log(logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside the checkpoint's other files. In the middle of an interval, the interval's beginning: the Trainer
        skips what was drawn since."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            sampler = self.trainer.domains.sampler
            whole = state.global_step * self._samples(args) % sampler.interval_length == 0
            text = json.dumps(self.trainer.domains.state_dict(consumed=len(sampler) if whole else 0))
            (folder / STATE).write_text(text, encoding="utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The course of the weights as a picture, where matplotlib is installed."""
        if not state.is_world_process_zero or not self.trainer.domains.history:
            return
        try:
            self.trainer.domains.draw(Path(args.output_dir) / "ddk.png")
        except UserError as error:
            print(f"ddk.png: not drawn, {error}")
