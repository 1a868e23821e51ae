"""`kdkernels evaluate compare`: teacher and student on the same tokens.

kdkernels evaluate compare --run RUN                                 teacher, text, split and blocks as in RUN
kdkernels evaluate compare --teacher T --student S --data TEXT --output DIR [--before B]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError

_TEXT = ("teacher", "cache", "tokenizer", "data", "domain", "text_key", "block_size", "held_out", "split_seed")
_DEFAULTS: dict[str, Any] = {"text_key": "text", "block_size": 512, "held_out": 0.0, "split_seed": 0, "domain": {}}


def add_parser(inner: Any) -> None:
    """Put `compare` among the commands of `evaluate`."""
    compare = inner.add_parser(
        "compare",
        help="divergences, agreement, entropy and calibration on the same tokens",
        description="Compare the distributions of a student (and the one before) with its teacher's, by domain.",
    )
    sides = compare.add_argument_group("what is compared")
    sides.add_argument("--run", dest="trained", metavar="RUN", help="output folder of kdkernels distill: gives all "
                       "that no flag gives, and its held-out text")  # fmt: skip
    sides.add_argument("--teacher", metavar="MODEL", help="a folder or a name that transformers knows")
    sides.add_argument("--cache", metavar="DIR", help="a teacher cache in the teacher's place")
    sides.add_argument("--student", metavar="MODEL", help="a folder or a name")
    sides.add_argument(
        "--before", metavar="MODEL", help="the student before: a folder, a name, every:K or layers:A,B,..."
    )
    sides.add_argument("--no-before", action="store_true", help="leave the student before out (with --run)")
    sides.add_argument("--tokenizer", metavar="MODEL", help="where no model brings one")
    text = compare.add_argument_group("text")
    text.add_argument("--data", metavar="DIR", help="a folder with a domain per subfolder, or one domain's folder")
    text.add_argument("--domain", action="append", metavar="NAME=PATH", help="one domain; repeat for more")
    text.add_argument("--text-key", metavar="STR", help="the field of a .jsonl line that holds the text (default text)")
    text.add_argument("--block-size", type=int, metavar="INT", help="tokens per block (default 512)")
    text.add_argument("--held-out", type=float, metavar="FLOAT", help="compare on this share of the text, split off as "
                      "distill does (default 0: on all of it)")  # fmt: skip
    text.add_argument("--split-seed", type=int, metavar="INT", help="of that split (default 0)")
    text.add_argument("--max-tokens", type=int, metavar="INT", help="of each domain at most (default: all)")
    rest = compare.add_argument_group("figures")
    rest.add_argument("--output", metavar="DIR", help="folder of compare.json (default: RUN/evaluation)")
    rest.add_argument("--top-k", type=int, default=10, metavar="INT", help="k of the overlap (default 10)")
    rest.add_argument("--vocab-size", type=int, default=0, metavar="INT", help="real vocabulary where heads are padded")
    rest.add_argument("--collapse", type=float, default=0.8, metavar="FLOAT", help="share of the teacher's entropy "
                      "below which the student's has collapsed (default 0.8)")  # fmt: skip
    rest.add_argument("--batch-size", type=int, default=4, metavar="INT", help="blocks per forward (default 4)")
    rest.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the models")
    rest.add_argument("--device", default="cpu", metavar="NAME", help="of the models (default cpu)")
    rest.add_argument("--level", type=float, default=0.95, metavar="FLOAT", help="of the intervals (default 0.95)")
    rest.add_argument("--resamples", type=int, default=2000, metavar="INT", help="of the bootstrap (default 2000)")
    rest.add_argument("--seed", type=int, default=0, metavar="INT", help="of the bootstrap (default 0)")
    rest.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    compare.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from kdkernels.evaluate_cli import bar, interruptible

    return interruptible(lambda given: _run(given, bar))(arguments)


def _run(arguments: argparse.Namespace, bar: Callable[..., Any]) -> int:
    import torch

    from kdkernels import TeacherCache
    from kdkernels.evaluation.compare import compare_models
    from kdkernels.evaluation.results import make_folder
    from kdkernels.trainers.models import load_model, load_tokenizer
    from kdkernels.trainers.setup import pick_device

    options = _options(arguments)
    make_folder(options["output"])
    device, dtype = pick_device(arguments.device), getattr(torch, arguments.dtype)

    def loaded(role: str, where: str) -> Any:
        return load_model(role, where, dtype).to(device)

    chief = TeacherCache.open(options["cache"]) if options["cache"] else loaded("teacher", options["teacher"])
    words = load_tokenizer("tokenizer", options["tokenizer"] or options["teacher"] or options["student"])
    before = options["before"]
    if before and not before.startswith(("every:", "layers:")):
        before = loaded("before", before)
    with bar("blocks", arguments.quiet) as progress:
        result = compare_models(
            chief, loaded("student", options["student"]), _text(options, words), before=before or None, tokenizer=words,
            block_size=options["block_size"], batch_size=arguments.batch_size, max_tokens=arguments.max_tokens,
            top_k=arguments.top_k, vocab_size=arguments.vocab_size, collapse=arguments.collapse, dtype=dtype,
            level=arguments.level, resamples=arguments.resamples, seed=arguments.seed, progress=progress,
        )  # fmt: skip
    result.save(Path(options["output"]) / "compare.json")
    if not arguments.quiet:
        print(render_comparison(result))
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Flags first, then what the run's configuration says, then the defaults."""
    from kdkernels.cli import pairs

    flags = {name: getattr(arguments, name) for name in (*_TEXT, "student", "before", "output")}
    if flags["domain"] is not None:
        flags["domain"] = pairs("domain", flags["domain"])
    found = {**dict.fromkeys(flags, ""), **_DEFAULTS}
    if arguments.trained:
        run = _of_run(Path(arguments.trained).expanduser())
        if flags["data"] or flags["domain"]:  # other text: nothing of it was trained on
            run |= {"data": "", "domain": {}, "held_out": 0.0}
        found |= run
    found |= {name: value for name, value in flags.items() if value is not None}
    if flags["teacher"]:
        found["cache"] = flags["cache"] or ""
    if arguments.no_before:
        found["before"] = ""
    for name, what in (("student", "a folder or a name"), ("output", "a folder")):
        if not found[name]:
            raise UserError(f"{name} is ''; allowed: {what}; give --{name}, or --run RUN")
    if not (found["teacher"] or found["cache"]):
        raise UserError("teacher is ''; allowed: a folder or a name; give --teacher, --cache, or --run RUN")
    if not (found["data"] or found["domain"]):
        raise UserError("data is ''; allowed: a folder; give --data DIR, --domain NAME=PATH, or --run RUN")
    if not 0 <= found["held_out"] < 1:
        raise UserError(f"held_out is {found['held_out']}; allowed: 0 to 1; 0 takes all text")
    return found


