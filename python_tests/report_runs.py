"""Folders as runs and evaluations leave them, for the tests of reports."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from kdkernels.evaluation import identity_consistency, response_similarity
from kdkernels.evaluation.calibration import Bin
from kdkernels.evaluation.compare_result import ComparisonResult, Estimate, Slice
from kdkernels.evaluation.records import Record, write_records

DOMAINS = ("code", "prose <b>")


def comparison(kl: float, half: float = 0.02, collapsed: tuple[str, ...] = ()) -> ComparisonResult:
    """A result whose student is `kl` from its teacher."""

    def part(scale: float) -> Slice:
        def around(value: float) -> Estimate:
            return Estimate(value * scale, (value - half) * scale, (value + half) * scale)

        student = {name: around(kl) for name in ("forward_kl", "reverse_kl", "jsd", "ece")}
        student |= {"agreement": around(0.6), "perplexity": around(20.0), "entropy": around(2.0)}
        student |= {"entropy_ratio": around(0.9), "discrepancy": around(1.4), "overlap": around(0.5)}
        before = {name: around(kl + 1) for name in student}
        change = {name: Estimate(-1.0, -1.1, -0.9) for name in student}
        teacher = {"perplexity": around(15.0), "entropy": around(2.2), "ece": around(0.05)}
        return Slice(1000, 9, {"student": student, "before": before, "teacher": teacher, "change": change})

    curve = tuple(Bin(i / 5, (i + 1) / 5, 10, i / 5 + 0.1, i / 6) for i in range(5))
    return ComparisonResult(
        part(1.0), {name: part(1 + i / 10) for i, name in enumerate(DOMAINS)}, {"1": part(1.5), "2 to 3": part(1.0)},
        {"over 1 %": part(0.5)}, {"student": curve, "teacher": curve}, collapsed, 0.8, "T", "S", "B", False, 10, 64,
        0.95, 200, 0, (),
    )  # fmt: skip


def log(steps: int = 6) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"event": "start", "config": {"seed": 3}, "versions": {"torch": "2"}}]
    for step in range(1, steps):
        rows.append({"event": "step", "step": step, "loss": 3 / step, "divergence": 2 / step, "nll": None,
                     "entropy": 1.0, "teacher_share": 0.1 * step})  # fmt: skip
        rows.append({"event": "eval", "step": step, "domains": {d: {"kl": 1 / step} for d in DOMAINS}})
        rows.append({"event": "ddk", "step": step, "weights": dict.fromkeys(DOMAINS, 0.5),
                     "discrepancy": dict.fromkeys(DOMAINS, 1 + 1 / step)})  # fmt: skip
    return rows


def write_run(folder: Path, kl: float = 0.5, half: float = 0.02) -> Path:
    """A run with everything in it."""
    (folder / "evaluation" / "before").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 3, "note": "<script>alert(1)</script>"}))
    scores = {d: {"kl": kl, "ppl": 20.0, "teacher_ppl": 15.0, "top1": 0.5, "tokens": 99} for d in DOMAINS}
    before = {d: {"kl": kl + 1, "ppl": 2000.0, "teacher_ppl": 15.0, "top1": 0.1, "tokens": 99} for d in DOMAINS}
    (folder / "summary.json").write_text(json.dumps({"before": before, "after": scores, "versions": {"torch": "2"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log()))
    comparison(kl, half).save(folder / "evaluation" / "compare.json")
    for place, said in (("", "The river runs to the sea, number {}."), ("before/", "sea sea sea sea sea sea sea {}")):
        rows = [
            Record(str(i), "chat", f"where {i}?", f"The river runs to the sea, number {i}. It is wide.", said.format(i))
            for i in range(6)
        ]
        write_records(folder / "evaluation" / f"{place}answers.jsonl", rows)
        columns = [[getattr(row, name) for row in rows] for name in ("prompt", "reference", "response")]
        response_similarity(*columns, datasets=["chat"] * 6, resamples=100).save(
            folder / "evaluation" / f"{place}rse.json"
        )
    identity_consistency(lambda prompt: "I am Aster.", "facts-en", budget=10, resamples=100).save(
        folder / "evaluation" / "ice.json"
    )
    generated = {"name": "S", "settings": {}, "rows": 1, "tokens": 4, "teacher_tokens": 1, "teacher_share": 0.25,
                 "by_position": {"teacher_share": [1.0, 0.0, None, 0.0], "jsd": [0.5, 0.2, None, 0.1]}}  # fmt: skip
    (folder / "evaluation" / "generate.json").write_text(json.dumps([generated], indent=1))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "full")


class Reader(html.parser.HTMLParser):
    """Balanced tags, what they refer to, and the text."""

    VOID = ("meta", "line", "path", "br", "circle", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
