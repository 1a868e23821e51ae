"""A checked call of `kdkernels.distillation_loss`, on its way to an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdkernels._checks import fail
from kdkernels.chunking import chunk_rows
from kdkernels.logits import LinearLogits
from kdkernels.ops.dense import InPlace
from kdkernels.ops.rows import RowSpec, Side, accumulation_dtype, divergence_rows_
from kdkernels.ops.sparse import SparseRows, sparse_rows_
from kdkernels.sparse_logits import SparseLogits
from kdkernels.weights import RowWeights


@dataclass(frozen=True)
class Call:
    """What every operator is given."""

    spec: RowSpec
    weights: RowWeights
    backend: str
    per_row: bool
    need_stats: bool

    def run(
        self,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits | SparseLogits,
        inplace: bool,
        chunk_bytes: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Losses (``[N]`` or their sum) and statistics (``[N, 6]`` or ``[0]``) from the operator for these forms."""
        if isinstance(teacher, SparseLogits):
            rows = _sparse_rows(teacher, accumulation_dtype(student.dtype))
            if isinstance(student, Tensor):
                return self._from_logits(student, rows, inplace)
            return self._linear_sparse(student, rows, chunk_bytes)
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            return self._from_logits(student, _rows(teacher), inplace)
        return self._linear(student, teacher, chunk_bytes)

    def _from_logits(self, student: Tensor, teacher: Tensor | SparseRows, inplace: bool) -> tuple[Tensor, Tensor]:
        need_grad = torch.is_grad_enabled() and student.requires_grad
        if inplace and need_grad and not torch.compiler.is_compiling():
            return self._in_place(student, teacher)
        flags = (self.backend, self.per_row, need_grad, self.need_stats)
        if isinstance(teacher, SparseRows):
            loss, _, stats = torch.ops.kdkernels.sparse(_rows(student), *teacher, *self.weights, *self.spec, *flags)
        else:
            loss, _, stats = torch.ops.kdkernels.dense(_rows(student), teacher, *self.weights, *self._spec(), *flags)
        return loss, stats

    def _spec(self) -> tuple[str, float, float, float, int]:
        """Without the mode, for operators that know no sparse teacher."""
        return self.spec[:-1]

    def _in_place(self, student: Tensor, teacher: Tensor | SparseRows) -> tuple[Tensor, Tensor]:
        rows = _rows(student)
        _check_in_place(student, rows)
        loss, stats = InPlace.apply(rows, self._filler(teacher), self.backend, self.per_row, self.need_stats)  # type: ignore[no-untyped-call]
        return loss, stats

    def _filler(self, teacher: Tensor | SparseRows) -> Callable[..., None]:
        """The row function, to be called with the student's side, loss, gradient and statistics."""
        if isinstance(teacher, SparseRows):
            return partial(_fill, sparse_rows_, self.backend, teacher, self.weights, self.spec)
        return partial(_fill, divergence_rows_, self.backend, Side(teacher), self.weights, self.spec)

    def _linear(
        self, student: Tensor | LinearLogits, teacher: Tensor | LinearLogits, chunk_bytes: int | None
    ) -> tuple[Tensor, Tensor]:
        rows = math.prod(student.shape[:-1])  # two sides: logits that exist are gathered where not every row counts
        chunk = chunk_rows(rows, 2 * self.spec.vocab * student.dtype.itemsize, chunk_bytes)
        source = _source(student)
        loss, *_, stats = torch.ops.kdkernels.linear(
            *source, *_source(teacher, detach=True), *self.weights, *self._spec(), chunk, self.backend, self.per_row,
            *_needed(source), self.need_stats,
        )  # fmt: skip
        return loss, stats

    def _linear_sparse(
        self, student: LinearLogits, teacher: SparseRows, chunk_bytes: int | None
    ) -> tuple[Tensor, Tensor]:
        rows = math.prod(student.shape[:-1])
        chunk = chunk_rows(rows, self.spec.vocab * student.dtype.itemsize, chunk_bytes)
        source = _source(student)
        loss, *_, stats = torch.ops.kdkernels.linear_sparse(
            *source, *teacher, *self.weights, *self.spec, chunk, self.backend, self.per_row, *_needed(source),
            self.need_stats,
        )  # fmt: skip
        return loss, stats


def _fill(
    function: Callable[..., None],
    backend: str,
    teacher: Side | SparseRows,
    weights: RowWeights,
    spec: RowSpec,
    student: Side,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    function(backend, student, teacher, weights, spec, loss, dlogits, stats)


def _needed(source: _Source) -> list[bool]:
    """Which of the student's input, weight and bias want a gradient."""
    grad = torch.is_grad_enabled()
    return [grad and t is not None and t.requires_grad for t in source[:3]]


def _check_in_place(student: Tensor, rows: Tensor) -> None:
    if student.is_leaf or (student._is_view() and student._base is not None and student._base.is_leaf):
        remedy = "pass the logits that a model computed, or inplace=False"
        fail(ValueError, "inplace", True, "False for a student that is (a view of) a leaf requiring grad", remedy)
    moved = rows.untyped_storage().data_ptr() != student.untyped_storage().data_ptr()
    overlapping = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
    if rows.numel() and (moved or overlapping):
        given = f"True with strides {student.stride()}"
        remedy = "pass logits with evenly spaced rows (shift=True instead of logits[:, :-1]), or inplace=False"
        fail(ValueError, "inplace", given, "False for logits that need a copy", remedy)


_Source = tuple[Tensor, Tensor | None, Tensor | None, float, float]


def _source(side: Tensor | LinearLogits, detach: bool = False) -> _Source:
    """The arguments of ``kdkernels::linear`` that describe one side."""
    if isinstance(side, Tensor):
        return _rows(side), None, None, 1.0, 0.0
    weight, bias = side.weight, side.bias
    if detach:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return _rows(side.hidden), weight, bias, float(side.scale or 1.0), float(side.softcap or 0.0)


def _rows(x: Tensor) -> Tensor:
    """``[..., V]`` as ``[N, V]`` with unit stride along the last dimension: a view where strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _sparse_rows(teacher: SparseLogits, dtype: torch.dtype) -> SparseRows:
    """Rows of the teacher, contiguous, in the dtype of the loss."""
    n, kept = math.prod(teacher.ids.shape[:-1]), teacher.ids.shape[-1]
    return SparseRows(
        teacher.ids.reshape(n, kept).contiguous(),
        teacher.log_probs.reshape(n, kept).to(dtype).contiguous(),
        teacher.log_tail.reshape(n).to(dtype).contiguous(),
    )
