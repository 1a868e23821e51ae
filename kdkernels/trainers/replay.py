"""Sequences that were written earlier, to be trained on again: bounded in number and in age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Written:
    """A prompt with its response. tokens: both; prompt: how many of them are the prompt's; born: the step it is of."""

    tokens: tuple[int, ...]
    prompt: int
    born: int


class ReplayBuffer:
    """The newest ``capacity`` sequences; those more than ``age`` steps old are never drawn."""

    def __init__(self, capacity: int, age: int) -> None:
        self.capacity, self.age = capacity, age
        self._kept: list[Written] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, sequences: Sequence[Written]) -> None:
        """Take sequences in, in their order; the oldest leave."""
        newest = max((s.born for s in sequences), default=0)
        kept = [s for s in self._kept if newest - s.born <= self.age]
        self._kept = [*kept, *sequences][-self.capacity :] if self.capacity else []

    def draw(self, count: int, step: int, generator: np.random.Generator) -> list[Written] | None:
        """``count`` different sequences, equally likely, for a step; None where there are fewer."""
        young = [s for s in self._kept if step - s.born <= self.age]
        if count > len(young):
            return None
        return [young[i] for i in generator.choice(len(young), count, replace=False)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors alone: all tokens end to end (int32), and for each sequence its length, its prompt's, its step."""
        numbers = [[len(s.tokens), s.prompt, s.born] for s in self._kept]
        return {
            "tokens": torch.tensor([token for s in self._kept for token in s.tokens], dtype=torch.int32),
            "numbers": torch.tensor(numbers, dtype=torch.int64).reshape(-1, 3),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        lengths = state["numbers"][:, 0].tolist()
        parts = state["tokens"].split(lengths) if lengths else ()
        rest = state["numbers"][:, 1:].tolist()
        self._kept = [Written(tuple(part.tolist()), *pair) for part, pair in zip(parts, rest, strict=True)]
