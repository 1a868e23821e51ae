"""Some rows on their way through the parts of a row in vocabulary shards, with a pause at each collective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdkernels import eager_shards, eager_sparse_shards
from kdkernels.collectives import DOUBTS, Ranks
from kdkernels.eager_shards import AnyRows, Layout, Merged, Rows
from kdkernels.eager_sparse_shards import SparseNumbers
from kdkernels.ops import shards_adaptive
from kdkernels.ops.rows import RowSpec, Side
from kdkernels.ops.shard_parts import Parts
from kdkernels.ops.sparse import SparseRows
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


class Chunk(ABC):
    """C rows on their way: results of one chunk."""

    loss: Tensor
    stats: Tensor
    rows: tuple[Tensor, ...]

    def __init__(self, student: Side, weights: RowWeights, spec: RowSpec, shard: Shard) -> None:
        self.student, self.weights, self.spec, self.shard = student, weights, spec, shard

    @abstractmethod
    def steps(self, dlogits: Tensor | None, need_stats: bool, first: bool) -> Iterator[None]:
        """From logits to ``loss``, ``stats``, ``rows`` and the gradient, a pause at each collective."""

    @abstractmethod
    def gradient(self, numbers: Tensor, dlogits: Tensor) -> None:
        """The gradient alone, from the numbers ``[C, columns]`` that `steps` left in ``rows``."""

    def _gather(self, share: Tensor, first: bool) -> Generator[None, None, Tensor]:
        """Every rank's ``share [ranks, C, columns]``; the stamp rides along in the first one."""
        stamped = first and self.shard.stamp
        sent = torch.cat((share.reshape(-1), share.new_full((1,), float(self.shard.stamp)))) if stamped else share
        gathered = self.shard.ranks.gather(sent)
        yield
        parts = gathered.wait()
        if not stamped:
            return parts
        stamps = parts[:, -1]
        mismatch = DOUBTS[self.shard.ranks.name] = (stamps != stamps[0]).any()
        parts = parts[:, :-1].reshape(-1, *share.shape)
        parts[..., 1] += torch.where(mismatch, torch.nan, 0.0)  # the student's sums
        return parts

    def _finish(self, merged: Merged[AnyRows], need_stats: bool) -> None:
        if need_stats:
            self.stats = eager_shards.statistics(merged, self.weights)
        self.loss = eager_shards.losses(merged, self.weights)
        self.rows = merged.rows


class SparseChunk(Chunk):
    """Against a sparse teacher, whose rows every rank has."""

    def __init__(self, student: Side, teacher: SparseRows, weights: RowWeights, spec: RowSpec, shard: Shard) -> None:
        super().__init__(student, weights, spec, shard)
        self.teacher = teacher

    def steps(self, dlogits: Tensor | None, need_stats: bool, first: bool) -> Iterator[None]:
        student, teacher, weights, spec, shard = self.student, self.teacher, self.weights, self.spec, self.shard
        layout = Layout.of(weights, spec, need_stats)
        share = eager_sparse_shards.norms(student, teacher, weights, spec, shard.offset, layout)
        parts = yield from self._gather(share, first)
        merged = eager_sparse_shards.merge(parts, teacher, weights, spec, shard.whole, layout)
        adding = shard.ranks.add_(eager_sparse_shards.sums(student, teacher, spec, shard.offset, merged.rows))
        yield
        merged = eager_sparse_shards.complete(merged, adding.wait(), teacher, spec, shard.whole)
        if dlogits is not None:
            self._write(merged.rows, dlogits)
        self._finish(merged, need_stats)

    def gradient(self, numbers: Tensor, dlogits: Tensor) -> None:
        self._write(SparseNumbers(*numbers.unbind(-1)), dlogits)

    def _write(self, numbers: SparseNumbers, dlogits: Tensor) -> None:
        offset, whole = self.shard.offset, self.shard.whole
        eager_sparse_shards.gradient_(
            self.student, self.teacher, self.weights, self.spec, offset, whole, numbers, dlogits
        )


class DenseChunk(Chunk):
    """Against the same columns of the teacher."""

    def __init__(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, shard: Shard, parts: Parts
    ) -> None:
        super().__init__(student, weights, spec, shard)
        self.teacher, self.parts = teacher, parts

    def steps(self, dlogits: Tensor | None, need_stats: bool, first: bool) -> Iterator[None]:
        spec, weights, shard = self.spec, self.weights, self.shard
        layout = self.parts.layout(spec, weights, need_stats)
        share = self.parts.norms(self.student, self.teacher, weights, spec, shard.offset, layout)
        gathered = yield from self._gather(share, first)
        merged = eager_shards.merge(gathered, weights, spec, shard.whole, layout)
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
        self._finish(merged, need_stats)

    def gradient(self, numbers: Tensor, dlogits: Tensor) -> None:
        none = numbers.new_empty(0)
        merged = Merged(Rows(*numbers.unbind(-1)), none, none, none)
        sides, offset = (self.student, self.teacher, self.weights, self.spec), self.shard.offset
        if self.spec.kernel == "adaptive_kl":
            shards_adaptive.gradient_anew_(*sides, offset, merged.rows, dlogits)
        else:
            self.parts.gradient_anew_(*sides, offset, merged, dlogits)

    def _sums(self, merged: Merged[Rows]) -> Generator[None, None, Merged[Rows]]:
        sums = self.parts.sums(self.student, self.teacher, self.weights, self.spec, merged, None)
        adding = self.shard.ranks.add_(sums)
        yield
        total = adding.wait().double()
        rows = merged.rows._replace(divergence=total[:, 0], total=total[:, 1])
        return replace(merged, rows=rows)

    def _again(self, merged: Merged[Rows]) -> Generator[None, None, Merged[Rows]]:
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
        return replace(merged, rows=rows._replace(divergence=divergence, total=total, generic=generic))
