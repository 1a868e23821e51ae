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
