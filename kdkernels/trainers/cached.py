"""A `TeacherCache` in the teacher's place: the distributions of a batch, found by the tokens themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import kdkernels as kd
from kdkernels.compression.dataset import stack
from kdkernels.compression.shard import input_hash
from kdkernels.data import Blocks, Corpus
from kdkernels.errors import UserError
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.models import tokenizer_hash

# options of a cache's build that decide which blocks there are, as its metadata records them
TEXT_OPTIONS = ("block_size", "held_out", "seed", "text_key")


class CachedTeacher:
    """Looks blocks up by the hash of their tokens: whoever is served reads what the teacher read."""

    def __init__(self, cache: kd.TeacherCache) -> None:
        self.cache = cache
        self.hashes, self.ids = cache.reader.inputs()

    def find(self, input_ids: torch.Tensor) -> int | None:
        """The example that was computed from these tokens [L], on the CPU."""
        key = np.uint64(input_hash(input_ids.numpy()))
        place = int(self.hashes.searchsorted(key))
        return int(self.ids[place]) if place < len(self.hashes) and self.hashes[place] == key else None

    def of(self, input_ids: torch.Tensor, temperature: float) -> kd.SparseLogits:
        """The teacher's distributions over a batch [B, L] at a temperature, on its device."""
        found = [self.find(row) for row in input_ids.cpu()]
        if None in found:
            raise UserError(f"cache {str(self.cache.path)!r} does not hold block {found.index(None)} of a batch")
        batch = stack([self.cache[number] for number in found if number is not None])
        return batch.at_temperature(temperature).to(input_ids.device)

    def has(self, temperature: float) -> bool:
        """Whether the cache gives distributions at this temperature."""
        ours = self.cache.settings
        return temperature in (ours.temperature, *ours.others)

    def mode(self, asked: str = "ghost") -> str:
        """The sparse mode of a loss: draws have one of their own."""
        return "sampled" if self.cache.settings.kind == "sampled" else asked

    @property
    def vocab(self) -> int:
        """V of the distributions."""
        return self.cache.settings.vocab_size

    def check(self, config: DistillConfig, corpus: Corpus, tokenizer: Any, student_rows: int) -> None:
        """Raise `UserError` unless the run can do with this cache, and with nothing else."""
        self.cache.require(tokenizer_hash=tokenizer_hash(tokenizer))
        if student_rows < self.vocab or config.vocab_size not in (0, self.vocab):
            self.cache.require(vocab_size=config.vocab_size or student_rows)
        if not self.has(config.temperature):
            ours = self.cache.settings
            raise UserError(
                f"temperature is {config.temperature}; the cache {str(self.cache.path)!r} holds "
                f"{', '.join(map(str, (ours.temperature, *ours.others)))}; choose one of these, or build another cache"
            )
        for name, blocks in corpus.train.items():
            self._check_blocks(config, f"training blocks of domain {name!r}", blocks, len(blocks))
        for name, blocks in corpus.held_out.items():
            self._check_blocks(config, f"held-out blocks of domain {name!r}", blocks, config.eval_blocks)

    def _check_blocks(self, config: DistillConfig, what: str, blocks: Blocks, limit: int) -> None:
        count = min(limit, len(blocks))
        absent = sum(self.find(blocks[i]["input_ids"]) is None for i in range(count))
        if not absent:
            return
        made, here = self.cache.settings.metadata, config.to_dict()
        other = [f"{x} {made[x]!r}, here {here[x]!r}" for x in TEXT_OPTIONS if x in made and made[x] != here[x]]
        built = f"it was built with {'; '.join(other)}" if other else "it was built from other text"
        raise UserError(
            f"cache {str(self.cache.path)!r} does not hold {absent} of the {count} {what}: {built}; give the text and "
            "the options that it was built with, or build one from this text"
        )


def check_loss(config: DistillConfig, divergence: Any, cached: CachedTeacher) -> None:
    """Raise `UserError` where the loss cannot take the cache's kind of teacher (mode, divergence, backend)."""
    ids = torch.zeros(1, 1, dtype=torch.int32)
    zero = torch.zeros(1)
    ours = cached.cache.settings
    tail = torch.full((1,), -torch.inf)
    sparse = kd.SparseLogits(ids, zero[None], tail, cached.vocab, config.temperature, ours.kind)
    try:
        kd.distillation_loss(
            torch.zeros(1, cached.vocab), sparse, divergence, temperature=config.temperature,
            sparse_mode=cached.mode(config.sparse_mode),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"with cache {str(cached.cache.path)!r}: {error}") from error
