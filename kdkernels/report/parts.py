"""What the sections of a report share: gaps, notes, numbers, curves over the steps."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kdkernels.evaluation.compare_result import Estimate
from kdkernels.report.chart import Curve, chart
from kdkernels.report.version import Version
from kdkernels.report.whiskers import number_of

STYLE = """
.gap { border-left: .25rem solid var(--c1); background: var(--raised); padding: .4rem .75rem; border-radius: .2rem; }
.note { color: var(--soft); font-size: .9rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; } code { font-size: .85em; }
@media (max-width: 34rem) { td:first-child { white-space: normal; min-width: 9rem; } }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; background: var(--raised); padding: .75rem; border-radius: .3rem; font-size: .8rem; }
"""
COLOURS = {"before": 5, "student": 0, "teacher": 2}
Section = Callable[[Version], Iterator[str]]


def gap(what: str, how: str) -> str:
    """A marked gap."""
    return f'<p class="gap">Not measured: {html.escape(what)}. <code>{html.escape(how)}</code></p>'


def note(text: str) -> str:
    """A line of explanation."""
    return f'<p class="note">{html.escape(text)}</p>'


def folded(title: str, values: Any) -> str:
    """Plain values as JSON, shown on demand."""
    text = html.escape(json.dumps(values, indent=1, ensure_ascii=False, default=str))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"


def is_number(value: Any) -> bool:
    """An int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def pair(value: float | None, interval: tuple[float, float] | None) -> Estimate:
    """A value and its interval, if it has one."""
    return Estimate(value) if interval is None else Estimate(value, *interval)


def plain(value: Any) -> str:
    """A number as a cell."""
    return number_of(Estimate(float(value))) if is_number(value) else "–"


def course(
    caption: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]], *, steps: bool = False
) -> str:
    rows = [row for row in rows if is_number(row.get("step"))]
    at = [row["step"] for row in rows]
    curves = [
        Curve(label, [row.get(key) if is_number(row.get(key)) else None for row in rows], i % 6, at=at, steps=steps)
        for i, (label, key) in enumerate(columns)
    ]
    return chart(caption, curves, "step")
