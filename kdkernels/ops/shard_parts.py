"""The three parts of a row in vocabulary shards, in the backends that serve them; see `kdkernels.eager_shards`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels import eager_shards, leaves, native
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
        return Layout.of(weights, spec, need_stats)

    def norms(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, layout: Layout
    ) -> Tensor:
        """This rank's share of C rows ``[C, columns]``, in the dtype of the loss."""
        return eager_shards.norms(student, teacher, weights, spec, offset, layout)

    def sums(
        self,
        student: Side,
        teacher: Side,
        weights: RowWeights,
        spec: RowSpec,
        merged: Merged[Rows],
        again: Tensor | None,
    ) -> Tensor:
        """This rank's sums of term and grad ``[C, 2]``."""
        return eager_shards.sums(student, teacher, spec, merged.rows)

    def gradient_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged[Rows],
        dlogits: Tensor,
    ) -> None:  # fmt: skip
        """Writes this rank's columns of the gradient; ``dlogits`` may be ``student.x``."""
        eager_shards.gradient_(student, teacher, weights, spec, offset, merged.rows, dlogits)

    def gradient_anew_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged[Rows],
        dlogits: Tensor,
    ) -> None:  # fmt: skip
        """`gradient_` where `sums` has not been called on these logits."""
        self.gradient_(student, teacher, weights, spec, offset, merged, dlogits)


class CppParts(Parts):
    """The parts as native CPU kernels; see csrc/shards.h."""

    refines = True

    def __init__(self, room: Tensor | None) -> None:
        """``room [C, kept_width]``: grad is kept there between the sums and the gradient, or computed again."""
        self._room = room

    def layout(self, spec: RowSpec, weights: RowWeights, need_stats: bool) -> Layout:
        """Forward and reverse KL come out of the normalisers' sweep."""
        return super().layout(spec, weights, need_stats)._replace(online=spec.kernel in ONLINE)

    def norms(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, layout: Layout
    ) -> Tensor:
        rows = weights.kd.shape[0]
        self._share = student.x.new_zeros((rows, len(SHARE)), dtype=torch.float32)
        places = torch.zeros((rows, 2), dtype=torch.int64) if layout.stats else None
        if spec.vocab:
            given = _given(student, teacher, weights, spec, offset)
            leaves.shard_norms_(*given, self._share, layout.cold, places)
        else:
            self._share[:, [SHARE.index(name) for name in ("top_s", "top_t", "label")]] = -torch.inf
        picked = [SHARE.index(name) for name in layout.columns() if not name.startswith("place")]
        share = self._share[:, picked]
        return share if places is None else torch.cat((share, places.to(torch.int32).view(torch.float32)), -1)

    def sums(
        self,
        student: Side,
        teacher: Side,
        weights: RowWeights,
        spec: RowSpec,
        merged: Merged[Rows],
        again: Tensor | None,
    ) -> Tensor:
        rows = weights.kd.shape[0]
        made = torch.zeros((rows, 2), dtype=torch.float32)
        if spec.vocab:
            given = _given(student, teacher, weights, spec, 0)
            leaves.shard_sums_(*given, self._share, _table(merged), again, self._kept(spec, rows), made)
        return made

    def gradient_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged[Rows],
        dlogits: Tensor,
    ) -> None:  # fmt: skip
        self._write(student, teacher, weights, spec, offset, merged, self._kept(spec, len(dlogits)), dlogits)

    def gradient_anew_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged[Rows],
        dlogits: Tensor,
    ) -> None:  # fmt: skip
        self.norms(student, teacher, weights, spec, offset, Layout(False, False, False, False))
        self._write(student, teacher, weights, spec, offset, merged, None, dlogits)

    def _write(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged[Rows],
        kept: Tensor | None, dlogits: Tensor,
    ) -> None:  # fmt: skip
        if spec.vocab == 0:
            dlogits.zero_()
            return
        given = _given(student, teacher, weights, spec, offset)
        leaves.shard_gradient_(*given, self._share, _table(merged), kept, dlogits)

    def _kept(self, spec: RowSpec, rows: int) -> Tensor | None:
        return None if self._room is None or not spec.vocab else self._room[:rows].view(torch.float32)


SHARE = ("top_s", "sum_s", "top_t", "sum_t", "cross", "label", "cold", "heat_s", "heat_t", "careful")
"""Columns of what a shard knows of a row, as csrc/shards.h counts them."""


def _table(merged: Merged[Rows]) -> Tensor:
    return torch.stack(merged.rows, -1)


def _given(student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int) -> tuple[Any, ...]:
    """The arguments that the native leaves have in common."""
    number = native.kernel_id(spec.kernel)
    return (
        student.x, teacher.x, student.bias, teacher.bias,
        student.scale, student.softcap, teacher.scale, teacher.softcap,
        weights.kd, weights.ce, weights.labels, number, spec.a, spec.b, spec.temperature, spec.vocab, offset,
    )  # fmt: skip


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
        self,
        student: Side,
        teacher: Side,
        weights: RowWeights,
        spec: RowSpec,
        merged: Merged[Rows],
        again: Tensor | None,
    ) -> Tensor:
        from kdkernels.triton import shard_host

        return shard_host.sums(student, teacher, weights, spec, _for_triton(merged.rows, spec).norms)

    def gradient_(
        self, student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, merged: Merged[Rows],
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


ONLINE = ("forward_kl", "reverse_kl")
"""Divergences whose sums come with the normalisers (backend "cpp")."""


def kept_width(backend: str, spec: RowSpec, itemsize: int) -> int | None:
    """Columns of the room of a row that its grad is kept in, in numbers of ``itemsize`` bytes; None: it never is."""
    if backend != "cpp" or spec.kernel in ONLINE:
        return None
    return leaves.shard_kept_stride(spec.vocab) * 4 // itemsize


def parts_of(backend: str, room: Tensor | None) -> Parts:
    """The parts for chunks that are at work one after another; ``room`` as `kept_width` says, or None."""
    if backend == "cpp":
        return CppParts(room)
    return TritonParts() if backend in ("triton", "cuda") else Parts()
