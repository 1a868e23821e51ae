"""A language-model loss on a second text, beside a run's distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.data import BlockOrder, Corpus, batch_of, counted
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.objective import Objective


class LanguageStream:
    """Blocks of the second text, a batch for every pass, all its domains in one shuffle."""

    def __init__(self, corpus: Corpus, config: DistillConfig, objective: Objective) -> None:
        self.corpus, self.config, self.objective = corpus, config, objective
        sizes = {name: len(blocks) for name, blocks in corpus.train.items()}
        self.order = BlockOrder(sizes, "proportional", config.seed)
        self.sums = torch.zeros(2, dtype=torch.float64)
        self._items, self._loss = 1, torch.zeros((), dtype=torch.float64)

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """One batch a pass."""
        size, passes = self.config.batch_size, self.config.accumulate
        found = [
            batch_of(self.corpus, self.order, (step * passes + i) * size, size, self.objective.device)
            for i in range(passes)
        ]
        self._items = max(1, sum(counted(batch["labels"]) for batch in found))
        self._loss = torch.zeros((), dtype=torch.float64, device=self.objective.device)
        return found

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        """Adds the gradient of a pass's part of ``lm_weight`` times the mean cross-entropy of the step; returns it."""
        loss, _ = self.objective(batch, self._items, kd_weight=0.0, ce_weight=self.config.lm_weight)
        loss.backward()
        self._loss = self._loss + loss.detach().double()
        return loss.detach().double()

    def commit(self) -> None:
        """The step of the latest `batches` was taken."""
        self.sums = self.sums.to(self.objective.device)
        self.sums[0] += self._loss
        self.sums[1] += 1

    def figures(self) -> dict[str, float]:
        """The mean cross-entropy of the steps since the last line of the log."""
        total, steps = self.sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        return {"lm_nll": total / steps / self.config.lm_weight} if steps else {}

    def state_dict(self) -> dict[str, Any]:
        """The sums; the place in the text is the run's step."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.sums = state["sums"]
