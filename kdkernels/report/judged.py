"""Sections about what the student says: RSE, ICE, diversity, the answers themselves."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any

from kdkernels.evaluation import published
from kdkernels.evaluation.compare_result import STUDENT, Estimate
from kdkernels.report.page import table
from kdkernels.report.parts import gap, note, pair, plain
from kdkernels.report.version import Version
from kdkernels.report.whiskers import Whisker, number_of, whiskers


def similarity(version: Version) -> Iterator[str]:
    """RSE with intervals beside the published rows."""
    found, before = version.similarity(), version.similarity(before=True)
    if found is None:
        yield gap(
            "response similarity (RSE)", "kdkernels evaluate rse --data prompts.jsonl --output RUN/evaluation ..."
        )
        return
    rows = []
    for name, part in found.datasets.items():
        rows.append(Whisker(STUDENT, pair(part.means["overall"], part.intervals["overall"]), 0, name))
        old = before.datasets.get(name) if before is not None else None
        if old is not None:
            rows.insert(-1, Whisker("before", pair(old.means["overall"], old.intervals["overall"]), 5, name))
    if before is not None:
        rows.append(Whisker("before", pair(before.overall, before.intervals["overall"]), 5, "mean over data sets"))
    rows.append(Whisker(STUDENT, pair(found.overall, found.intervals["overall"]), 0, "mean over data sets"))
    rows += [
        Whisker(name, Estimate(values["mean"]), 3, "published, another judge and other prompts")
        for name, values in published.RSE.items()
    ]
    yield whiskers("Response similarity to the teacher, 1 to 5.", rows, (1.0, 5.0))
    heads = ("", "prompts", "scored", "style", "logic", "content", "2-gram", "embedding")
    cells = [
        (
            name,
            part.prompts,
            part.scored,
            *[plain(part.means[m]) for m in ("style", "logic", "content", "bigram", "embedding")],
        )
        for name, part in found.datasets.items()
    ]
    yield table(heads, cells)
    yield note(f"Judge: {found.judge.get('name')}" + (", a proxy." if found.judge.get("proxy") else "."))
    yield from (note(f"Note: {warning}.") for warning in found.warnings)
    if before is None:
        yield gap("RSE of the student before", "kdkernels evaluate rse ... --output RUN/evaluation/before")


def identity(version: Version) -> Iterator[str]:
    """ICE with intervals beside the published rows."""
    found, before = version.identity(), version.identity(before=True)
    if " identity" in version.answers:
        yield _folded_answers("Questions about identity, answered by teacher and student", version, " identity")
    if found is None:
        yield gap(
            "identity consistency (ICE)",
            "kdkernels evaluate ice --model STUDENT --facts facts.yaml --output RUN/evaluation",
        )
        return
    rows = []
    for name in ("loose", "strict", "hard"):
        for label, result, colour in (("before", before, 5), (STUDENT, found, 0)):
            if result is not None:
                rate = getattr(result, name)
                rows.append(Whisker(label, Estimate(rate.value, rate.low, rate.high), colour, name))
    for model, values in published.ICE.items():
        rows += [
            Whisker(f"{model}, {k}", Estimate(v), 3, "published, other prompts and judge") for k, v in values.items()
        ]
    yield whiskers("Answers that contradict the model's identity, share.", rows, (0.0, 1.0))
    aspects = [(aspect, rates["loose"].answers, *[plain(rates[n].value) for n in ("loose", "strict", "hard")])
               for aspect, rates in found.aspects.items()]  # fmt: skip
    yield table(("aspect", "answers", "loose", "strict", "hard"), aspects)
    claims = ", ".join(f"{name} {count}" for name, count in found.claims.items()) or "none"
    yield note(
        f"Judge: {found.judge.get('name')}. Claims to be: {claims}. {found.answers} answers to {found.templates} "
        "templates."
    )
    yield from (note(f"Note: {warning}.") for warning in found.warnings)


def diversity(version: Version) -> Iterator[str]:
    """Diversity and redundancy of the answers."""
    found, before = version.diversity(), version.diversity(before=True)
    if found is None:
        yield gap("diversity of the answers", "kdkernels evaluate rse ... (its answers.jsonl is read)")
        return
    columns = [
        ("teacher", found.references),
        *([("before", before.responses)] if before else []),
        (STUDENT, found.responses),
    ]
    columns = [(name, figures) for name, figures in columns if figures]
    rows = [(name.replace("_", " "), *[number_of(figures[name]) for _, figures in columns]) for name in found.responses]
    yield table((f"{found.answers} answers", *[name for name, _ in columns]), rows)
    flags = ", ".join(found.collapsed) or "nothing"
    yield note(f"Distinct n-grams: answers cut to {found.cut} words. Plainly poorer than the teacher's: {flags}.")
    if found.stock_phrases:
        phrases = [(p.phrase, f"{p.references:.0%}", f"{p.answers:.0%}") for p in found.stock_phrases]
        shown = table(("", "teacher", "student"), phrases)
        yield f"<details><summary>The teacher's stock phrases</summary>{shown}</details>"


def answers(version: Version) -> Iterator[str]:
    """Prompts with the answers of either side, and of the student before."""
    if version.answers.get(""):
        yield _folded_answers("Prompts and answers", version, "")


def _folded_answers(title: str, version: Version, side: str) -> str:
    rows = version.answers[side]
    before = {json.dumps(r["prompt"]): r.get("response") for r in version.answers.get(side + " before", [])}
    blocks = []
    for row in rows[:40]:
        old = before.get(json.dumps(row["prompt"]))
        sides = (("prompt", row["prompt"]), ("teacher", row.get("reference")), ("before", old),
                 (STUDENT, row.get("response")))  # fmt: skip
        lines = "".join(
            f'<div><span class="soft">{name}</span> {html.escape(_said(said))}</div>'
            for name, said in sides
            if said is not None
        )
        blocks.append(f"<pre style='white-space:pre-wrap'>{lines}</pre>")
    left = f" (the first 40 of {len(rows)})" if len(rows) > 40 else ""
    return f"<details><summary>{html.escape(title)}{left}</summary>{''.join(blocks)}</details>"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))
