"""DDK against equal sampling on the demo's domains, with the same number of steps.

    python -m demo.ddk [--output runs/demo-ddk] [--steps N]

Stops and starts again where it was. Writes ddk.json, and ddk/ddk.png: the course of the weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from demo.__main__ import Demo, arguments_of, run_demo, write

INTERVALS = 8
"""Measurements of a run, the last of them at its end."""


class DomainDemo(Demo):
    """Two runs that differ in the rule of the domains' weights only."""

    def run(self) -> dict[str, Any]:
        """Every stage; returns the comparison."""
        self.prepare()
        rule = {"ddk": "", "ddk-interval": str(max(1, self.arguments.steps // INTERVALS)), "ddk-blocks": "6"}
        self.stage(
            "ddk",
            "draw more from the domains where the student is behind",
            lambda: self.distil("ddk", rule, ("mix",)),
        )
        rule = {**rule, "ddk-variant": "equal"}
        self.stage("equal", "the same steps, domains in equal parts", lambda: self.distil("equal", rule, ("mix",)))
        runs = {name: json.loads((self.output / name / "summary.json").read_text()) for name in ("ddk", "equal")}
        lines = (self.output / "ddk" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        measured = [row for row in map(json.loads, lines) if row["event"] == "ddk"]
        found = {
            "steps": self.arguments.steps,
            "weights": [{"step": row["step"], **row["weights"]} for row in measured],
            "discrepancy": [{"step": row["step"], **row["discrepancy"]} for row in measured],
            **{
                f"{key}_after": {
                    name: {domain: round(score[key], 4) for domain, score in run["after"].items()}
                    for name, run in runs.items()
                }
                for key in ("kl", "ppl", "teacher_ppl")
            },
            "seconds": round(sum(self.seconds.values()), 1),
        }
        write(self.output / "ddk.json", found)
        return found


def report(found: dict[str, Any]) -> str:
    """What the terminal shows at the end."""
    heads = f"{'KL equal':>10}{'KL DDK':>10}{'ppl equal':>12}{'ppl DDK':>10}{'last weight':>13}"
    lines = [f"{'after the same steps':22}{heads}"]
    for domain in found["kl_after"]["ddk"]:
        cells = [found[f"{key}_after"][run][domain] for key in ("kl", "ppl") for run in ("equal", "ddk")]
        last = found["weights"][-1][domain] if found["weights"] else float("nan")
        lines.append(f"{domain:22}{cells[0]:10.3f}{cells[1]:10.3f}{cells[2]:12.1f}{cells[3]:10.1f}{last:13.3f}")
    return "\n".join([*lines, f"{found['seconds']:.0f} s in all"])


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    arguments = arguments_of(argv, "python -m demo.ddk", "DDK against equal sampling.", "runs/demo-ddk")
    return run_demo(DomainDemo, arguments, "demo.ddk", lambda demo, found: "\n".join((
        report(found), "", f"course of the weights: {demo.output / 'ddk' / 'ddk.png'}"
    )))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
