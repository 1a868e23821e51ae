"""Vocabulary shards in Triton: launches of the three parts of a row, and the merges between them.

The caller moves numbers between ranks: after `norms` it gathers ``[ranks, N, 8]`` and calls `merge`; after `sums` it
adds ``[N, 2]`` over ranks. Everything else is local. The spec's ``vocab`` is the number of this rank's columns.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.triton import launch, shards
from kdkernels.triton.element import as_triton
from kdkernels.triton.host import form, gradient, numbers, on, side, tiles

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.weights import RowWeights

_MASKED, _HOPELESS = -1e4, -1e20


class Merged(NamedTuple):
    """Row numbers of the whole vocabulary, float32."""

    norms: Tensor
    """``[N, 4]``: student's and teacher's normaliser as (K, r); NaN where a row is no distribution."""
    cold: Tensor
    """``[N, 2]``: the student's largest logit and its sum at temperature 1."""
    entropies: Tensor
    """``[N, 2]``: teacher's and student's, nats."""
    nll: Tensor
    """``[N]``: of the label at temperature 1; meaningless where no rank holds the label."""


def norms(
    student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, places: bool = False
) -> tuple[Tensor, Tensor | None]:
    """This shard's part of the normalisers ``[N, 8]`` and, if wanted, where the largest logits stand, int64 ``[N, 2]``;
    see `kdkernels.triton.shards.norms_kernel`."""
    rows = weights.kd.shape[0]
    made = student.x.new_empty((rows, 8), dtype=torch.float32)
    where = student.x.new_empty((rows, 2), dtype=torch.int64) if places else None
    given = numbers(spec)
    arguments = {
        "norms": made, "places": where, "labels": weights.labels, "offset": offset,
        "vocab": given["vocab"], "c": given["c"], **_weights(weights),
    }  # fmt: skip
    _start(shards.norms_kernel, student, teacher, spec, arguments, rows)
    return made, where


def merge(parts: Tensor, spec: RowSpec) -> Merged:
    """The ranks' ``[ranks, N, 8]`` merged, on every rank alike.

    A shard whose largest logit is -inf has no mass and leaves the others alone; a NaN reaches the row. Sums are
    rescaled in float64: K rounds z / T's normaliser to float32, and r holds the rest.
    """
    part = parts.double().unbind(-1)
    c, per_t = math.log2(math.e) / spec.temperature, 1 / spec.temperature
    top_s, sum_s, heat_s = _merge_side(part[0], part[1], part[5], c)
    top_t, sum_t, heat_t = _merge_side(part[2], part[3], part[6], c)
    _, sum_cold, _ = _merge_side(part[0], part[4], part[5], math.log2(math.e))
    label = part[7].amax(0)
    columns = [*_natural(top_s, sum_s, per_t), *_natural(top_t, sum_t, per_t)]
    log_prob = label - top_s - sum_cold.log()
    nll = torch.where(log_prob < _HOPELESS, -_MASKED, -log_prob)
    entropies = [sums.log() - math.log(2) * heat / sums for sums, heat in ((sum_t, heat_t), (sum_s, heat_s))]
    return Merged(
        torch.stack(columns, -1).float(),
        torch.stack((top_s, sum_cold), -1).float(),
        torch.stack(entropies, -1).float(),
        nll.float(),
    )


def _merge_side(tops: Tensor, sums: Tensor, heats: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum and sum of e x ``[N]`` of ``[ranks, N]``."""
    top = tops.amax(0)  # NaN if any is
    shift = torch.where(tops == -torch.inf, 0.0, tops - top) * c
    scale = torch.where(tops == -torch.inf, 0.0, shift.exp2())
    return top, (sums * scale).sum(0), ((heats + shift * sums) * scale).sum(0)


def _natural(top: Tensor, total: Tensor, per_t: float) -> tuple[Tensor, Tensor]:
    """(K, r) in float64, for the float32 nearest to ``per_t``, by which the kernels multiply; NaN for a sum that is
    none."""
    exact = top * ctypes.c_float(per_t).value + torch.where((total > 0) & (total < torch.inf), total, torch.nan).log()
    rounded = exact.float().double()
    return rounded, exact - rounded


def sums(student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, merged: Tensor) -> Tensor:
    """This shard's sums of term and grad ``[N, 2]`` under the normalisers ``merged [N, 4]``."""
    rows = weights.kd.shape[0]
    made = student.x.new_empty((rows, 2), dtype=torch.float32)
    given, functions = numbers(spec), divergences.elements(spec.kernel)
    arguments = {
        "merged": merged, "sums": made, **_weights(weights),
        **{name: given[name] for name in ("vocab", "per_t", "a", "b")},
        "TERM": as_triton(functions.term), "GRAD": as_triton(functions.grad),
    }  # fmt: skip
    _start(shards.sums_kernel, student, teacher, spec, arguments, rows)
    return made


def gradient_(
    student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int,
    merged: Merged, total: Tensor, dlogits: Tensor,
) -> None:  # fmt: skip
    """Writes this shard's columns of the gradient; ``total [N]`` is the sum of grad over all shards."""
    rows = weights.kd.shape[0]
    given = numbers(spec)
    arguments = {
        **gradient(dlogits), "merged": merged.norms, "totals": total.contiguous(), "cold": merged.cold,
        **_weights(weights), "labels": None if weights.ce is None else weights.labels, "offset": offset,
        **{name: given[name] for name in ("vocab", "per_t", "a", "b")},
        "GRAD": as_triton(divergences.elements(spec.kernel).grad),
        "COLD": weights.ce is not None and spec.temperature != 1,
    }  # fmt: skip
    _start(shards.gradient_kernel, student, teacher, spec, arguments, rows, dlogits)


def _weights(weights: RowWeights) -> dict[str, Any]:
    return {"w_kd": weights.kd, "w_ce": weights.ce}


def _start(
    kernel: Any, student: Side, teacher: Side, spec: RowSpec, arguments: dict[str, Any], rows: int, *others: Tensor
) -> None:
    if rows == 0:
        return
    x = student.x
    sizes = launch.shape(spec.vocab, x.element_size(), False, False, launch.architecture(x.device))
    common = {
        **side("student", student), **side("teacher", teacher), **arguments,
        "FORM_S": form(student), "FORM_T": form(teacher), **tiles(sizes, spec.vocab, x, teacher.x, *others),
    }  # fmt: skip
    with on(x.device):
        launch.start(kernel, (rows, 1, 1), common, sizes.options())
