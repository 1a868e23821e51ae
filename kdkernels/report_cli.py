"""`kdkernels report`: one page, and a JSON, of what one or more students have taken over; a check against regressions.

kdkernels report RUN [RUN ...] [--output FILE.html] [--json FILE.json]
kdkernels report NEW --baseline OLD [--thresholds FILE.toml]     exit status 1 where NEW is worse beyond the interval
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError


def add_parser(commands: Any) -> None:
    """Put `report` into the command line."""
    report = commands.add_parser(
        "report",
        help="one page on what students have taken over; fails where a new one is worse",
        description="Write what runs and their evaluations say of students, as one HTML page that needs nothing else.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="output folder of distill or evaluate; results beneath "
                        "are found, those with `before` in their path are the untrained student's")  # fmt: skip
    report.add_argument("--output", metavar="FILE", help="the page (default: report.html in the first RUN)")
    report.add_argument("--json", metavar="FILE", help="the same as JSON (default: beside the page)")
    report.add_argument("--baseline", metavar="RUN", help="hold the first RUN against this one; exit 1 if it is worse")
    report.add_argument("--thresholds", metavar="FILE", help=".toml or .json: what is tolerated, by figure")
    report.add_argument("--quiet", action="store_true", help="print nothing but regressions")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from kdkernels.evaluation.results import write_text
    from kdkernels.report.evaluation import evaluation_json, evaluation_page, verdicts
    from kdkernels.report.headline import figures
    from kdkernels.report.regression import UNKNOWN, check, read_rules
    from kdkernels.report.version import load_versions

    if arguments.thresholds and not arguments.baseline:
        raise UserError(f"thresholds is {arguments.thresholds!r} without a baseline; give --baseline RUN")
    rules = read_rules(arguments.thresholds) if arguments.thresholds else None
    versions = load_versions([*arguments.runs, *([arguments.baseline] if arguments.baseline else [])])
    baseline = versions.pop() if arguments.baseline else None
    checks = check(figures(versions[0]), figures(baseline), rules) if baseline is not None else []
    page = Path(arguments.output or Path(arguments.runs[0]) / "report.html").expanduser()
    numbers = Path(arguments.json or page.with_suffix(".json")).expanduser()
    if numbers == page:
        raise UserError(f"output and json are both {str(page)!r}; give two files")
    write_text(page, evaluation_page(versions, checks, baseline))
    values = evaluation_json(versions, checks, baseline)
    write_text(numbers, json.dumps(_finite(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if baseline is not None and all(c.verdict == UNKNOWN for c in checks):
        raise UserError(
            f"baseline is {arguments.baseline!r}; no figure is known of both runs, so nothing was held against it; run "
            "kdkernels evaluate on both, or name figures without an interval in --thresholds"
        )
    failed = [c for c in checks if c.failed]
    for one in failed:
        print(f"{one.verdict}: {one.name}: {_plain(one.old)} to {_plain(one.new)} ({one.reason})")
    if not arguments.quiet:
        for version in versions:
            print("\n".join([f"{version.name}:", *(f"  {line}" for line in verdicts(version))]))
        if checks and not failed:
            print(f"no worse than {baseline.name if baseline else ''}: {len(checks)} figures held against it")
        print(f"report: {page}")
    return 1 if failed else 0


def _plain(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold (logs of others may)."""
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
