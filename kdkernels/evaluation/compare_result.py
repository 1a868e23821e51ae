"""The result of `compare_models`, and the arithmetic from sums over tokens to figures with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdkernels.evaluation.calibration import Bin, curve, expected_error
from kdkernels.evaluation.intervals import Array, Interval, expanded, resampled_sums
from kdkernels.evaluation.results import Result
from kdkernels.evaluation.sweep import BOTH, OWN, TEACHER
from kdkernels.evaluation.tally import FREQUENCY_NAMES, Layout, Tally, unflatten

STUDENT, BEFORE, CHANGE = "student", "before", "change"
_OWN = ("nll", "perplexity", "accuracy", "entropy", "confidence", "ece")
_BOTH = (*BOTH, "discrepancy", "entropy_gap", "entropy_ratio")
_SHARES = {name: (0.0, 1.0) for name in ("accuracy", "agreement", "overlap", "confidence", "ece")}
_BOUNDS = {**_SHARES, "jsd": (0.0, math.log(2)), "forward_kl": (0.0, math.inf), "reverse_kl": (0.0, math.inf)}


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; value is None where it cannot be known, low and high below two documents."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Slice:
    """Figures over `tokens` tokens of `documents` documents, by model ("student", "before", "teacher", "change") and
    name. A change is student less before, its interval that of the paired difference.

    Of every model: nll (nats a token), perplexity, accuracy (of its likeliest token), entropy (nats), confidence (of
    its likeliest token), ece. Of a student: forward_kl = KL(teacher‖student), reverse_kl, jsd (nats a token), agreement
    (same likeliest token), overlap (share of the k likeliest tokens in common), discrepancy (its perplexity over the
    teacher's, DDK's), entropy_gap (its entropy less the teacher's) and entropy_ratio.
    """

    tokens: int
    documents: int
    figures: dict[str, dict[str, Estimate]]

    def get(self, model: str, name: str) -> Estimate:
        """One figure; an `Estimate` of None where the result has none."""
        return self.figures.get(model, {}).get(name, Estimate(None))


@dataclass(frozen=True)
class ComparisonResult(Result):
    """Teacher and student (and the student before) on the same tokens.

    overall: all tokens; domains; positions: by tokens of context before the predicted one; frequencies: by the relative
    frequency of the predicted token among the texts. calibration: reliability curve by model, over all tokens.
    collapsed: where the student's entropy lies below `collapse` of the teacher's, beyond the interval.
    Intervals at `level`, over documents drawn again in domains.
    """

    kind = "kdkernels.compare_models"

    overall: Slice
    domains: dict[str, Slice]
    positions: dict[str, Slice]
    frequencies: dict[str, Slice]
    calibration: dict[str, tuple[Bin, ...]]
    collapsed: tuple[str, ...]
    collapse: float
    teacher: str
    student: str
    before: str
    from_cache: bool
    top_k: int
    block_size: int
    level: float
    resamples: int
    seed: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def _inner(cls, values: dict[str, Any]) -> dict[str, Any]:
        groups = {
            group: {name: _slice(s) for name, s in values[group].items()}
            for group in ("domains", "positions", "frequencies")
        }
        calibration = {model: tuple(Bin(**b) for b in bins) for model, bins in values["calibration"].items()}
        return {
            **values, **groups, "overall": _slice(values["overall"]), "calibration": calibration,
            "collapsed": tuple(values["collapsed"]), "warnings": tuple(values["warnings"]),
        }  # fmt: skip


def _slice(values: Mapping[str, Any]) -> Slice:
    figures = {
        model: {name: Estimate(**e) for name, e in estimates.items()} for model, estimates in values["figures"].items()
    }
    return Slice(values["tokens"], values["documents"], figures)


@dataclass(frozen=True)
class Summary:
    """What tallies say: the slices of a `ComparisonResult`, and the reliability curves."""

    overall: Slice
    domains: dict[str, Slice]
    positions: dict[str, Slice]
    frequencies: dict[str, Slice]
    calibration: dict[str, tuple[Bin, ...]]


def summarise(tallies: Mapping[str, Tally], layout: Layout, *, level: float, resamples: int, seed: int) -> Summary:
    """Figures and intervals of each domain, and of all domains together: their documents drawn again within each."""
    names = sorted(tallies)
    whole, draws, clusters = _sum_of(tallies, names, resamples, seed)
    filled = [sum(n) for n in zip(*(t.slices_filled() for t in tallies.values()), strict=True)]
    slices = _slices(whole, draws, filled, clusters, layout, level)
    domains = {}
    for number, name in enumerate(names):
        rows, count = tallies[name].clusters()
        own = _draw(rows, count, resamples, [seed, number])
        filled_here = tallies[name].slices_filled()
        domains[name] = _slices(rows.sum(0), own, filled_here, count, layout, level, only=1)[0]
    count = len(layout.positions)
    _, bins = unflatten(whole, layout)
    calibration = {model: curve(bins[0, m]) for m, model in enumerate(layout.models) if bins[0, m, :, 0].sum() > 0}
    return Summary(
        slices[0],
        {name: domains[name] for name in tallies},
        {n: s for n, s in zip(layout.positions, slices[1 : 1 + count], strict=True) if s.tokens},
        {n: s for n, s in zip(FREQUENCY_NAMES, slices[1 + count :], strict=True) if s.tokens},
        calibration,
    )


def _sum_of(
    tallies: Mapping[str, Tally], names: Sequence[str], resamples: int, seed: int
) -> tuple[Array, Array | None, int]:
    """Sums over domains [F], replicates [R, F] (None where a domain has one document), clusters to reckon with."""
    whole: Any = 0.0
    draws: Any = 0.0
    clusters = 1
    for number, name in enumerate(names):
        rows, count = tallies[name].clusters()
        whole = whole + rows.sum(0)
        own = _draw(rows, count, resamples, [seed, number])
        draws = None if own is None or draws is None else draws + own
        clusters += count - 1
    return whole, draws, clusters


def _draw(rows: Array, count: int, resamples: int, seed: Sequence[int]) -> Array | None:
    """Replicates [R, F] of the sum over clusters."""
    return None if count < 2 else resampled_sums(rows, resamples=resamples, seed=seed)


def _slices(
    whole: Array,
    draws: Array | None,
    filled: Sequence[int],
    clusters: int,
    layout: Layout,
    level: float,
    only: int | None = None,
) -> list[Slice]:
    """A `Slice` each (the first `only`) from sums [F] and replicates [R, F]."""
    sums, bins = unflatten(whole, layout)
    count = layout.slices if only is None else only
    values = figures(sums[:count], bins[:count], layout)
    spread = None
    if draws is not None:
        more, cells = unflatten(draws, layout)
        spread = figures(more[:, :count], cells[:, :count], layout)
    found = []
    for i in range(count):
        documents = min(filled[i], clusters)
        estimates = {
            model: {
                name: _estimate(
                    value[i],
                    None if spread is None else spread[model][name][:, i],
                    documents,
                    level,
                    _bounds(model, name),
                    biased=name == "ece",
                )
                for name, value in group.items()
            }
            for model, group in values.items()
        }
        found.append(Slice(int(sums[i, -1]), filled[i], estimates))
    return found


def _bounds(model: str, name: str) -> Interval:
    return (-math.inf, math.inf) if model == CHANGE else _BOUNDS.get(name, (-math.inf, math.inf))


def _estimate(
    value: float, draws: Array | None, documents: int, level: float, bounds: Interval, *, biased: bool
) -> Estimate:
    if not math.isfinite(value):
        return Estimate(None)
    if draws is None or documents < 2:
        return Estimate(float(value))
    known = draws[np.isfinite(draws)]  # a rare slice may be missing from a replicate
    if len(known) < len(draws) / 2:
        return Estimate(float(value))
    if biased:  # noise adds to absolute differences: replicates lie above the estimate by a bias, taken out
        known = known - known.mean() + value
    low, high = expanded(known, documents, level, bounds)
    return Estimate(float(value), min(low, float(value)), max(high, float(value)))


def figures(sums: Array, bins: Array, layout: Layout) -> dict[str, dict[str, Array]]:
    """Figures [...] by model and name from sums [..., columns] and bins [..., models, bins, 3]; NaN where unknown."""
    tokens = np.where(sums[..., -1] > 0, sums[..., -1], np.nan)
    column = {name: sums[..., i] / tokens for i, name in enumerate(layout.names)}
    found: dict[str, dict[str, Array]] = {}
    for number, model in enumerate(layout.models):
        own = {name: column[f"{model}.{name}"] for name in OWN}
        with np.errstate(over="ignore"):
            own["perplexity"] = np.exp(own["nll"])
        own["ece"] = expected_error(bins[..., number, :, :])
        if model != TEACHER:
            own |= {name: column[f"{model}.{name}"] for name in BOTH}
            own |= _beside(own, {name: column[f"{TEACHER}.{name}"] for name in OWN})
        order = (*_OWN, *(() if model == TEACHER else _BOTH))
        found[model] = {name: own[name] for name in order}
    if BEFORE in found:
        found[CHANGE] = {name: found[STUDENT][name] - found[BEFORE][name] for name in found[STUDENT]}
    return found


def _beside(student: Mapping[str, Array], teacher: Mapping[str, Array]) -> dict[str, Array]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return {
            "discrepancy": np.exp(student["nll"] - teacher["nll"]),
            "entropy_gap": student["entropy"] - teacher["entropy"],
            "entropy_ratio": student["entropy"] / teacher["entropy"],
        }
