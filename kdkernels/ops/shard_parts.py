"""The three parts of a row in vocabulary shards, in the backends that serve them; see `kdkernels.eager_shards`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels import eager_shards
from kdkernels.eager_shards import Layout, Merged, Rows

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.weights import RowWeights


class Parts:
    """The parts in plain torch; other backends override them. One object serves one chunk at a time."""

    refines = False
    """Whether rows of small divergence are summed again, with ``again`` saying which."""

    def layout(self, spec: RowSpec, weights: RowWeights, need_stats: bool) -> Layout:
        """What a row sends."""
        label = weights.labels is not None and (weights.ce is not None or need_stats)
        return Layout(False, label, label and spec.temperature != 1, need_stats)

    def norms(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, layout: Layout
    ) -> Tensor:
        """This rank's share of C rows ``[C, columns]``, in the dtype of the loss."""
        return eager_shards.norms(student, teacher, weights, spec, offset, layout)

    def sums(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, merged: Merged, again: Tensor | None
    ) -> Tensor:
        """This rank's sums of term and grad ``[C, 2]``."""
        return eager_shards.sums(student, teacher, spec, merged.rows)

    def gradient_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged,
        dlogits: Tensor,
    ) -> None:  # fmt: skip
        """Writes this rank's columns of the gradient; ``dlogits`` may be ``student.x``."""
        eager_shards.gradient_(student, teacher, weights, spec, offset, merged.rows, dlogits)

    def gradient_anew_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged,
        dlogits: Tensor,
    ) -> None:  # fmt: skip
        """`gradient_` where `sums` has not been called on these logits."""
        self.gradient_(student, teacher, weights, spec, offset, merged, dlogits)


class TritonParts(Parts):
    """The parts as Triton kernels."""

    def norms(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, layout: Layout
    ) -> Tensor:
        from kdkernels.triton import shard_host

        made, places = shard_host.norms(student, teacher, weights, spec, offset, layout.stats)
        picked = [0, 1, 2, 3] + [7] * layout.label + [4] * layout.cold
        columns = [made[:, picked]]
        if layout.stats:
            assert places is not None
            columns += [made[:, 5:7] * math.log(2), places.to(torch.int32).view(torch.float32)]
        return torch.cat(columns, -1)

    def sums(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, merged: Merged, again: Tensor | None
    ) -> Tensor:
        from kdkernels.triton import shard_host

        return shard_host.sums(student, teacher, weights, spec, _for_triton(merged.rows, spec).norms)

    def gradient_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged,
        dlogits: Tensor,
    ) -> None:  # fmt: skip
        from kdkernels.triton import shard_host

        total = merged.rows.total.float()
        shard_host.gradient_(student, teacher, weights, spec, offset, _for_triton(merged.rows, spec), total, dlogits)


def _for_triton(rows: Rows, spec: RowSpec) -> Any:
    """The row's numbers as Triton's kernels take them; those of entropies and nll they do not read."""
    from kdkernels.triton import shard_host

    sides = (rows.top_s, rows.sum_s), (rows.top_t, rows.sum_t)
    natural = (shard_host._natural(top, total, 1 / spec.temperature) for top, total in sides)
    columns = [column for pair in natural for column in pair]
    none = rows.top_s.new_empty(0)
    cold = torch.stack((rows.top_s, rows.cold), -1).float()
    return shard_host.Merged(torch.stack(columns, -1).float(), cold, none, none)


@contextlib.contextmanager
def parts_of(backend: str, slots: int, rows: int, vocab: int, like: Tensor) -> Iterator[list[Parts]]:
    """One object for each chunk that is at work at a time, with room for ``rows`` rows of ``vocab`` columns."""
    yield [TritonParts() if backend in ("triton", "cuda") else Parts() for _ in range(slots)]
