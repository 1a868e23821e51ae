"""The readable definition of selection and of draws, in plain torch: any device, any dtype.

Masses are summed in float64. It sorts whole rows, which is what the other backends exist to avoid; callers give it so
many rows at a time that what it keeps of each (`ROW_BYTES` an entry) stays within their budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels.eager import _bad_rows, _logits

if TYPE_CHECKING:
    from kdkernels.ops.rows import Side


ROW_BYTES = 72
"""Most bytes that either function here holds at a time for an entry of the vocabulary, results apart (measured: 65 for
selection with entropy, 24 for draws)."""


def topk_rows_(
    side: Side, temperature: float, vocab: int, k: int, other_temperatures: Sequence[float],
    ids: Tensor, log_probs: Tensor, log_tail: Tensor, entropy: Tensor | None, other_tails: Tensor | None,
) -> None:  # fmt: skip
    """Fill the results; see `kdkernels.ops.compress.topk_rows_`."""
    z = _logits(side, vocab)
    bad = _bad_rows(z)
    z = torch.where(bad[:, None], 0.0, z).double()
    values, order = z.sort(dim=-1, descending=True, stable=True)  # of equal logits the lower id first
    shifted = values - values[:, :1]
    x = shifted / temperature
    log_sum = torch.logsumexp(x, -1)
    log_tail.copy_(torch.where(bad, torch.nan, _tail(x, k) - log_sum))
    kept = values[:, :k] > -torch.inf
    by_id, place = torch.where(kept, order[:, :k], vocab).sort(-1)
    log_p = torch.where(kept, x[:, :k] - log_sum[:, None], -torch.inf).gather(-1, place)
    ids.copy_(torch.where(bad[:, None] | (by_id == vocab), -1, by_id))
    log_probs.copy_(torch.where(bad[:, None], torch.nan, log_p))
    if entropy is not None:
        log_all = x - log_sum[:, None]
        terms = torch.where(log_all == -torch.inf, 0.0, log_all.exp() * log_all)
        entropy.copy_(torch.where(bad, torch.nan, -terms.sum(-1)))
    for i, other in enumerate(other_temperatures):
        if other_tails is not None:
            x = shifted / other
            other_tails[:, i] = torch.where(bad, torch.nan, _tail(x, k) - torch.logsumexp(x, -1))


def _tail(x: Tensor, k: int) -> Tensor:
    """Log of the mass beyond the k first, summed from those entries themselves."""
    return torch.logsumexp(x[:, k:], -1) if k < x.shape[1] else x.new_full((x.shape[0],), -torch.inf)


def draw_rows_(side: Side, temperature: float, vocab: int, uniforms: Tensor, ids: Tensor) -> None:
    """Fill ``ids``; see `kdkernels.ops.compress.draw_rows_`."""
    z = _logits(side, vocab)
    bad = _bad_rows(z)
    z = torch.where(bad[:, None], 0.0, z)
    found = invert(((z - z.amax(-1, keepdim=True)).double() / temperature).exp(), uniforms)
    ids.copy_(torch.where(bad[:, None], -1, found))


def invert(mass: Tensor, uniforms: Tensor) -> Tensor:
    """The entry of rows ``mass [N, V]`` at which the cumulative mass first exceeds ``uniforms [N, n]`` times the whole.

    int64 ``[N, n]``; -1 for a number outside of [0, 1).
    """
    mass = mass.cumsum(-1)
    total = mass[:, -1:].contiguous()
    found = torch.searchsorted(mass, uniforms * total, right=True)
    last = torch.searchsorted(mass, total)  # the last with any mass: rounding must not lead beyond
    valid = (uniforms >= 0) & (uniforms < 1)
    return torch.where(valid, torch.minimum(found, last), -1)
