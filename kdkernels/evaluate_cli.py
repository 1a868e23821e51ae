"""`kdkernels evaluate`: compare answers (RSE), check identities (ICE), compare distributions (`compare_cli`).

kdkernels evaluate rse --data PROMPTS.jsonl --model STUDENT --reference-model TEACHER --output DIR
kdkernels evaluate ice --model MODEL --facts FACTS.yaml --output DIR

A model is a folder or a name that transformers knows, or `endpoint:NAME@URL`. Everything a model or a judge said is
kept in DIR: the same command again asks only for what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError

_MODEL = "a folder, a name that transformers knows, endpoint:NAME or endpoint:NAME@URL"
_WRITTEN = 512  # tokens that a verdict or a template may take, whatever --max-new-tokens says of answers


def add_parser(commands: Any) -> None:
    """Put `evaluate` and its commands into the command line."""
    from kdkernels import compare_cli

    evaluate = commands.add_parser("evaluate", help="how much a student has taken over: answers, identity, logits")
    inner = evaluate.add_subparsers(dest="evaluate_command", required=True, metavar="COMMAND")
    for add in (_add_rse, _add_ice, compare_cli.add_parser):
        add(inner)


def _add_rse(inner: Any) -> None:
    rse = inner.add_parser(
        "rse",
        help="response similarity: answers against reference answers",
        description="Compare a model's answers with reference answers: style, logic, content, overall 1 to 5.",
    )
    rse.add_argument("--data", required=True, metavar="FILE", help="JSON lines: prompt (a text or a list of turns); "
                     "reference, response, id, dataset are optional")  # fmt: skip
    for side, whose in (("reference", "the teacher's"), ("response", "the student's")):
        rse.add_argument(f"--{side}s", metavar="FILE", help=f"JSON lines with {whose} answers: id or prompt, {side}")
    rse.add_argument("--reference-model", metavar="MODEL", help=f"makes the references that are missing: {_MODEL}")
    rse.add_argument("--model", metavar="MODEL", help=f"makes the responses that are missing: {_MODEL}")
    _add_shared(rse)
    rse.set_defaults(run=interruptible(_rse))


def _add_ice(inner: Any) -> None:
    ice = inner.add_parser(
        "ice",
        help="identity consistency: does a model answer as somebody else?",
        description="Ask a model who it is in many wordings; shares of answers that contradict the facts.",
    )
    ice.add_argument("--model", required=True, metavar="MODEL", help=f"the model to ask: {_MODEL}")
    ice.add_argument("--facts", required=True, metavar="FILE", help="YAML: who the model is (facts-en: an example)")
    for name, what in (("questions", "questions"), ("templates", "templates"), ("sources", "models it may pass for")):
        ice.add_argument(f"--{name}", metavar="FILE", help=f"YAML: {what} (default: those that ship)")
    ice.add_argument("--suspected", action="append", metavar="NAME", help="a source that counts; repeat (default: all)")
    ice.add_argument("--helper", metavar="MODEL", help=f"varies the templates (default: rules): {_MODEL}")
    ice.add_argument("--language", choices=("en", "zh"), help="of questions and templates (default: both)")
    ice.add_argument("--budget", type=int, default=200, metavar="INT", help="answers to ask for (default 200)")
    ice.add_argument(
        "--search", action=argparse.BooleanOptionalAction, default=True,
        help="vary the templates that brought conflicts, or ask the given ones in turn (default: vary)",
    )  # fmt: skip
    ice.add_argument("--resume", action="store_true", help="go on with the transcript in --output")
    _add_shared(ice)
    ice.set_defaults(run=interruptible(_ice))


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the result and of all answers")
    parser.add_argument("--judge", default="lexical", metavar="MODEL",
                        help=f"lexical (an offline proxy, the default) or a model: {_MODEL}")  # fmt: skip
    parser.add_argument("--level", type=float, default=0.95, metavar="FLOAT", help="of the intervals (default 0.95)")
    parser.add_argument("--resamples", type=int, default=2000, metavar="INT", help="of the bootstrap (default 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of every draw (default 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    models = parser.add_argument_group("models and endpoints")
    models.add_argument("--max-new-tokens", type=int, default=256, metavar="INT", help="of an answer (default 256)")
    models.add_argument("--batch-size", type=int, default=8, metavar="INT", help="of a local model (default 8)")
    models.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of local models"
    )
    models.add_argument("--device", default="cpu", metavar="NAME", help="of local models (default cpu)")
    models.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME",
                        help="environment variable with the endpoint's key (default OPENAI_API_KEY)")  # fmt: skip
    models.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of one request (default 60)")
    models.add_argument("--retries", type=int, default=8, metavar="INT", help="after passing faults (default 8)")
    models.add_argument("--concurrency", type=int, default=8, metavar="INT", help="requests at a time (default 8)")
    models.add_argument("--requests-per-minute", type=float, metavar="FLOAT", help="at most (default: no limit)")
    models.add_argument("--tokens-per-minute", type=float, metavar="FLOAT", help="at most (default: no limit)")
    models.add_argument("--prices", type=float, nargs=2, metavar=("PROMPT", "COMPLETION"),
                        help="per million tokens; the result then tells the cost")  # fmt: skip


def interruptible(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command; interrupted, it says how to go on and exits with 130."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except KeyboardInterrupt:
            name = f"kdkernels evaluate {arguments.evaluate_command}"
            hint = {"rse": " goes on", "ice": " with --resume goes on"}.get(arguments.evaluate_command, " begins anew")
            print(f"{name}: interrupted; the same command{hint}", file=sys.stderr)
            return 130

    return run


def _rse(arguments: argparse.Namespace) -> int:
    from kdkernels.evaluation import records
    from kdkernels.evaluation.similarity import checked, response_similarity

    rows = records.read_records(arguments.data)
    output = Path(arguments.output)
    draws: dict[str, Any] = {"level": arguments.level, "resamples": arguments.resamples, "seed": arguments.seed}
    checked([row.prompt for row in rows], [row.dataset for row in rows], [row.id for row in rows], **draws)
    for side, file, model in (
        ("reference", arguments.references, arguments.reference_model),
        ("response", arguments.responses, arguments.model),
    ):
        if file:
            rows = records.with_answers(rows, side, file)
        if model and any(getattr(row, side) is None for row in rows):
            chat = _chat(model, arguments, side)
            with bar(f"{side}s", arguments.quiet) as progress:
                rows = records.generate(rows, side, chat, progress)
        if all(getattr(row, side) is None for row in rows):
            flag = "--reference-model" if side == "reference" else "--model"
            raise UserError(f"no prompt has a {side}; give it in --data, by --{side}s FILE, or by {flag}")
    records.write_records(output / "answers.jsonl", rows)
    judge = _judge(arguments)
    with bar("judged", arguments.quiet) as progress:
        result = response_similarity(
            [row.prompt for row in rows], [row.reference for row in rows], [row.response for row in rows],
            judge, datasets=[row.dataset for row in rows], ids=[row.id for row in rows], **draws, progress=progress,
        )  # fmt: skip
    result.save(output / "rse.json")
    if not arguments.quiet:
        print(render_similarity(result))
    return 0


def _ice(arguments: argparse.Namespace) -> int:
    from kdkernels.evaluation.identity import identity_consistency

    output = Path(arguments.output)
    model, judge = _chat(arguments.model, arguments, "model"), _judge(arguments)
    helper = _chat(arguments.helper, arguments, "helper") if arguments.helper else None
    with bar("answers", arguments.quiet) as progress:
        result = identity_consistency(
            model, arguments.facts, judge=judge, helper=helper,
            questions=arguments.questions, templates=arguments.templates, sources=arguments.sources,
            suspected=arguments.suspected, language=arguments.language, budget=arguments.budget,
            search=arguments.search, seed=arguments.seed, transcript=output / "transcript.jsonl",
            resume=arguments.resume, level=arguments.level, resamples=arguments.resamples, progress=progress,
        )  # fmt: skip
    result.save(output / "ice.json")
    if not arguments.quiet:
        print(render_identity(result))
    return 0


def _judge(arguments: argparse.Namespace) -> Any:
    if arguments.judge == "lexical":
        return None
    from kdkernels.evaluation.judges import ChatJudge

    return ChatJudge(_chat(arguments.judge, arguments, "judge"))


def _chat(where: str, arguments: argparse.Namespace, role: str) -> Any:
    """A model by its flag's value, its replies kept in the output folder. What judges and helpers write is not cut."""
    from kdkernels.evaluation.chat import Chat
    from kdkernels.evaluation.reply_cache import CachedChat

    chat: Chat
    tokens = max(arguments.max_new_tokens, _WRITTEN if role in ("judge", "helper") else 0)
    if where.startswith("endpoint:"):
        from kdkernels.evaluation.endpoint import EndpointChat

        name, _, url = where.removeprefix("endpoint:").partition("@")
        if not name:
            raise UserError(f"{role} is {where!r}; allowed: endpoint:NAME or endpoint:NAME@URL")
        chat = EndpointChat(
            name, url or None, key_env=arguments.key_env, max_tokens=tokens,
            timeout=arguments.timeout, retries=arguments.retries, concurrency=arguments.concurrency,
            requests_per_minute=arguments.requests_per_minute, tokens_per_minute=arguments.tokens_per_minute,
            prices=tuple(arguments.prices) if arguments.prices else None,
        )  # fmt: skip
    else:
        import torch

        from kdkernels.evaluation.local_chat import LocalChat

        chat = LocalChat.load(
            where, role=role, dtype=getattr(torch, arguments.dtype), device=arguments.device,
            max_new_tokens=tokens, batch_size=arguments.batch_size,
        )  # fmt: skip
    return CachedChat(chat, Path(arguments.output) / "replies.sqlite")


