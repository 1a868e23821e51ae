"""Calibration of next-token predictions: is a model right as often as it is confident?

Confidence is the probability of the most likely token; expected calibration error (ECE) is the mean over bins of equal
width, weighted by their tokens, of |accuracy - confidence| (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kdkernels.evaluation.intervals import Array

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Tokens whose confidence lies in [low, high): how many, their mean confidence and accuracy, None without any."""

    low: float
    high: float
    tokens: int
    confidence: float | None
    accuracy: float | None


def bins_of(confidence: Tensor, bins: int) -> Tensor:
    """Bin number [n], int64, of confidences [n] in [0, 1]; NaN goes to the first (the caller drops it)."""
    return (confidence.nan_to_num() * bins).long().clamp(0, bins - 1)


def expected_error(sums: Array) -> Array:
    """ECE [...] from bins [..., bins, 3] of (tokens, sum of confidence, sum of accuracy); NaN without tokens."""
    total = sums[..., 0].sum(-1)
    with np.errstate(invalid="ignore"):
        found: Array = np.abs(sums[..., 1] - sums[..., 2]).sum(-1) / np.where(total > 0, total, np.nan)
    return found


def curve(sums: Array) -> tuple[Bin, ...]:
    """The reliability curve of bins [bins, 3]."""
    count = len(sums)
    return tuple(
        Bin(
            i / count, (i + 1) / count, int(n), float(confidence / n) if n else None, float(right / n) if n else None
        )
        for i, (n, confidence, right) in enumerate(sums)
    )  # fmt: skip
