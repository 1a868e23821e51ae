"""One contestant on one case: the timed forward and backward."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.inputs import FLUSH_BYTES, Inputs
from benchmarks.rivals import Contestant
from benchmarks.shapes import Case

_flush: list[Tensor] = []


def flush() -> None:
    """Read enough other memory that nothing of the inputs is left in a cache."""
    if not _flush:
        _flush.append(torch.ones(FLUSH_BYTES // 4))
    _flush[0].sum()


class Runner:
    """A contestant built for a case, run on given inputs."""

    def __init__(self, contestant: Contestant, case: Case, inputs: Inputs) -> None:
        self.contestant, self.inputs = contestant, inputs
        self._loss = contestant.build(case)
        self.value = float("nan")

    def once(self) -> float:
        """Forward and backward; `value` and the inputs' gradients hold what came out. Returns seconds."""
        start = time.perf_counter()
        loss = self._loss(self.inputs)
        loss.backward()
        seconds = time.perf_counter() - start
        self.inputs.dirty = self.contestant.overwrites
        self.value = float(loss.detach())
        return seconds

    def sample(self) -> float:
        """Seconds of one forward and backward, gradients forgotten and inputs in memory rather than in a cache."""
        self.inputs.reset()
        flush()
        return self.once()
