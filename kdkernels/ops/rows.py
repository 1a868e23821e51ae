"""The row function that every operator is a schedule of, in the backends that serve it.

``divergence_rows_`` turns C rows of student and teacher logits into the weighted loss of each row, the gradient with
respect to the student's stored numbers, and statistics. It writes into what it is given and allocates no logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import eager, leaves, native, onchip
from kdkernels.weights import RowWeights

STATS = 6
"""Columns of the statistics: divergence, teacher entropy, student entropy, top-1 agreement, nll, student correct."""


class Side(NamedTuple):
    """One side's stored numbers ``x [C, >= vocab]`` (unit stride along the vocabulary) and how they become logits."""

    x: Tensor
    bias: Tensor | None = None  # [vocab], dtype of the loss
    scale: float = 1.0
    softcap: float = 0.0  # 0: none


class RowSpec(NamedTuple):
    """What stays the same for every row of a call."""

    kernel: str
    a: float
    b: float
    temperature: float
    vocab: int
    mode: str = ""  # of a sparse teacher; see `kdkernels.eager_sparse`


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of losses, weights and statistics: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernel_id(kernel: str) -> int:
    """The native library's number for an element function it serves."""
    number = native.kernel_id(kernel)
    if number is None:
        raise RuntimeError(f"backend 'cpp' cannot compute {kernel!r}: {native.why_not(kernel)}")
    return number


def divergence_rows_(
    backend: str,
    student: Side,
    teacher: Side,
    weights: RowWeights,
    spec: RowSpec,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fill ``loss [C]``, ``dlogits [C, >= vocab]`` (may be ``student.x``) and ``stats [C, 6]`` with one backend."""
    if backend == "cpp":
        leaves.dense_(
            student.x, teacher.x, student.bias, teacher.bias,
            student.scale, student.softcap, teacher.scale, teacher.softcap,
            weights.kd, weights.ce, weights.labels,
            kernel_id(spec.kernel), spec.a, spec.b, spec.temperature, spec.vocab,
            loss, dlogits, stats,
        )  # fmt: skip
        return
    if backend == "triton":
        from kdkernels.triton import host  # imports triton

        host.divergence_rows_(student, teacher, weights, spec, loss, dlogits, stats)
        return
    if backend == "cuda":
        onchip.divergence_rows_(student, teacher, weights, spec, loss, dlogits, stats)
        return
    eager.divergence_rows_(student, teacher, weights, spec, loss, dlogits, stats)
