"""Blocks drawn by DDK's weights in the plain loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdkernels.data import Blocks
from kdkernels.ddk import DomainSchedule, measure_perplexity
from kdkernels.errors import UserError
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.setup import Setup


class _First(Sequence[dict[str, torch.Tensor]]):
    """The first blocks of a domain."""

    def __init__(self, blocks: Blocks, size: int) -> None:
        self.blocks, self.size = blocks, min(size, len(blocks))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.blocks[index]


class DomainOrder:
    """`order[draw]` is the block of a draw, as in `BlockOrder`; draws of the current interval only."""

    def __init__(self, schedule: DomainSchedule, config: DistillConfig, setup: Setup) -> None:
        self.schedule, self.steps = schedule, config.ddk_interval
        self._objective = setup.objective
        self._plan: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, draw: int) -> tuple[str, int]:
        """(domain, block) of draw number `draw`."""
        sampler = self.schedule.sampler
        interval, place = divmod(draw, sampler.interval_length)
        if interval != sampler.interval:
            raise IndexError(f"draw {draw} is of interval {interval}, the current one is {sampler.interval}")
        if self._plan[0] != interval:
            self._plan = (interval, sampler.plan().tolist())
        return sampler.locate(self._plan[1][place])

    def due(self, step: int) -> bool:
        """Whether the interval that `step` belongs to is to be weighed before it."""
        return step > 0 and step % self.steps == 0 and step // self.steps > self.schedule.sampler.interval

    def remeasure(self, student: Any, step: int) -> dict[str, Any]:
        """Measure, weigh, and go on to the next interval; what the log says of it."""
        objective = self._objective
        with torch.autocast(objective.device.type, torch.bfloat16, enabled=objective.dtype == torch.bfloat16):
            row = self.schedule.remeasure(student, step)
        self.schedule.sampler.next_interval()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the place in the interval is the run's step."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the interval that was saved."""
        self.schedule.load_state_dict(state)

    def draw(self, path: Path) -> None:
        """The course of the weights, if there is one and matplotlib is installed."""
        if self.schedule.history:
            try:
                self.schedule.draw(path)
            except UserError as error:
                print(f"{path.name}: not drawn, {error}")


def domains_of(config: DistillConfig, setup: Setup, output: Path) -> DomainOrder:
    """DDK over a run's corpus. The teacher is measured now, in the precision of the run, and kept in `output`."""
    held_out = {name: _First(blocks, config.ddk_blocks) for name, blocks in setup.corpus.held_out.items()}
    objective = setup.objective
    options: dict[str, Any] = {"batch_size": config.batch_size, "backend": config.backend}
    with torch.autocast(objective.device.type, torch.bfloat16, enabled=objective.dtype == torch.bfloat16):
        teacher = measure_perplexity(objective.teacher, held_out, cache=output / "perplexity", **options)
    schedule = DomainSchedule(
        setup.corpus.train, held_out, interval=config.ddk_interval * config.accumulate * config.batch_size,
        teacher=teacher, alpha=config.ddk_alpha, variant=config.ddk_variant, seed=config.seed, **options,
    )  # fmt: skip
    return DomainOrder(schedule, config, setup)
