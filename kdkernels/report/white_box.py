"""Sections about teacher and student on the same tokens: by domain, by place, calibration and entropy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdkernels.evaluation.compare_result import BEFORE, STUDENT, ComparisonResult, Estimate, Slice
from kdkernels.evaluation.sweep import TEACHER
from kdkernels.report.chart import Curve, chart
from kdkernels.report.page import table
from kdkernels.report.parts import COLOURS, gap, is_number, note, plain
from kdkernels.report.version import Version
from kdkernels.report.whiskers import Whisker, number_of, whiskers

_COMPARE = "kdkernels evaluate compare --run RUN"


def domains(version: Version) -> Iterator[str]:
    """The gap to the teacher by domain, before and after."""
    found = version.comparison()
    if found is not None:
        yield from _compared_domains(found)
        return
    after = (version.summary or {}).get("after")
    if isinstance(after, dict) and after:
        yield from _scored_domains((version.summary or {}).get("before") or {}, after)
    yield gap("divergences, calibration and entropy with intervals", _COMPARE)


def _compared_domains(found: ComparisonResult) -> Iterator[str]:
    models = [m for m in (BEFORE, STUDENT) if m in found.overall.figures]
    yield note(
        f"{found.overall.tokens:,} tokens of {found.overall.documents:,} documents; {found.level:.0%} intervals over "
        f"documents. Teacher: {found.teacher}; student: {found.student}"
        + (f"; before: {found.before}." if found.before else ".")
    )
    yield from (note(f"Note: {warning}.") for warning in found.warnings)
    for name, caption in (("forward_kl", "KL(teacher‖student), nats a token."),
                          ("discrepancy", "Perplexity over the teacher's (DDK's discrepancy).")):  # fmt: skip
        rows = [Whisker(m, part.get(m, name), COLOURS[m], domain) for domain, part in _parts(found) for m in models]
        yield whiskers(caption, rows)
    yield _figures(found, models)
    if BEFORE not in models:
        yield gap("the student before distillation", _COMPARE + " --before every:2 (or a folder)")


def _parts(found: ComparisonResult) -> list[tuple[str, Slice]]:
    return [*found.domains.items(), *([("all domains", found.overall)] if len(found.domains) > 1 else [])]


def _figures(found: ComparisonResult, models: Sequence[str]) -> str:
    heads = ["", *[f"{name}, {model}" for name, _ in _parts(found) for model in (*models, TEACHER)]]
    names = ("forward_kl", "reverse_kl", "jsd", "perplexity", "discrepancy", "agreement", "overlap", "accuracy",
             "confidence", "ece", "entropy", "entropy_ratio")  # fmt: skip
    rows = [
        [
            name.replace("_", " "),
            *[number_of(_value(part.get(m, name))) for _, part in _parts(found) for m in (*models, TEACHER)],
        ]
        for name in names
    ]
    return f"<details><summary>All figures by domain</summary>{table(heads, rows)}</details>"


def _known(value: Any) -> Estimate:
    return Estimate(float(value) if is_number(value) else None)


def _value(estimate: Estimate) -> Estimate:
    return Estimate(estimate.value)


def _scored_domains(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    yield note("Held-out text at the end of the run; no intervals.")
    for key, caption in (
        ("kl", "KL(teacher‖student), nats a token."),
        ("top1", "Same likeliest token as the teacher."),
    ):
        rows = [
            Whisker(label, _known(scores.get(key)), COLOURS[label], name)
            for name, after_scores in after.items()
            for label, scores in (("before", before.get(name) or {}), (STUDENT, after_scores))
        ]
        yield whiskers(caption, rows)
    heads = ("", "perplexity before", "after", "teacher", "tokens")
    cells = [
        (name, plain((before.get(name) or {}).get("ppl")), *[plain(s.get(k)) for k in ("ppl", "teacher_ppl", "tokens")])
        for name, s in after.items()
    ]
    yield table(heads, cells)


def places(version: Version) -> Iterator[str]:
    """Where in the text: by position, by frequency."""
    found = version.comparison()
    if found is None:
        return
    models = [m for m in (BEFORE, STUDENT) if m in found.overall.figures]
    for parts, caption in (
        (found.positions, "by tokens of context"),
        (found.frequencies, "by frequency of the predicted token"),
    ):
        rows = [Whisker(m, part.get(m, "forward_kl"), COLOURS[m], name) for name, part in parts.items() for m in models]
        yield whiskers(f"KL(teacher‖student), nats a token, {caption}.", rows)


def calibration(version: Version) -> Iterator[str]:
    """Reliability curves, ECE, entropy."""
    found = version.comparison()
    if found is None:
        yield gap("calibration and entropy", _COMPARE)
        return
    curves = [Curve("exact", [0.0, 1.0], 5, dashed=True, at=[0.0, 100.0])]
    for model, bins in found.calibration.items():
        known = [b for b in bins if b.confidence is not None and b.accuracy is not None]
        curves.append(Curve(model, [b.accuracy for b in known], {BEFORE: 4}.get(model, COLOURS[model]),
                            at=[100 * (b.confidence or 0.0) for b in known]))  # fmt: skip
    yield chart("Accuracy over confidence of the likeliest token.", curves, "confidence, %", (0.0, 1.0))
    models = [m for m in (BEFORE, STUDENT, TEACHER) if m in found.overall.figures]
    for name, caption in (("ece", "Expected calibration error."), ("entropy", "Entropy of the predictions, nats.")):
        yield whiskers(
            caption, [Whisker(m, part.get(m, name), COLOURS[m], d) for d, part in _parts(found) for m in models]
        )
    ratio = found.overall.get(STUDENT, "entropy_ratio")
    where = ", ".join(found.collapsed)
    verdict = f"collapsed in: {where}" if where else "no collapse"
    yield note(
        f"Student's entropy over the teacher's: {number_of(ratio)}; {verdict} (flagged below {found.collapse:g})."
    )
