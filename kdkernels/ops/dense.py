"""``kdkernels::dense``: the divergence of N rows of logits, with its gradient from the same call.

Bytes per (student, teacher) pair of an element: both read once from memory (twice or three times from cache), the
gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels import memory
from kdkernels.ops.library import (
    EVERY_DEVICE,
    LIBRARY,
    anchors,
    once_differentiable,
    register_row_autograd,
    scale_by_incoming,
    summed,
)
from kdkernels.ops.rows import STATS, RowSpec, Side, accumulation_dtype, divergence_rows_
from kdkernels.weights import RowWeights

LIBRARY.define(
    "dense(Tensor student, Tensor teacher, Tensor w_kd, Tensor? w_ce, Tensor? labels, str kernel, float a, float b, "
    "float temperature, SymInt vocab, str backend, bool per_row, bool need_grad, bool need_stats) "
    "-> (Tensor loss, Tensor dlogits, Tensor stats)"
)


def outputs(student: Tensor, need_grad: bool, need_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised loss ``[N]``, gradient like ``student`` and statistics ``[N, 6]``, ``[0]`` where not wanted."""
    n, acc = student.shape[0], accumulation_dtype(student.dtype)
    loss = student.new_empty((n,), dtype=acc)
    dlogits = memory.empty(tuple(student.shape) if need_grad else (0,), student.dtype, student.device)
    stats = student.new_empty((n, STATS) if need_stats else (0,), dtype=acc)
    return loss, dlogits, stats


def dense(
    student: Tensor,
    teacher: Tensor,
    w_kd: Tensor,
    w_ce: Tensor | None,
    labels: Tensor | None,
    kernel: str,
    a: float,
    b: float,
    temperature: float,
    vocab: int,
    backend: str,
    per_row: bool,
    need_grad: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, its gradient, statistics.

    Args:
        student, teacher: logits ``[N, >= vocab]``, same dtype, unit stride along the vocabulary, any row stride.
        w_kd, w_ce: weights of divergence and cross-entropy ``[N]``, float32 (float64 for float64 logits).
        labels: int64 ``[N]``.
        kernel, a, b: element function and its parameters.
        temperature: T > 0.
        vocab: entries that exist; columns beyond are padding.
        backend: one that serves (see `kdkernels.backends`).
        per_row: ``loss`` is ``[N]``, otherwise its sum ``[]``.
        need_grad, need_stats: whether ``dlogits`` and ``stats`` are wanted; empty ``[0]`` otherwise.

    Returns:
        ``loss``, ``dlogits`` (of the sum, or of each row's loss: the same) of the student's shape, ``stats [N, 6]``.
    """
    loss, dlogits, stats = outputs(student, need_grad, need_stats)
    divergence_rows_(
        backend,
        Side(student),
        Side(teacher),
        RowWeights(w_kd, w_ce, labels),
        RowSpec(kernel, a, b, temperature, vocab),
        loss,
        dlogits if need_grad else None,
        stats if need_stats else None,
    )
    return loss if per_row else summed(loss), dlogits, stats


LIBRARY.impl("dense", dense, EVERY_DEVICE)


def fake(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of what an operator returns that takes the student first and these three flags last."""
    per_row, need_grad, need_stats = args[-3:]
    loss, dlogits, stats = outputs(student, need_grad, need_stats)
    return loss if per_row else loss.new_empty(()), dlogits, stats


torch.library.register_fake("kdkernels::dense", fake, lib=LIBRARY)
register_row_autograd("kdkernels::dense", count=14, backend=10)


class InPlace(torch.autograd.Function):
    """An operator on rows that leaves the gradient where the student's logits were: no N x V tensor beside them.

    ``fill(side, loss, dlogits, stats)`` is a row function to which only those arguments are still missing.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, fill: Callable[..., None], backend: str, per_row: bool, need_stats: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.anchors = anchors(student)
        buffer = student.detach()
        loss, _, stats = outputs(student, False, need_stats)
        fill(Side(buffer), loss, buffer, stats if need_stats else None)
        torch.autograd.graph.increment_version(student)
        ctx.mark_non_differentiable(stats)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(buffer)
        return loss if per_row else summed(loss), stats

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return (None,) * 5
        gradient = scale_by_incoming([ctx.saved_tensors[0]], d_loss, ctx.backend)
        return (*once_differentiable([*gradient], ctx.anchors, d_loss), *(None,) * 4)
