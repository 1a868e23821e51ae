"""Curves over a position as SVG, drawn with the page's colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 8, 8, 28


@dataclass(frozen=True)
class Curve:
    """Values at x = 0, 1, 2, ..., or at the ascending x in ``at``; None leaves a gap. ``mark`` is an x at which a
    vertical line stands; ``steps`` keeps a value up to the next x."""

    name: str
    values: Sequence[float | None]
    colour: int = 0
    dashed: bool = False
    mark: int | None = None
    at: Sequence[float] | None = None
    steps: bool = False

    @property
    def places(self) -> Sequence[float]:
        """The x of every value."""
        return range(len(self.values)) if self.at is None else self.at


@dataclass(frozen=True)
class _Frame:
    """From values to pixels."""

    last: float
    low: float
    high: float

    def x(self, at: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * at / (self.last or 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share


def chart(caption: str, curves: Sequence[Curve], x_label: str, bounds: tuple[float, float] | None = None) -> str:
    """A figure with its caption and a legend.

    Args:
        caption: text above the figure.
        curves: drawn in their order.
        x_label: text under the axis.
        bounds: lowest and highest value shown; default: those of the curves.
    """
    known = [v for c in curves for v in c.values if v is not None and math.isfinite(v)]
    low, high = bounds or (min(known, default=0.0), max(known, default=1.0))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    step = _round_step(high - low, 4)
    if bounds is None:
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    frame = _Frame(max([x for c in curves for x in c.places], default=0), low, high)
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    inside = "".join([*_axes(frame, ticks, x_label), *(part for c in curves for part in _drawn(c, frame))])
    legend = " ".join(
        f'<span style="color:var(--c{c.colour})">{"┄" if c.dashed else "━"} {html.escape(c.name)}</span>'
        for c in curves
    )
    return (
        f"<figure><figcaption>{html.escape(caption)} {legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(caption)}" font-size="10" '
        f'font-family="system-ui, sans-serif">{inside}</svg></figure>'
    )


def _round_step(span: float, parts: int) -> float:
    """1, 2 or 5 times a power of ten: about ``parts`` of them make ``span``."""
    power = 10.0 ** math.floor(math.log10(span / parts))
    return next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= parts * 1.5)


def _axes(frame: _Frame, ticks: Sequence[float], x_label: str) -> list[str]:
    parts = []
    for value in ticks:
        y = frame.y(value)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{round(value, 9):g}", "end"))
    for at in range(0, int(frame.last) + 1, max(1, round(_round_step(max(frame.last, 1), 6)))):
        parts.append(_text(frame.x(at), HEIGHT - _BOTTOM + 14, str(at), "middle"))
    parts.append(_text(WIDTH - _RIGHT, HEIGHT - 2, x_label, "end"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--soft)">{html.escape(text)}</text>'


def _drawn(curve: Curve, frame: _Frame) -> list[str]:
    colour, dash = f"var(--c{curve.colour})", ' stroke-dasharray="5 4"' if curve.dashed else ""
    path, pen_down = [], False
    for at, value in zip(curve.places, curve.values, strict=True):
        if value is None or not math.isfinite(value):
            pen_down = False
            continue
        y = frame.y(min(max(value, frame.low), frame.high))
        # a lone point is a line of no length, which round ends make a dot
        stair = f"H{frame.x(at):.1f}" if curve.steps and pen_down else ""
        path.append(stair + f"{'L' if pen_down else 'M'}{frame.x(at):.1f} {y:.1f}" + ("" if pen_down else "h0"))
        pen_down = True
    shape = 'fill="none" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round"'
    parts = [f'<path d="{"".join(path)}" stroke="{colour}" {shape}{dash}/>'] if path else []
    if curve.mark is not None:
        x = frame.x(curve.mark)
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"'
        parts.append(f'<line class="mark" {line} stroke="{colour}" stroke-width="1.2" stroke-dasharray="2 3"/>')
    return parts
