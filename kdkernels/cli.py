"""The command line: `kdkernels info | distill | cache | generate | evaluate | report | bench`.

Nothing heavy is imported before a command needs it. Wrong input ends with one line on stderr and exit status 2; an
interrupted run with 128 plus the signal's number, its state saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from kdkernels import __version__
from kdkernels.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse, but wrong input costs one line: the usage of forty options would bury it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` tells more\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from kdkernels import cache_cli

    parser = _parser()
    arguments, rest = parser.parse_known_args(cache_cli.with_command(list(sys.argv[1:] if argv is None else argv)))
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"kdkernels {arguments.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from kdkernels import cache_cli, evaluate_cli, generate_cli, report_cli
    from kdkernels.trainers.config import GROUPS, DistillConfig

    parser = _Parser(
        prog="kdkernels", description="Distillation of language models: fused losses, and the jobs built on them."
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, backends, and why each is or is not available")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    distill = commands.add_parser(
        "distill",
        help="train a student on a teacher's distributions over text",
        description="Train a student on a teacher's distributions over text; saves it in transformers' format.",
    )
    _add_options(distill, DistillConfig(), GROUPS)
    distill.set_defaults(run=_distill)
    cache_cli.add_parser(commands, _add_options)
    generate_cli.add_parser(commands)
    evaluate_cli.add_parser(commands)
    report_cli.add_parser(commands)
    bench = commands.add_parser("bench", help="run the benchmarks of a checkout", add_help=False)
    bench.set_defaults(run=_bench)
    return parser


def _add_options(parser: argparse.ArgumentParser, defaults: Any, groups: dict[str, str]) -> None:
    """One flag per field of a dataclass of options; absent flags leave the config file's value, or the default."""
    parser.add_argument("--config", metavar="FILE", help="read options from a .json or .toml file; flags go before it")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    group: argparse._ActionsContainer = parser
    for item in dataclasses.fields(defaults):
        if item.name in groups:
            group = parser.add_argument_group(groups[item.name])
        default = getattr(defaults, item.name)
        flag, text = "--" + item.name.replace("_", "-"), item.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if isinstance(default, dict):
            group.add_argument(flag, action="append", metavar="NAME=VALUE", **options)
            continue
        if default not in ("", 0, 0.0):
            options["help"] += f" (default {default})"
        if item.metadata["choices"]:
            options["choices"] = item.metadata["choices"]
        else:
            options["metavar"] = type(default).__name__.upper()
        group.add_argument(flag, type=type(default), **options)


def _info(arguments: argparse.Namespace) -> int:
    import json

    from kdkernels import info

    print(json.dumps(info.describe(), indent=2) if arguments.json else info.render())
    return 0


def options_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(plain values of the config file and the flags, flags first; where they come from)."""
    from kdkernels.trainers.config import read_config_file

    ours = ("command", "cache_command", "run", "rest", "config", "quiet")
    given = {k: v for k, v in vars(arguments).items() if k not in ours}
    for name in ("domain", "divergence_args"):
        if name in given:
            given[name] = pairs(name, given[name])
    values = read_config_file(arguments.config) if arguments.config else {}
    return {**values, **given}, arguments.config or "command line"


def _distill(arguments: argparse.Namespace) -> int:
    from kdkernels.trainers.config import config_from

    config = config_from(*options_of(arguments)).validate()
    from kdkernels.trainers import Interrupted, distill

    try:
        result = distill(config, progress=not arguments.quiet)
    except Interrupted as stop:
        print(f"kdkernels distill: {stop}", file=sys.stderr)
        return 128 + stop.signum
    if not arguments.quiet:
        print(table(result.summary))
        print(f"student: {result.output / 'student'}")
    return 0


def pairs(name: str, items: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` flags as a table; the values are numbers where the option wants numbers."""
    found: dict[str, Any] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not (key and sign and value):
            raise UserError(f"{name} is {item!r}; allowed: NAME=VALUE; correct it")
        if key in found:
            raise UserError(f"{name} gives {key!r} twice; give it once")
        try:
            found[key] = float(value) if name == "divergence_args" else value
        except ValueError as error:
            raise UserError(f"{name} is {item!r}; allowed: a number after the =; correct it") from error
    return found


def table(summary: dict[str, Any]) -> str:
    """The held-out scores of a run's summary as text, a line per domain."""
    rows: list[tuple[str, ...]] = [
        ("held-out text", "KL before", "after", "perplexity before", "after", "teacher", "top-1 after")
    ]
    for name, after in summary["after"].items():
        before = summary["before"].get(name, {})
        figures = (before.get("kl"), after["kl"], before.get("ppl"), after["ppl"], after["teacher_ppl"])
        top1 = "-" if after["top1"] is None else f"{after['top1']:.1%}"
        rows.append((name, *map(_number, figures), top1))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"


def _bench(arguments: argparse.Namespace) -> int:
    """Hand over to `benchmarks.run` of the checkout that this package lies in (or that is the current folder)."""
    import runpy

    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "benchmarks" / "run.py").is_file():
            sys.path.insert(0, str(root))
            sys.argv = ["kdkernels bench", *arguments.rest]
            runpy.run_module("benchmarks.run", run_name="__main__")
            return 0
    raise UserError("the benchmarks are not installed with the package; run this in a checkout of the repository")


if __name__ == "__main__":
    sys.exit(main())
