"""The figures by which versions stand side by side and regressions are judged: name, label, which way is better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kdkernels.evaluation.compare_result import STUDENT, Estimate
from kdkernels.report.version import Version

MORE, LESS, EITHER = 1, -1, 0


@dataclass(frozen=True)
class Figure:
    """An estimate with its label; `better` is +1 where more is better, -1 where less is, 0 where neither."""

    label: str
    estimate: Estimate
    better: int
    digits: int = 3


_WHOLE = (
    ("forward_kl", "KL(teacher‖student), nats a token", LESS),
    ("reverse_kl", "KL(student‖teacher)", LESS),
    ("jsd", "Jensen-Shannon divergence", LESS),
    ("perplexity", "perplexity", LESS),
    ("discrepancy", "perplexity over the teacher's", LESS),
    ("agreement", "same likeliest token", MORE),
    ("overlap", "likeliest tokens in common", MORE),
    ("ece", "calibration error", LESS),
    ("entropy_ratio", "entropy over the teacher's", EITHER),
)
_BY_DOMAIN = ("forward_kl", "perplexity", "discrepancy", "agreement", "ece", "entropy_ratio")
_HELD_OUT = (("kl", "KL", LESS), ("ppl", "perplexity", LESS), ("top1", "same likeliest token", MORE))
_DIVERSITY = (
    ("distinct_2", "distinct word 2-grams", MORE),
    ("self_similarity", "similarity of answers to one another", LESS),
    ("repetition", "repeated 4-grams within an answer", LESS),
    ("stock_share", "share of the teacher's stock phrases", EITHER),
)


def figures(version: Version) -> dict[str, Figure]:
    """All that is known, by name, in the order of a table."""
    return dict(
        [*_compared(version), *_answered(version), *_identity(version), *_diversity(version), *_switch(version),
         *_held_out(version)]
    )  # fmt: skip


def _held_out(version: Version) -> Iterator[tuple[str, Figure]]:
    after = (version.summary or {}).get("after")
    for domain, scores in after.items() if isinstance(after, dict) else ():
        for key, label, better in _HELD_OUT:
            value = scores.get(key) if isinstance(scores, dict) else None
            if isinstance(value, (int, float)):
                yield f"held_out.{key}.{domain}", Figure(f"end of run: {label}, {domain}", Estimate(value), better)


def _compared(version: Version) -> Iterator[tuple[str, Figure]]:
    found = version.comparison()
    if found is None:
        return
    for name, label, better in _WHOLE:
        yield name, Figure(label, found.overall.get(STUDENT, name), better)
    if len(found.domains) > 1:
        for name, label, better in _WHOLE:
            for domain, part in found.domains.items() if name in _BY_DOMAIN else ():
                yield f"{name}.{domain}", Figure(f"{label}, {domain}", part.get(STUDENT, name), better)


def _answered(version: Version) -> Iterator[tuple[str, Figure]]:
    found = version.similarity()
    if found is None:
        return
    low, high = found.intervals.get("overall") or (None, None)
    yield "rse", Figure("RSE, 1 to 5", Estimate(found.overall, low, high), MORE)
    for name, dataset in found.datasets.items() if len(found.datasets) > 1 else ():
        low, high = dataset.intervals.get("overall") or (None, None)
        yield f"rse.{name}", Figure(f"RSE, {name}", Estimate(dataset.means["overall"], low, high), MORE)


def _identity(version: Version) -> Iterator[tuple[str, Figure]]:
    found = version.identity()
    for name in ("loose", "strict", "hard") if found is not None else ():
        rate = getattr(found, name)
        yield f"ice.{name}", Figure(f"ICE, {name}", Estimate(rate.value, rate.low, rate.high), LESS)


def _diversity(version: Version) -> Iterator[tuple[str, Figure]]:
    found = version.diversity()
    for name, label, better in _DIVERSITY if found is not None else ():
        assert found is not None
        yield name, Figure(label, found.responses.get(name, Estimate(None)), better)


def _switch(version: Version) -> Iterator[tuple[str, Figure]]:
    for row in version.generations[:1]:
        share = row.get("teacher_share")
        if isinstance(share, (int, float)):
            yield "teacher_share", Figure("teacher's share of the tokens (SWITCH)", Estimate(float(share)), EITHER)
