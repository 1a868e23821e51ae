"""Sums of per-token figures between two lines of a log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.losses import DistillationStats

NAMES = ("divergence", "teacher_entropy", "student_entropy", "top1_agreement", "nll", "accuracy")


class Tally:
    """Sums on the device of the figures; nothing waits for them before they are asked for."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @staticmethod
    def sums_of(stats: DistillationStats) -> Tensor:
        """Sums over the tokens of one batch, and their number last: float64 ``[7]``."""
        columns = [getattr(stats, name) for name in NAMES]
        return torch.stack([column.detach().double().sum() for column in (*columns, stats.counted)])

    def add(self, sums: Tensor) -> None:
        """Takes in one batch."""
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means per token over all ranks since the last call; every rank has to call. Empty without a token."""
        device = accelerator.device
        sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=device) if self._sums is None else self._sums
        self._sums = None
        total = accelerator.reduce(sums, "sum").tolist()
        return {name: value / total[-1] for name, value in zip(NAMES, total, strict=False)} if total[-1] else {}


class Window:
    """Sums of the plain loop: [loss, divergence, nll, agreement, entropy], and the steps and tokens they are over."""

    def __init__(self, sums: Tensor | None = None, steps: int = 0, tokens: int = 0, seconds: float = 0.0) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64) if sums is None else sums
        self.steps, self.tokens, self.seconds = steps, tokens, seconds

    def add(self, sums: Tensor, tokens: int, seconds: float) -> None:
        """Takes in one step."""
        self.sums = self.sums.to(sums.device) + sums
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds

    def means(self) -> list[float]:
        """Of the loss per step, of the rest per token."""
        loss, *rest = self.sums.tolist()
        return [loss / max(self.steps, 1), *(value / max(self.tokens, 1) for value in rest)]
