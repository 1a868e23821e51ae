"""Where the quality of a student drops along a sequence: a change-point of a curve over the position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels._checks import fail


@dataclass(frozen=True)
class Change:
    """A curve's most likely break: ``position`` is the first behind it.

    Attributes:
        position: index of the first value after the break.
        before, after: weighted means of the two sides.
        p_value: share of random orders of the same values with a break at least as clear.
    """

    position: int
    before: float
    after: float
    p_value: float


def change_point(
    values: Sequence[float | None],
    weights: Sequence[float] | None = None,
    *,
    least: int = 4,
    level: float = 0.05,
    permutations: int = 999,
    seed: int = 0,
) -> Change | None:
    """The split into two levels that explains most of a curve's variance, if chance would not do as well.

    The statistic is the between-groups sum of squares of the best split; its distribution under no change comes from
    random orders of the (value, weight) pairs. That takes the values as exchangeable: neighbours that depend on each
    other, as the positions of one sequence do, make p too small; means over many sequences suffer little.

    Args:
        values: one a position; None is left out.
        weights: for instance how many sequences each value is the mean of. Default: equal.
        least: values that either side must have.
        level: the largest p-value that counts as a change.
        permutations: random orders drawn.
        seed: of those orders.

    Returns:
        `Change`, or None where there is none (or too few values).
    """
    weights = [1.0] * len(values) if weights is None else weights
    if len(weights) != len(values):
        fail(ValueError, "weights", f"{len(weights)} of them", f"one for each of {len(values)} values")
    known = [i for i, (v, w) in enumerate(zip(values, weights, strict=True)) if v is not None and w > 0]
    if len(known) < 2 * least:
        return None
    x = torch.tensor([values[i] for i in known], dtype=torch.float64)
    w = torch.tensor([weights[i] for i in known], dtype=torch.float64)
    x = x - (x * w).sum() / w.sum()
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(permutations, len(known), generator=generator).argsort(1)
    score = _between(x[None], w[None], least)[0]
    best = int(score.argmax())
    drawn = _between(x[orders], w[orders], least).amax(1)
    p_value = (1 + int((drawn >= score[best]).sum())) / (permutations + 1)
    if p_value > level or float(score[best]) <= 0:
        return None
    split = least + best
    y = torch.tensor([values[i] for i in known], dtype=torch.float64)
    before, after = (float((y[s] * w[s]).sum() / w[s].sum()) for s in (slice(split), slice(split, None)))
    return Change(known[split], before, after, p_value)


def _between(x: Tensor, w: Tensor, least: int) -> Tensor:
    """Sum of squares between the sides of each split, of curves ``[P, n]`` with weighted mean 0."""
    mass, total = w.cumsum(1), w.sum(1, keepdim=True)
    moment = (x * w).cumsum(1)
    score = moment**2 * (1 / mass + 1 / (total - mass).clamp(min=1e-300))
    return score[:, least - 1 : x.shape[1] - least]
