"""The page of a generation: who spoke, how far student and teacher were apart, where the student's quality drops."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kdkernels.report import chart, passages
from kdkernels.report.chart import Curve
from kdkernels.report.page import page, table
from kdkernels.report.passages import Passage, Token
from kdkernels.switch.drops import Change, change_point
from kdkernels.switch.output import SwitchOutput

_COLUMNS = ("jsd", "threshold", "student_log_probs", "teacher_log_probs")
_STYLE = """
.side { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.side > div { min-width: 0; }
.key .tok { padding: 0 .3rem; }
"""


@dataclass(frozen=True)
class Study:
    """What one student (or one setting) generated from a set of prompts.

    Attributes:
        name: of the checkpoint.
        settings: how it was generated, for the reader.
        output: every response.
        passages: the same as text, in the order of the prompts.
    """

    name: str
    settings: dict[str, Any]
    output: SwitchOutput
    passages: Sequence[Passage] = field(repr=False)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`SwitchOutput.summary`."""
        return self.output.summary()

    @cached_property
    def changes(self) -> dict[str, Change | None]:
        """Where divergence and log-likelihood ratio change level along the response, by `change_point`."""
        by = self.summary["by_position"]
        return {name: change_point(by[name], by["rows"]) for name in ("jsd", "log_likelihood_ratio")}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the text, for JSON."""
        changes = {name: None if c is None else vars(c) for name, c in self.changes.items()}
        return {"name": self.name, "settings": self.settings, **self.summary, "changes": changes}


def passages_of(output: SwitchOutput, tokenizer: Any) -> list[Passage]:
    """The rows of a batch as text."""
    numbers = {name: getattr(output, name).tolist() for name in _COLUMNS}
    spoke, masks = output.from_teacher.tolist(), output.prompt_mask.bool()
    found = []
    for row, length in enumerate(output.lengths.tolist()):
        prompt = output.sequences[row, : output.prompt_length][masks[row]].tolist()
        texts = passages.pieces(tokenizer, prompt, output.responses[row, :length].tolist())
        tokens = [
            Token(text, spoke[row][t], *(_known(numbers[name][row][t]) for name in _COLUMNS))
            for t, text in enumerate(texts)
        ]
        found.append(Passage(tokenizer.decode(prompt, skip_special_tokens=False), tokens))
    return found


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def generation_page(studies: Sequence[Study]) -> str:
    """The page of one study, or of several side by side (same prompts, same uniform numbers)."""
    several = len(studies) > 1
    parts = [
        "<h1>Where students go astray</h1>" if several else "<h1>Student and teacher, word by word</h1>",
        *(f'<p class="soft">{html.escape(_settings(s))}</p>' for s in studies),
        _figures(studies),
        *_charts(studies),
        "<h2>Text</h2>",
        '<p class="soft key">Point at a token, or tap it: <span class="tok" style="--j:.4">student</span> '
        '<span class="tok t" style="--j:.4">teacher</span>; the deeper the colour, the greater the divergence.</p>',
    ]
    for row in range(len(studies[0].passages)):
        blocks = [(s.name if several else "", passages.to_html(s.passages[row])) for s in studies]
        inside = "".join(f'<div><div class="soft">{html.escape(name)}</div>{block}</div>' for name, block in blocks)
        parts.append(f'<div class="side">{inside}</div>')
    return page("kdkernels generate", "\n".join(parts), passages.STYLE + _STYLE)


def _settings(study: Study) -> str:
    return f"{study.name}: " + ", ".join(f"{k} {v}" for k, v in study.settings.items() if v is not None)


def _figures(studies: Sequence[Study]) -> str:
    heads = (
        "",
        "tokens",
        "teacher's share",
        "JSD, bit",
        "log-likelihood ratio",
        "divergence rises at",
        "ratio falls at",
    )
    rows = []
    for study in studies:
        s, changes = study.summary, study.changes
        jsd, ratio = changes["jsd"], changes["log_likelihood_ratio"]
        worse = (
            _break(jsd, jsd is not None and jsd.after > jsd.before),
            _break(ratio, ratio is not None and ratio.after < ratio.before),
        )
        figures = (_number(s["mean_jsd"]), _number(s["log_likelihood_ratio"]))
        rows.append((study.name, s["tokens"], f"{s['teacher_share'] or 0:.1%}", *figures, *worse))
    note = (
        '<p class="soft">Log-likelihood ratio: log p(teacher) − log p(student) of the tokens, nats a token. '
        "A change is the best split of the curve into two levels where random orders of its values give none as clear "
        "in 95 of 100 cases; – where there is none.</p>"
    )
    return table(heads, rows) + note


def _break(change: Change | None, worse: bool) -> str:
    if change is None or not worse:
        return "–"
    return f"{change.position} ({change.before:.3f} → {change.after:.3f}, p {change.p_value:.3f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _charts(studies: Sequence[Study]) -> list[str]:
    by = [s.summary["by_position"] for s in studies]
    marks = [{name: None if c is None else c.position for name, c in s.changes.items()} for s in studies]

    def curves(column: str, prefix: str = "") -> list[Curve]:
        return [
            Curve(prefix + s.name, b[column], i % 6, mark=m.get(column))
            for i, (s, b, m) in enumerate(zip(studies, by, marks, strict=True))
        ]

    divergence = curves("jsd", "" if len(studies) > 1 else "divergence, ")
    tau = by[0]["threshold"]
    if any(t is not None and 0 <= t < 1 for t in tau):
        divergence.append(Curve("threshold", tau, 1 if len(studies) == 1 else 5, dashed=True))
    at = "tokens into the response"
    found = [chart.chart("Divergence, bit.", divergence, at, (0.0, 1.0))]
    if any(s.summary["teacher_tokens"] for s in studies):
        found.append(chart.chart("Teacher's share of the tokens.", curves("teacher_share"), at, (0.0, 1.0)))
    if any(s.summary["log_likelihood_ratio"] is not None for s in studies):
        found.append(chart.chart("Log-likelihood ratio, nats a token.", curves("log_likelihood_ratio"), at))
    return found
