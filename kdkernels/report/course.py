"""The course of a run, and its configuration."""

from __future__ import annotations

import html
from collections.abc import Iterator

from kdkernels.report.chart import Curve, chart
from kdkernels.report.parts import course, folded, gap, is_number
from kdkernels.report.version import Version


def training(version: Version) -> Iterator[str]:
    """Loss and divergence over the steps, held-out scores on the way, DDK's factors, SWITCH's share."""
    steps = version.rows("step")
    if not steps:
        yield gap("the course of training", "metrics.jsonl of kdkernels distill")
        return
    known = [(name, label) for name, label in (("loss", "loss"), ("divergence", "divergence"), ("nll", "nll of text"))
             if any(is_number(row.get(name)) for row in steps)]  # fmt: skip
    yield course("Training, nats a token.", steps, [(label, name) for name, label in known])
    if any(is_number(row.get("entropy")) for row in steps):
        yield course("Student's entropy in training, nats.", steps, [("entropy", "entropy")])
    evaluations = [row for row in version.rows("eval") if isinstance(row.get("domains"), dict)]
    if len(evaluations) > 2:
        domains = list(evaluations[0]["domains"])
        rows = [
            {"step": row["step"], **{d: row["domains"].get(d, {}).get("kl") for d in domains}} for row in evaluations
        ]
        yield course("Held-out KL(teacher‖student), nats a token.", rows, [(d, d) for d in domains])


def factors(version: Version) -> Iterator[str]:
    """DDK's factors over time."""
    rows = [row for row in version.rows("ddk") if isinstance(row.get("weights"), dict)]
    if not rows:
        yield gap("DDK's factors, for this run drew its domains by a fixed mix", "kdkernels distill --ddk ...")
        return
    domains = list(rows[0]["weights"])
    for key, caption in (
        ("weights", "Share of each domain in the data."),
        ("discrepancy", "Student's perplexity over the teacher's."),
    ):
        flat = [{"step": row["step"], **row.get(key, {})} for row in rows]
        yield course(caption, flat, [(d, d) for d in domains], steps=key == "weights")


def switch(version: Version) -> Iterator[str]:
    """The teacher's share of generated tokens, in training and in generation."""
    logged = [row for row in version.rows("step") if is_number(row.get("teacher_share"))]
    if logged:
        columns = [("teacher's share of the tokens", "teacher_share"), ("divergence, bit", "jsd")]
        yield course("SWITCH, what was written in training.", logged, columns)
    for row in version.generations:
        share = (row.get("by_position") or {}).get("teacher_share")
        jsd = (row.get("by_position") or {}).get("jsd")
        name = str(row.get("name", "generation"))
        curves = [Curve("teacher's share", share)] if isinstance(share, list) else []
        curves += [Curve("divergence, bit", jsd, 1)] if isinstance(jsd, list) else []
        yield chart(f"SWITCH, {name}: by token of the response.", curves, "tokens into the response", (0.0, 1.0))
    if not (logged or version.generations):
        yield gap(
            "SWITCH's teacher share",
            "kdkernels generate --student S --teacher T --json RUN/evaluation/generate.json ...",
        )


def configuration(version: Version) -> Iterator[str]:
    """The exact configuration, versions, what could not be read."""
    yield from (f'<p class="gap">{html.escape(problem)}</p>' for problem in version.problems)
    start = version.rows("start")
    config = version.config or (start[0].get("config") if start else None)
    if config is None:
        yield gap("the run's configuration", "config.json of kdkernels distill")
    else:
        yield folded("Options of the run", config)
    rest = {k: v for k, v in (version.summary or {}).items() if k not in ("before", "after")}
    if rest:
        yield folded("Summary and versions", rest)
    for key, result in version.results.items():
        shown = {
            k: v for k, v in vars(result).items() if isinstance(v, (str, int, float, bool)) or k in ("judge", "model")
        }
        yield folded(f"Settings of: {key}", shown)
