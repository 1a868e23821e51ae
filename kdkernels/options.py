"""The options of `kdkernels.distillation_loss` as types; their meaning is documented there."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class FixedOptions(TypedDict, total=False):
    """Options that stay the same from batch to batch."""

    temperature: float
    temperature_scaling: str
    ce_weight: float
    kd_weight: float
    ignore_index: int
    shift: bool
    reduction: str
    vocab_size: int | None
    group: object | None
    sparse_mode: str
    chunk_bytes: int | None
    backend: str
    inplace: bool


class LossOptions(FixedOptions, total=False):
    """All options but ``return_stats``."""

    labels: Tensor | None
    token_weights: Tensor | None
    num_items: int | float | Tensor | None
