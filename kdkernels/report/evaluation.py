"""The page of an evaluation, and the same as plain values: did the distillation work, where, did the student suffer?"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import Any

from kdkernels.evaluation.compare_result import BEFORE, CHANGE, STUDENT
from kdkernels.report import course, judged, parts, whiskers, white_box
from kdkernels.report.headline import EITHER, Figure, figures
from kdkernels.report.page import page, table
from kdkernels.report.regression import Check
from kdkernels.report.version import REPORT, Version
from kdkernels.report.whiskers import number_of

SECTIONS: tuple[tuple[str, parts.Section], ...] = (
    ("Training", course.training),
    ("Gap to the teacher, by domain", white_box.domains),
    ("Where in the text", white_box.places),
    ("Calibration and entropy", white_box.calibration),
    ("Domains drawn (DDK)", course.factors),
    ("Who speaks (SWITCH)", course.switch),
    ("Answers like the teacher's (RSE)", judged.similarity),
    ("Identity (ICE)", judged.identity),
    ("Diversity and redundancy", judged.diversity),
    ("Answers", judged.answers),
    ("Configuration", course.configuration),
)
_MARKS = {"worse": "▼ worse", "as good": "as good", "unknown": "– unknown", "missing": "▼ missing"}


def evaluation_page(versions: Sequence[Version], checks: Sequence[Check] = (), baseline: Version | None = None) -> str:
    """One page of all versions; `checks` hold the first against `baseline`."""
    every = [*versions, *([baseline] if baseline is not None else [])]
    body = ["<h1>What the student has taken over</h1>"]
    for version in versions:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in verdicts(version))
        head = f"<h3>{html.escape(version.name)}</h3>" if len(versions) > 1 else ""
        body.append(head + f"<ul>{lines}</ul>")
    if checks and baseline is not None:
        body += [f"<h2>Beside {html.escape(baseline.name)}</h2>", _checks(checks)]
    body += ["<h2>Versions</h2>", _versions(every)]
    for title, section in SECTIONS:
        inside = []
        for version in versions:
            shown = "".join(section(version))
            if shown:
                head = f"<h3>{html.escape(version.name)}</h3>" if len(versions) > 1 else ""
                inside.append(head + shown)
        if inside:
            body += [f"<h2>{html.escape(title)}</h2>", *inside]
    names = ", ".join(version.name for version in versions)
    return page(f"kdkernels report: {names}", "\n".join(body), parts.STYLE + whiskers.STYLE)


def verdicts(version: Version) -> Iterator[str]:
    """The answers in words, as far as they are known."""
    yield from _gap_closed(version)
    found, before = version.similarity(), version.similarity(before=True)
    if found is not None and found.overall is not None:
        text = f"RSE {found.overall:.2f} of 5"
        if before is not None and before.overall is not None:
            text += f", {before.overall:.2f} before"
        yield text + (" (by a proxy)." if found.judge.get("proxy") else ".")
    identity = version.identity()
    if identity is not None and identity.loose.value is not None:
        yield f"{identity.loose.value:.0%} of the answers about itself contradict its identity."
    comparison, diversity = version.comparison(), version.diversity()
    if comparison is not None:
        where = ", ".join(comparison.collapsed)
        yield f"Entropy has collapsed in: {where}." if where else "No collapse of entropy."
    if diversity is not None and diversity.references:
        poor = ", ".join(name.replace("_", " ") for name in diversity.collapsed)
        yield f"Answers plainly poorer than the teacher's: {poor}." if poor else "Answers as diverse as the teacher's."
    lacking = [
        name for name, there in (("white-box comparison", comparison), ("RSE", found), ("ICE", identity)) if not there
    ]
    if lacking:
        yield f"Not measured: {', '.join(lacking)}."


def _gap_closed(version: Version) -> Iterator[str]:
    """KL before and after by domain."""
    found = version.comparison()
    if found is not None and BEFORE in found.overall.figures:
        for name, part in found.domains.items():
            old, new, change = (part.get(m, "forward_kl") for m in (BEFORE, STUDENT, CHANGE))
            if old.value and new.value is not None:
                sure = change.high is None or change.high < 0 or (change.low or 0) > 0
                yield (
                    f"{name}: KL to the teacher {old.value:.3f} before, {new.value:.3f} after "
                    f"({new.value / old.value - 1:+.0%}{'' if sure else ', within the noise'})."
                )
        return
    summary = version.summary or {}
    before, after = summary.get("before"), summary.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return
    for name, scores in after.items():
        old_kl, new_kl = (before.get(name) or {}).get("kl"), scores.get("kl")
        if parts.is_number(new_kl) and not math.isfinite(new_kl):
            yield f"{name}: KL to the teacher is no number after the run."
        elif parts.is_number(old_kl) and old_kl and parts.is_number(new_kl):
            yield f"{name}: KL to the teacher {old_kl:.3f} before, {new_kl:.3f} after ({new_kl / old_kl - 1:+.0%})."


def _versions(versions: Sequence[Version]) -> str:
    """A row for each figure, a column for each version; the best is marked where it stands clear of the others."""
    columns = [figures(version) for version in versions]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return parts.gap("anything to compare", "kdkernels evaluate")
    rows = []
    for name in names:
        shown = [column.get(name) for column in columns]
        label = next(figure.label for figure in shown if figure is not None)
        best = _best(shown)
        cells = [
            ("–" if f is None else number_of(f.estimate)) + (" ★" if i == best else "") for i, f in enumerate(shown)
        ]
        rows.append((label, *cells))
    note = parts.note("★ best, and clear of every other's interval.") if len(versions) > 1 else ""
    return table(("", *[version.name for version in versions]), rows) + note


def _best(shown: Sequence[Figure | None]) -> int | None:
    known = [(i, f) for i, f in enumerate(shown) if f is not None and f.estimate.value is not None]
    if len(known) < 2 or known[0][1].better == EITHER:
        return None
    way = known[0][1].better
    place, first = max(known, key=lambda item: way * (item[1].estimate.value or 0.0))
    others = [f for i, f in known if i != place]
    clear = all(way * (_end(first, -way) - _end(f, way)) > 0 for f in others)
    return place if clear else None


def _end(figure: Figure, way: int) -> float:
    e = figure.estimate
    end = e.high if way > 0 else e.low
    return float((e.value if end is None else end) or 0.0)


def _checks(checks: Sequence[Check]) -> str:
    failed = sum(c.failed for c in checks)
    head = (
        f"{failed} of {len(checks)} figures are worse beyond their intervals, or missing."
        if failed
        else "Nothing is worse."
    )
    rows = [
        (
            c.label,
            _cell(c.old),
            _cell(c.new),
            _cell(c.worse_by),
            _cell(c.allowed),
            f"{_MARKS[c.verdict]} {c.reason}".strip(),
        )
        for c in checks
    ]
    return f"<p>{html.escape(head)}</p>" + table(("", "old", "new", "worse by", "allowed", ""), rows)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def evaluation_json(
    versions: Sequence[Version], checks: Sequence[Check] = (), baseline: Version | None = None
) -> dict[str, Any]:
    """Everything the page shows as plain values."""
    every = [*versions, *([baseline] if baseline is not None else [])]
    return {
        "kind": REPORT,
        "version": 1,
        "baseline": None if baseline is None else baseline.name,
        "checks": [{**vars(c), "failed": c.failed} for c in checks],
        "versions": [
            {
                "name": version.name,
                "path": str(version.path),
                "verdicts": list(verdicts(version)),
                "figures": {
                    name: {"label": f.label, **vars(f.estimate), "better": f.better}
                    for name, f in figures(version).items()
                },
                "config": version.config,
                "summary": version.summary,
                "log": version.log,
                "results": {name: result.to_dict() for name, result in version.results.items()},
                "generations": version.generations,
                "problems": version.problems,
            }
            for version in every
        ],
    }