def _of_run(run: Path) -> dict[str, Any]:
    """What a finished run was trained with; `UserError` where it is none."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        found = {name: config[name] for name in _TEXT if name != "split_seed"}
        found |= {"split_seed": config["seed"], "before": config["student"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run is {str(run)!r}; its config.json cannot be read ({error}); give the output of distill"
        ) from error
    if not (run / "student").is_dir():
        raise UserError(f"run is {str(run)!r}; it holds no student yet; finish it with kdkernels distill --resume")
    found |= {"student": str(run / "student"), "output": str(run / "evaluation")}
    if found["cache"] and found["before"].startswith(("every:", "layers:")):
        found["before"] = ""  # no teacher is there to cut
    return found


def _text(options: dict[str, Any], words: Any) -> Any:
    """Held-out blocks, or all documents, by domain."""
    from kdkernels.data import find_domains, load_corpus, read_documents

    if options["held_out"]:
        corpus = load_corpus(
            options["data"], options["domain"], words, length=options["block_size"], held_out=options["held_out"],
            seed=options["split_seed"], text_key=options["text_key"],
        )  # fmt: skip
        return corpus.held_out
    domains = find_domains(options["data"], options["domain"])
    return {name: list(read_documents(path, options["text_key"])) for name, path in domains.items()}


def render_comparison(result: Any) -> str:
    """A `ComparisonResult` as a table, a line per domain."""
    from kdkernels.evaluate_cli import interval, number, table

    models = [m for m in ("before", "student") if m in result.overall.figures]
    rows: list[tuple[str, ...]] = [
        (
            "domain",
            "tokens",
            *[f"KL {m}" for m in models],
            "interval",
            "agreement",
            "discrepancy",
            "entropy ratio",
            "ECE",
        )
    ]
    for name, part in (*result.domains.items(), *([("all", result.overall)] if len(result.domains) > 1 else [])):
        kl = part.get("student", "forward_kl")
        rest = [number(part.get("student", n).value) for n in ("agreement", "discrepancy", "entropy_ratio", "ece")]
        shown = [number(part.get(m, "forward_kl").value) for m in models]
        ends = interval(None if kl.low is None else (kl.low, kl.high))
        rows.append((name, f"{part.tokens:,}", *shown, ends, *rest))
    return "\n".join([table(rows), *(f"note: {warning}" for warning in result.warnings)])
