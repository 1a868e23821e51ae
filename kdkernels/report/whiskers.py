"""Values with their intervals on one scale, a line each: plain HTML, so that a phone shows the words in full size."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdkernels.evaluation.compare_result import Estimate

STYLE = """
.w { display: grid; grid-template-columns: minmax(6rem, 14rem) 1fr auto; gap: .1rem .75rem; align-items: center; }
.w .g { grid-column: 1 / -1; color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.w .t { position: relative; height: 1.1rem; background: var(--raised); border-radius: .2rem; overflow: hidden; }
.w .t i { position: absolute; top: .45rem; height: .2rem; border-radius: .1rem; opacity: .55; }
.w .t b { position: absolute; top: .25rem; width: .6rem; height: .6rem; margin-left: -.3rem; border-radius: 50%; }
.w .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .9rem; }
@media (max-width: 34rem) { .w { grid-template-columns: minmax(4rem, 7rem) 1fr auto; gap: .1rem .4rem; } }
"""


@dataclass(frozen=True)
class Whisker:
    """A labelled value; `group` begins a new heading where it differs from the line before."""

    label: str
    estimate: Estimate
    colour: int = 0
    group: str = ""


def whiskers(caption: str, rows: Sequence[Whisker], bounds: tuple[float, float] | None = None, digits: int = 3) -> str:
    """A figure; the scale goes from the lowest to the highest end, 0 included unless bounds are given."""
    ends = [v for row in rows for v in (row.estimate.value, row.estimate.low, row.estimate.high) if v is not None]
    ends = [v for v in ends if math.isfinite(v)]
    low, high = bounds or (min([0.0, *ends]), max([0.0, *ends]))
    span = (high - low) or 1.0
    parts, group = [], ""
    for row in rows:
        if row.group != group:
            parts.append(f'<div class="g">{html.escape(row.group)}</div>')
            group = row.group
        parts.append(_line(row, low, span, digits))
    return f'<figure><figcaption>{html.escape(caption)}</figcaption><div class="w">{"".join(parts)}</div></figure>'


def _line(row: Whisker, low: float, span: float, digits: int) -> str:
    def at(value: float) -> float:
        return 100 * min(max((value - low) / span, 0.0), 1.0)

    e, colour = row.estimate, f"background:var(--c{row.colour})"
    bar = ""
    if e.value is not None and e.low is not None and e.high is not None:
        bar = f'<i style="left:{at(e.low):.2f}%;width:{max(at(e.high) - at(e.low), 0.3):.2f}%;{colour}"></i>'
    dot = "" if e.value is None or not math.isfinite(e.value) else f'<b style="left:{at(e.value):.2f}%;{colour}"></b>'
    number = html.escape(number_of(e, digits))
    return f'<div>{html.escape(row.label)}</div><div class="t">{bar}{dot}</div><div class="n">{number}</div>'


def number_of(estimate: Estimate, digits: int = 3) -> str:
    """ "value (low to high)" with so many decimals; fewer for large numbers; "–" where unknown."""
    if estimate.value is None or not math.isfinite(estimate.value):
        return "–"
    digits = max(0, min(digits, digits - int(math.log10(max(abs(estimate.value), 1.0)))))
    text = f"{estimate.value:,.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({estimate.low:,.{digits}f} to {estimate.high:,.{digits}f})"