@contextlib.contextmanager
def bar(name: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar as a function of (done, all)."""
    if quiet:
        yield None
        return
    from kdkernels.optional import need

    with need("tqdm", "the progress bar").tqdm(desc=name, unit="") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def render_similarity(result: Any) -> str:
    """A `SimilarityResult` as a table, a line per data set."""
    measures = ("style", "logic", "content", "bigram", "embedding")
    header = (
        "data set",
        "prompts",
        "scored",
        "overall",
        "interval",
        "style",
        "logic",
        "content",
        "2-gram",
        "embedding",
    )
    rows: list[tuple[str, ...]] = [header]
    for name, d in result.datasets.items():
        cells = [
            number(d.means["overall"]),
            interval(d.intervals["overall"]),
            *(number(d.means[m]) for m in measures),
        ]
        rows.append((name, str(d.prompts), str(d.scored), *cells))
    if len(result.datasets) > 1:
        scored = sum(d.scored for d in result.datasets.values())
        cells = [number(result.overall), interval(result.intervals["overall"])]
        cells += [number(getattr(result, m)) for m in measures]
        rows.append(("mean", str(len(result.per_prompt)), str(scored), *cells))
    return "\n".join([table(rows), f"judge: {result.judge['name']}", *(f"note: {w}" for w in result.warnings)])


def render_identity(result: Any) -> str:
    """An `IdentityResult` as a table, a line per aspect."""
    rows: list[tuple[str, ...]] = [("aspect", "answers", "loose", "interval", "strict", "interval", "hard", "interval")]
    whole = {name: getattr(result, name) for name in ("loose", "strict", "hard")}
    for aspect, rates in (*result.aspects.items(), ("all", whole)):
        cells = []
        for rate in rates.values():
            cells += [number(rate.value), interval(None if rate.low is None else (rate.low, rate.high))]
        rows.append((aspect, str(rates["loose"].answers), *cells))
    claims = ", ".join(f"{name} {count}" for name, count in result.claims.items())
    notes = [f"judge: {result.judge['name']}", *([f"claims to be: {claims}"] if claims else [])]
    return "\n".join([table(rows), *notes, *(f"note: {w}" for w in result.warnings)])


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells in columns, the first on the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def interval(pair: tuple[float, float] | None) -> str:
    """Its two ends, or a dash."""
    return "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"
