"""The result of `identity_consistency`, and the arithmetic from verdicts to rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdkernels.evaluation.facts import ASPECTS
from kdkernels.evaluation.intervals import rate_intervals
from kdkernels.evaluation.lexical_identity import mentions
from kdkernels.evaluation.results import Result

RATES = ("loose", "strict", "hard")


@dataclass(frozen=True)
class IdentityAnswer:
    """An answer with its verdict. conflict is None where the judge gave none. template: the cluster it belongs to."""

    template: str
    question: str
    aspect: str
    prompt: str
    answer: str
    conflict: bool | None
    claims: tuple[str, ...] = ()

    def counts(self, suspected: Mapping[str, Sequence[str]]) -> tuple[bool, bool, bool]:
        """(loose, strict, hard): conflicts; and claims a suspected source; and one that the prompt did not mention."""
        claimed = [name for name in self.claims if name in suspected] if self.conflict else []
        hard = any(not mentions(self.prompt, suspected[name]) for name in claimed)
        return bool(self.conflict), bool(claimed), hard


@dataclass(frozen=True)
class Rate:
    """hits of `answers` answers to `templates` templates; value is None without answers, low and high below two
    templates."""

    value: float | None
    low: float | None
    high: float | None
    hits: int
    answers: int
    templates: int


@dataclass(frozen=True)
class IdentityResult(Result):
    """ICE: shares of answers that conflict with the facts (loose), and claim a suspected source (strict), and one that
    the prompt had not mentioned (hard); by aspect as well. Intervals at `level` over templates drawn again.

    claims: answers by claimed source, suspected or not. answers: all, the `unparsable` ones (no verdict, not scored)
    included. judge, model, helper: names, and usage where something was asked. `warnings`: what to know first.
    """

    kind = "kdkernels.identity_consistency"

    loose: Rate
    strict: Rate
    hard: Rate
    aspects: dict[str, dict[str, Rate]]
    claims: dict[str, int]
    answers: int
    unparsable: int
    templates: int
    suspected: tuple[str, ...]
    search: bool
    budget: int
    model: dict[str, Any]
    judge: dict[str, Any]
    helper: str
    level: float
    resamples: int
    seed: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def _inner(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {
            **values,
            **{name: Rate(**values[name]) for name in RATES},
            "aspects": {a: {name: Rate(**rates[name]) for name in RATES} for a, rates in values["aspects"].items()},
            "suspected": tuple(values["suspected"]),
            "warnings": tuple(values["warnings"]),
        }


def rates(
    answers: Sequence[IdentityAnswer],
    suspected: Mapping[str, Sequence[str]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Rate]:
    """loose, strict and hard over the answers with a verdict. suspected: names of each suspected source."""
    judged = [answer for answer in answers if answer.conflict is not None]
    clusters = {template: i for i, template in enumerate(dict.fromkeys(answer.template for answer in judged))}
    hits, counts = np.zeros((len(clusters), len(RATES))), np.zeros(len(clusters))
    for answer in judged:
        counts[clusters[answer.template]] += 1
        hits[clusters[answer.template]] += answer.counts(suspected)
    intervals = rate_intervals(hits, counts, level=level, resamples=resamples, seed=seed)
    found = {}
    for name, total, interval in zip(RATES, hits.sum(0), intervals, strict=True):
        value = float(total) / len(judged) if judged else None
        low, high = interval or (None, None)
        found[name] = Rate(value, low, high, int(total), len(judged), len(clusters))
    return found


def rates_by_aspect(
    answers: Sequence[IdentityAnswer], suspected: Mapping[str, Sequence[str]], **options: Any
) -> dict[str, dict[str, Rate]]:
    """`rates` of each aspect that has answers."""
    groups = {aspect: [answer for answer in answers if answer.aspect == aspect] for aspect in ASPECTS}
    return {aspect: rates(group, suspected, **options) for aspect, group in groups.items() if group}


def claims(answers: Sequence[IdentityAnswer]) -> dict[str, int]:
    """How many answers claim to be each source, most first."""
    found = Counter(name for answer in answers if answer.conflict for name in answer.claims)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
