"""Sums of per-token columns by domain, slice and cluster of documents: as large for a million tokens as for one.

A slice is a domain as a whole, its tokens at some positions, or its tokens of some frequency. Documents are what is
drawn again for intervals; beyond `CLUSTERS` of them in a domain, document d lies in cluster d modulo `CLUSTERS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdkernels.evaluation.calibration import bins_of
from kdkernels.evaluation.intervals import Array
from kdkernels.evaluation.sweep import BOTH, OWN, TEACHER

CLUSTERS = 256
FREQUENCIES = (1e-2, 1e-3, 1e-4)
FREQUENCY_NAMES = ("over 1 %", "0.1 to 1 %", "0.01 to 0.1 %", "under 0.01 %")


@dataclass(frozen=True)
class Layout:
    """Which number stands where. models: the students' names and "teacher"; length: tokens of a block."""

    models: tuple[str, ...]
    length: int
    bins: int

    @property
    def names(self) -> tuple[str, ...]:
        """Columns "MODEL.NAME", and "tokens" last."""
        own = [f"{m}.{name}" for m in self.models for name in (*OWN, *(() if m == TEACHER else BOTH))]
        return (*own, "tokens")

    @property
    def positions(self) -> tuple[str, ...]:
        """Tokens of context before the predicted one, in powers of two."""
        count = max(1, math.floor(math.log2(max(self.length - 1, 1))) + 1)
        return tuple("1" if i == 0 else f"{2**i} to {2 ** (i + 1) - 1}" for i in range(count))

    @property
    def slices(self) -> int:
        """The whole, the positions, the frequencies."""
        return 1 + len(self.positions) + len(FREQUENCY_NAMES)


class Tally:
    """Sums of one domain: `sums` [slices, CLUSTERS, columns], `bins` [slices, CLUSTERS, models, bins, 3], float64.

    The three numbers of a bin: tokens, confidence, accuracy.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        shape = (layout.slices, CLUSTERS)
        self.sums = torch.zeros(*shape, len(layout.names), dtype=torch.float64)
        self.bins = torch.zeros(*shape, len(layout.models), layout.bins, 3, dtype=torch.float64)
        self.broken = 0
        """Tokens whose likelihood or divergence is NaN."""

    def add(
        self, columns: Mapping[str, Mapping[str, Tensor]], documents: Tensor, context: Tensor, share: Tensor
    ) -> None:
        """Take in n tokens: columns [n] by model, document numbers [n], tokens of context [n] (1 and more), the
        relative frequency of the predicted token [n]."""
        layout = self.layout
        table = torch.stack(
            [columns[m][n] for m, n in (name.split(".") for name in layout.names[:-1])] + [torch.ones_like(share)], 1
        ).double()
        self.broken += int(torch.stack([columns[m]["nll"].isnan() for m in layout.models if m != TEACHER]).any(0).sum())
        position = torch.frexp(context.double()).exponent.long() - 1  # floor of log2, exact
        band = torch.stack([share < limit for limit in FREQUENCIES]).sum(0)
        clusters = documents % CLUSTERS
        count = len(layout.positions)
        for place in (torch.zeros_like(clusters), 1 + position.clamp(max=count - 1), 1 + count + band):
            self._add(table, place * CLUSTERS + clusters, columns)

    def _add(self, table: Tensor, rows: Tensor, columns: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.sums.view(-1, self.sums.shape[-1]).index_add_(0, rows, table)
        flat = self.bins.view(-1, 3)
        for number, model in enumerate(self.layout.models):
            confidence, accuracy = (columns[model][name].double() for name in ("confidence", "accuracy"))
            known = ~(confidence.isnan() | accuracy.isnan())
            cell = (rows * len(self.layout.models) + number) * self.layout.bins + bins_of(confidence, self.layout.bins)
            values = torch.stack([torch.ones_like(confidence), confidence, accuracy], 1)
            flat.index_add_(0, cell[known], values[known])

    def clusters(self) -> tuple[Array, int]:
        """[C, F]: what was summed, flat, by cluster of documents that has any token; and C."""
        used = (self.sums[0, :, -1] > 0).nonzero().squeeze(-1)
        sums = self.sums[:, used].permute(1, 0, 2).flatten(1)
        bins = self.bins[:, used].permute(1, 0, 2, 3, 4).flatten(1)
        return torch.cat([sums, bins], 1).numpy(), len(used)

    def slices_filled(self) -> list[int]:
        """Per slice the clusters that have a token in it."""
        return [int(n) for n in (self.sums[..., -1] > 0).sum(1)]


def unflatten(values: Array, layout: Layout) -> tuple[Array, Array]:
    """Rows [..., F] of `Tally.clusters` back to sums [..., slices, columns] and bins [..., slices, models, bins, 3]."""
    lead, width = values.shape[:-1], layout.slices * len(layout.names)
    sums = values[..., :width].reshape(*lead, layout.slices, len(layout.names))
    return sums, values[..., width:].reshape(*lead, layout.slices, len(layout.models), layout.bins, 3)


def frequencies(tokens: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]) -> Tensor:
    """Relative frequency [V'] of every token id among these tokens, float32."""
    size = max((int(t.max()) for t in tokens if len(t)), default=-1) + 1
    counts = torch.zeros(size, dtype=torch.int64)
    for part in tokens:
        counts += torch.from_numpy(np.bincount(part, minlength=size))
    return (counts / counts.sum().clamp(min=1)).float()
