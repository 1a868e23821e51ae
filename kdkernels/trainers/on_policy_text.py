"""Batches of `kdkernels distill --on-policy`: blocks of the corpus, answered prompts, or what the student writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels.data import BlockOrder, Corpus, batch_of
from kdkernels.data.corpus import Order
from kdkernels.errors import UserError
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.objective import Objective
from kdkernels.trainers.on_policy import OnPolicy, Writer, figures, gate_of, padded, prompt_of, stop_tokens
from kdkernels.trainers.prompts import Prompts
from kdkernels.trainers.replay import Written

if TYPE_CHECKING:
    from kdkernels.trainers.setup import Setup

Batch = dict[str, Tensor]


def writer_of(config: DistillConfig, objective: Objective, prompts: Prompts | None, tokenizer: Any) -> Writer:
    """The writer of a run; `UserError` for prompts that do not fit into the models' contexts."""
    schedule, tau0, decay = gate_of(config.gate)
    policy = OnPolicy(
        generated_share=config.generated_share, schedule=schedule, tau0=tau0, decay=decay,
        max_new_tokens=config.max_new_tokens, temperature=config.sample_temperature,
        prompt_tokens=config.prompt_tokens, batch_size=config.write_batch, replay=config.replay,
        replay_share=config.replay_share, replay_age=config.replay_age, seed=config.seed,
    )  # fmt: skip
    if config.ddk and prompts is not None and (prompts.responses is not None or config.generated_share == 1):
        raise UserError("ddk is on; allowed: off where no step draws from --data; the file of prompts has every text")
    student, teacher = objective.student, objective.teacher
    longest = max(map(len, prompts.prompts)) if prompts is not None else min(config.prompt_tokens, config.block_size)
    if longest >= config.block_size and prompts is not None and prompts.responses is not None:
        raise UserError(f"block_size is {config.block_size}; the longest prompt has {longest} tokens; raise it")
    for role, model in (("student", student), ("teacher", teacher)):
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest + config.max_new_tokens > limit:
            raise UserError(
                f"max_new_tokens is {config.max_new_tokens}; the {role} reads at most {limit} tokens, and prompts take "
                f"up to {longest}; lower it, or shorten them"
            )

    def autocast() -> Any:
        return torch.autocast(objective.device.type, torch.bfloat16, enabled=objective.dtype == torch.bfloat16)

    stops = stop_tokens(policy, student, teacher, tokenizer)
    return Writer(policy, student, teacher, vocab_size=objective.vocab_size, stops=stops, autocast=autocast)


class OnPolicyText:
    """The passes of a step. Nothing changes before `commit`: a step that was interrupted is prepared again alike.

    Args:
        corpus, order: the blocks, and which of them a draw takes.
        prompts: None: the beginnings of the blocks' documents.
        width: tokens at which answered prompts are cut.
        batch_size, accumulate: sequences of a pass, passes of a step.
        mix, seed: of the order of the prompts.
    """

    def __init__(
        self, writer: Writer, corpus: Corpus, order: Order, prompts: Prompts | None, *, width: int, batch_size: int,
        accumulate: int, mix: str, seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.writer, self.corpus, self.order, self.prompts = writer, corpus, order, prompts
        self.width, self.batch_size, self.accumulate, self.device = width, batch_size, accumulate, device
        self.lines = BlockOrder({"prompts": len(prompts.prompts)}, mix, seed) if prompts is not None else None
        self._pending: tuple[int, bool, Sequence[Written] | None, Tensor | None] | None = None

    @classmethod
    def of(cls, config: DistillConfig, setup: Setup, order: Order) -> OnPolicyText:
        """That of a run whose blocks are drawn in ``order``."""
        assert setup.writer is not None
        return cls(
            setup.writer, setup.corpus, order, setup.prompts, width=config.block_size, batch_size=config.batch_size,
            accumulate=config.accumulate, mix=config.mix, seed=config.seed, device=setup.objective.device,
        )  # fmt: skip

    def batches(self, step: int, stopped: Callable[[], bool]) -> tuple[list[Batch], bool]:
        """One batch a pass, ``input_ids``, ``position_ids``, ``labels``; and whether their text was generated.

        Raises:
            WritingStopped: ``stopped`` said so between two tokens.
        """
        rows = self.batch_size * self.accumulate
        cursor = step * rows
        generated, sequences = self.writer.plan(step, rows)
        written, sums = None, None
        if generated and sequences is None:
            asked = [self._prompt(cursor + row, step, row) for row in range(rows)]
            written, sums = self.writer.write(step, asked, range(rows), stopped)
            sequences = written
        self._pending = (step, generated, written, sums)
        if sequences is None:
            return [self._text(cursor + i * self.batch_size, step) for i in range(self.accumulate)], False
        size = self.batch_size
        return [self._batch(sequences[i * size : (i + 1) * size]) for i in range(self.accumulate)], True

    def commit(self) -> None:
        """The step of the latest `batches` was taken."""
        assert self._pending is not None
        self.writer.commit(*self._pending)
        self._pending = None

    def _prompt(self, draw: int, step: int, row: int) -> list[int]:
        if self.prompts is not None and self.lines is not None:
            return self.prompts.prompts[self.lines[draw][1]]
        name, index = self.order[draw]
        policy = self.writer.policy
        return prompt_of(self.corpus.train[name][index], policy.prompt_tokens, policy.seed, step, row)

    def _text(self, cursor: int, step: int) -> Batch:
        """A batch that was not generated: answered prompts where there are any, else blocks."""
        if self.prompts is None or self.prompts.responses is None or self.lines is None:
            return batch_of(self.corpus, self.order, cursor, self.batch_size, self.device)
        found = []
        for i in range(self.batch_size):
            line = self.lines[cursor + i][1]
            prompt = self.prompts.prompts[line]
            tokens = (*prompt, *self.prompts.responses[line])[: self.width]
            found.append(Written(tokens, len(prompt), step))
        return self._batch(found)

    def _batch(self, sequences: Sequence[Written]) -> Batch:
        made = padded(sequences, 0)
        positions = torch.arange(made["input_ids"].shape[1]).expand_as(made["input_ids"])
        # without a mask: the padding is behind the tokens, which do not see it
        batch = {"input_ids": made["input_ids"], "position_ids": positions, "labels": made["labels"]}
        return {name: value.to(self.device) for name, value in batch.items()}

    def figures(self) -> dict[str, float]:
        """What the next line of the log says, and the sums begin anew."""
        return figures(self.writer.take_sums())

    def state_dict(self) -> dict[str, Any]:
        """The writer's."""
        return self.writer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.writer.load_state_dict(state)
