"""Leaves and losses of the three forms, for tests of autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from cases import linear, pair
from torch import Tensor

import kdkernels as kd

LABELS = torch.tensor([[3, 0, -100], [10, 7, 7]])


def small(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(z.reshape(2, 3, 11) for z in pair("ordinary", 6, 11, dtype))  # type: ignore[return-value]


Make = Callable[..., tuple[list[Tensor], Tensor]]


def dense(**options: Any) -> tuple[list[Tensor], Tensor]:
    """Leaves and the loss of logits."""
    student, teacher = small(options.pop("dtype", torch.float32))
    student.requires_grad_()
    return [student], kd.distillation_loss(student, teacher, "jsd", labels=LABELS, ce_weight=0.5, **options)


def dense_inplace(**options: Any) -> tuple[list[Tensor], Tensor]:
    student, teacher = small(options.pop("dtype", torch.float32))
    student.requires_grad_()
    options = {"labels": LABELS, "ce_weight": 0.5, "inplace": True, **options}
    return [student], kd.distillation_loss(student * 1, teacher, "jsd", **options)


def fused(**options: Any) -> tuple[list[Tensor], Tensor]:
    """Leaves and the loss of hidden states and a head, in two chunks."""
    dtype = options.pop("dtype", torch.float32)
    side, teacher = linear(6, 8, 11, dtype, bias=True), linear(6, 5, 11, dtype, seed=2)
    side, teacher = (dataclasses.replace(x, hidden=x.hidden.reshape(2, 3, -1)) for x in (side, teacher))
    leaves = [x.requires_grad_() for x in (side.hidden, side.weight, side.bias) if x is not None]
    options = {"chunk_bytes": 2 * 11 * dtype.itemsize * 3, "labels": LABELS, "ce_weight": 0.5, **options}
    return leaves, kd.distillation_loss(side, teacher, "jsd", **options)


MAKES = [dense, dense_inplace, fused]


def close(a: list[Tensor], b: list[Tensor], factor: Tensor | float = 1.0) -> bool:
    return all((x - factor * y).norm() <= 1e-6 * (factor * y).norm() for x, y in zip(a, b, strict=True))


def gradients(leaves: list[Tensor], loss: Tensor, *arriving: Tensor, **options: Any) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, leaves, *arriving, **options)]
