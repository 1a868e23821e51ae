"""Everything that decides how much a token counts, folded into two weights per row.

ignore_index, masks, token weights, shift, reduction, num_items, T^2, ce_weight and kd_weight all end here: kernels see
``w_kd`` and ``w_ce`` (and the labels) and know none of them. A row whose weights are 0 is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels._checks import fail, values_checked


class RowWeights(NamedTuple):
    """What a kernel needs to know about rows: ``kd [N]``, ``ce [N]`` or None, ``labels [N]`` int64 or None."""

    kd: Tensor
    ce: Tensor | None
    labels: Tensor | None


@dataclass(frozen=True)
class TokenOptions:
    """The options of `distillation_loss` that speak about tokens; see there."""

    labels: Tensor | None
    token_weights: Tensor | None
    shift: bool
    ignore_index: int
    kd_weight: float
    ce_weight: float
    reduction: str
    num_items: int | float | Tensor | None
    kd_factor: float  # T^2 with temperature_scaling="t2", else 1
    divide_last: bool  # the mean's divisor stays out of the row weights: a float16 gradient over 10^4 tokens is all 0


def row_weights(
    options: TokenOptions, leading: torch.Size, device: torch.device, dtype: torch.dtype, vocab: int
) -> tuple[RowWeights, Tensor, Tensor | None]:
    """Weights of the N = prod(leading) rows, and which of them count.

    Args:
        options: see `TokenOptions`.
        leading: leading shape of the logits.
        device: where the rows live.
        dtype: dtype of the loss, float32 or float64.
        vocab: entries of the vocabulary; labels must be below it.

    Returns:
        `RowWeights`, a bool tensor ``[N]``, and the divisor that is still to be applied to the sum of the losses (None
        where the weights hold it). Where the device allows no look at values (GPU, torch.compile), a negative or NaN
        weight becomes NaN and a label out of range is left to the kernel, which makes the row NaN.
    """
    labels = (
        None if options.labels is None else _next_token(options.labels.to(torch.int64), options, options.ignore_index)
    )
    weight = None if options.token_weights is None else _next_token(options.token_weights.to(dtype), options, 0.0)
    if labels is None and weight is None and not options.shift and not torch.compiler.is_compiling():
        return _all_alike(options, leading.numel(), device, dtype)
    counted = torch.ones(leading, dtype=torch.bool, device=device)
    if options.shift:
        counted[..., -1:] = False
    if labels is not None:
        counted = counted & (labels != options.ignore_index)
    if weight is not None:
        counted = counted & (weight != 0)
    _check_values(labels, weight, counted, vocab)
    row = counted.to(dtype)
    if weight is not None:
        row = torch.where(counted, torch.where(weight > 0, weight, torch.nan), 0.0)
    divisor = _denominator(options.num_items, counted, dtype) if options.reduction == "mean" else None
    if divisor is not None and not options.divide_last:
        row, divisor = row / divisor, None
    kd = (row * (options.kd_weight * options.kd_factor)).reshape(-1)
    ce = (row * options.ce_weight).reshape(-1) if options.ce_weight != 0 else None
    return RowWeights(kd, ce, None if labels is None else labels.reshape(-1)), counted.reshape(-1), divisor


def _all_alike(
    options: TokenOptions, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[RowWeights, Tensor, Tensor | None]:
    """`row_weights` where no token differs from another: the usual call without labels, in two small tensors."""
    weight, divisor = options.kd_weight * options.kd_factor, None
    if options.reduction == "mean":
        items = max(rows, 1) if options.num_items is None else options.num_items
        if options.divide_last or isinstance(items, Tensor):
            divisor = torch.as_tensor(items, dtype=dtype, device=device)
        else:
            weight /= items
    kd = torch.full((rows,), weight, dtype=dtype, device=device)
    if divisor is not None and not options.divide_last:
        kd, divisor = kd / divisor, None
    return RowWeights(kd, None, None), torch.ones(rows, dtype=torch.bool, device=device), divisor


def _next_token(values: Tensor, options: TokenOptions, fill: float) -> Tensor:
    """With shift, position i is judged by what stands at i + 1; the last position by nothing (``fill``)."""
    if not options.shift:
        return values
    return torch.cat((values[..., 1:], torch.full_like(values[..., :1], fill)), -1)


def _denominator(num_items: int | float | Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor:
    if num_items is None:
        return counted.sum().clamp(min=1).to(dtype)
    return torch.as_tensor(num_items, dtype=dtype, device=counted.device)


def _check_values(labels: Tensor | None, weight: Tensor | None, counted: Tensor, vocab: int) -> None:
    if torch.compiler.is_compiling() or (counted.device.type != "cpu" and not values_checked()):
        return
    if labels is not None:
        wrong = counted & ((labels < 0) | (labels >= vocab))
        if wrong.any():
            remedy = (
                "mark tokens that do not count with ignore_index, and check that labels and vocab_size belong together"
            )
            fail(ValueError, "labels", int(labels[wrong][0]), f"in [0, {vocab}) or ignore_index", remedy)
    if weight is not None:
        wrong = ~(weight >= 0) | torch.isinf(weight)
        if wrong.any():
            fail(
                ValueError,
                "token_weights",
                float(weight[wrong][0]),
                "finite and >= 0",
                "use 0 for tokens that do not count",
            )
