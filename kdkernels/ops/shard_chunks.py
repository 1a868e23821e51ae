"""Some rows on their way through the parts of a row in vocabulary shards, with a pause at each collective."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import eager_shards
from kdkernels.collectives import DOUBTS, Pending, Ranks
from kdkernels.eager_shards import Merged, Rows
from kdkernels.ops import shards_adaptive
from kdkernels.ops.rows import RowSpec, Side
from kdkernels.ops.shard_parts import Parts
from kdkernels.weights import RowWeights

SMALL = 1e-3
"""Nats; see kSmall in csrc/cpu/rows.h."""

_ENDED = object()


@dataclass(frozen=True)
class Shard:
    """Where this rank's columns stand."""

    ranks: Ranks
    offset: int
    """The first column's place in the whole vocabulary."""
    whole: int
    """Entries of the whole vocabulary."""
    stamp: int = 0
    """Below 2^24: a digest of the call that all ranks must have alike, or 0 for none; it rides in the first gather, and
    where one differs every row is NaN."""


def in_turn(jobs: Iterable[Iterator[None]], most: int) -> None:
    """Run jobs, ``most`` at a time, a step of each in turn: a job pauses when it has started a collective."""
    waiting, active = iter(jobs), deque[Iterator[None]]()
    while True:
        job = next(waiting, None) if len(active) < most else None
        if job is None:
            if not active:
                return
            job = active.popleft()
        if next(job, _ENDED) is not _ENDED:
            active.append(job)


class Chunk:
    """C rows on their way: results of one chunk."""

    def __init__(self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, shard: Shard, parts: Parts):
        self.student, self.teacher, self.weights, self.spec = student, teacher, weights, spec
        self.shard, self.parts = shard, parts

    def steps(self, dlogits: Tensor | None, need_stats: bool, first: bool) -> Iterator[None]:
        """From logits to ``loss``, ``stats``, ``rows`` and the gradient, a pause at each collective."""
        spec, weights, shard = self.spec, self.weights, self.shard
        layout = self.parts.layout(spec, weights, need_stats)
        share = self.parts.norms(self.student, self.teacher, weights, spec, shard.offset, layout)
        gathered = self._gather(share, first)
        yield
        merged = eager_shards.merge(self._received(gathered.wait(), share, first), weights, spec, shard.whole, layout)
        if spec.kernel == "adaptive_kl":
            sides = self.student, self.teacher, spec
            merged = yield from shards_adaptive.adaptive_steps(
                *sides, shard.ranks, merged, dlogits, weights, shard.offset
            )
        else:
            if not layout.online:
                merged = yield from self._sums(merged)
            if self.parts.refines:
                merged = yield from self._again(merged)
            if dlogits is not None:
                self.parts.gradient_(self.student, self.teacher, weights, spec, shard.offset, merged, dlogits)
        if need_stats:
            self.stats = eager_shards.statistics(merged, weights)
        self.loss = eager_shards.losses(merged, weights)
        self.rows = merged.rows

    def gradient(self, numbers: Tensor, dlogits: Tensor) -> None:
        """The gradient alone, from the numbers ``[C, NUMBERS]`` that `steps` left."""
        none = numbers.new_empty(0)
        merged = Merged(Rows(*numbers.unbind(-1)), none, none, none)
        sides, offset = (self.student, self.teacher, self.weights, self.spec), self.shard.offset
        if self.spec.kernel == "adaptive_kl":
            shards_adaptive.gradient_anew_(*sides, offset, merged.rows, dlogits)
        else:
            self.parts.gradient_anew_(*sides, offset, merged, dlogits)

    def _gather(self, share: Tensor, first: bool) -> Pending:
        if not (first and self.shard.stamp):
            return self.shard.ranks.gather(share)
        stamp = share.new_full((1,), float(self.shard.stamp))
        return self.shard.ranks.gather(torch.cat((share.reshape(-1), stamp)))

    def _received(self, parts: Tensor, share: Tensor, first: bool) -> Tensor:
        if not (first and self.shard.stamp):
            return parts
        stamps = parts[:, -1]
        mismatch = DOUBTS[self.shard.ranks.name] = (stamps != stamps[0]).any()
        parts = parts[:, :-1].reshape(-1, *share.shape)
        parts[..., 1] += torch.where(mismatch, torch.nan, 0.0)  # the student's sums
        return parts

    def _sums(self, merged: Merged) -> Generator[None, None, Merged]:
        sums = self.parts.sums(self.student, self.teacher, self.weights, self.spec, merged, None)
        adding = self.shard.ranks.add_(sums)
        yield
        total = adding.wait().double()
        rows = merged.rows._replace(divergence=total[:, 0], total=total[:, 1])
        return merged._replace(rows=rows)

    def _again(self, merged: Merged) -> Generator[None, None, Merged]:
        """Small divergences, whose quick sums leave few digits, and rows with masked entries."""
        rows, (kd, ce, _) = merged.rows, self.weights
        counts = kd != 0 if ce is None else (kd != 0) | (ce != 0)
        again = counts & ~rows.sum_s.isnan() & ~(rows.divergence >= SMALL)
        if not bool(again.any()):
            return merged
        sums = self.parts.sums(self.student, self.teacher, self.weights, self.spec, merged, again)
        adding = self.shard.ranks.add_(sums[again, 0].contiguous())
        yield
        divergence = rows.divergence.masked_scatter(again, adding.wait().double())
        total = rows.total
        if self.spec.kernel == "reverse_kl":
            total = torch.where(again, divergence, total)  # the sum of q log(q / p), as that of q - p is 0
        generic = torch.where(again, 1.0, rows.generic)
        return merged._replace(rows=rows._replace(divergence=divergence, total=total, generic=generic))
