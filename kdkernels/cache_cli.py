"""`kdkernels cache`: build a teacher cache, check it, describe it, merge parts, import others' files.

kdkernels cache --teacher M --data DIR --out CACHE        build (also `kdkernels cache build ...`)
kdkernels cache verify|stat CACHE
kdkernels cache merge CACHE PART...
kdkernels cache import SOURCE --out CACHE --format arrays|axolotl|distillkit --vocab-size V
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError

COMMANDS = ("build", "verify", "stat", "merge", "import")


def with_command(arguments: list[str]) -> list[str]:
    """`cache --teacher ...` is `cache build --teacher ...`."""
    if arguments[:1] == ["cache"] and (arguments[1:2] or [""])[0] not in (*COMMANDS, "-h", "--help"):
        if len(arguments) > 1 and not arguments[1].startswith("-"):
            return arguments  # a word that is no command: argparse says so
        return ["cache", "build", *arguments[1:]]
    return arguments


def add_parser(commands: Any, add_options: Callable[..., None]) -> None:
    """Put `cache` and its commands into the command line; `add_options` makes flags of a dataclass."""
    from kdkernels.trainers.cache_config import GROUPS, CacheConfig

    cache = commands.add_parser(
        "cache",
        help="keep a teacher's distributions over text on disk, to distil from",
        description="Keep a teacher's distributions on disk. Without a command it builds a cache: "
        "kdkernels cache --teacher M --data DIR --out CACHE",
    )
    cache.set_defaults(run=_build)
    inner = cache.add_subparsers(dest="cache_command", required=True, metavar="COMMAND")
    build = inner.add_parser("build", help="run a teacher over text (what `kdkernels cache` does without a command)")
    add_options(build, CacheConfig(), GROUPS)
    build.set_defaults(run=_build)
    verify = inner.add_parser("verify", help="read every block, compare every checksum")
    verify.set_defaults(run=_verify)
    stat = inner.add_parser("stat", help="what a cache holds")
    stat.add_argument("--json", action="store_true", help="print JSON")
    stat.set_defaults(run=_stat)
    merge = inner.add_parser("merge", help="take parts, which ranks or machines wrote, into one cache")
    merge.add_argument("path", metavar="CACHE", help="the cache; made like the first part where there is none")
    merge.add_argument("parts", nargs="+", metavar="PART", help="a cache to take in; it stays as it is")
    merge.set_defaults(run=_merge)
    for parser in (verify, stat):
        parser.add_argument("path", metavar="CACHE", help="folder of the cache")
    verify.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_import(inner)


def _add_import(inner: Any) -> None:
    from kdkernels.compression.importers import FORMATS

    source = inner.add_parser("import", help="make a cache of top-k files that another program wrote")
    source.add_argument("source", help="folder of .npz or .npy files, or a Hugging Face dataset on disk")
    source.add_argument("--out", required=True, metavar="DIR", help="folder of the cache")
    source.add_argument("--format", required=True, choices=FORMATS, help="what the files hold; docs/cache.md has more")
    source.add_argument("--vocab-size", required=True, type=int, metavar="INT", help="entries of the teacher's rows")
    source.add_argument("--k", type=int, metavar="INT", help="most entries a row has (default: found by a pass)")
    source.add_argument("--temperature", type=float, default=1.0, metavar="FLOAT", help="of the rows (default 1.0)")
    source.add_argument("--bits", type=int, default=8, metavar="INT", help="bits of a log-probability (default 8)")
    source.add_argument("--teacher", default="", metavar="STR", help="recorded: which model it was")
    source.add_argument(
        "--tokenizer", default="", metavar="STR", help="recorded with its hash, which distillation compares"
    )
    source.add_argument(
        "--aligned", choices=("next", "same"), default="next",
        help="row t is the distribution of token t + 1 (next, the default) or of token t (same)",
    )  # fmt: skip
    source.add_argument("--compression", metavar="FILE", default="", help="distillkit: its compression settings, JSON")
    source.add_argument("--resume", action="store_true", help="go on with the cache in --out")
    source.add_argument("--quiet", action="store_true", help="no progress bar")
    source.set_defaults(run=_import)


def _build(arguments: argparse.Namespace) -> int:
    from kdkernels.cli import options_of
    from kdkernels.trainers import Interrupted, build_cache
    from kdkernels.trainers.cache_config import CacheConfig
    from kdkernels.trainers.config import options_from

    values, source = options_of(arguments)
    config = options_from(values, source, CacheConfig)
    try:
        cache = build_cache(config, progress=not arguments.quiet)
    except Interrupted as stop:
        print(f"kdkernels cache: {stop}", file=sys.stderr)
        return 128 + stop.signum
    if not arguments.quiet:
        print(render(cache.stat()))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    """Exit status 1 where anything is wrong, each on a line of its own."""
    from kdkernels.compression.reader import CacheReader

    reader = CacheReader(arguments.path)
    with _bar(len(reader), arguments.quiet) as bar:
        problems = reader.verify(lambda done, of: bar.update(done - bar.n))
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{arguments.path}: {len(reader)} examples, every checksum right")
    return 1 if problems else 0


def _stat(arguments: argparse.Namespace) -> int:
    from kdkernels.compression.reader import CacheReader

    stat = CacheReader(arguments.path).stat()
    print(json.dumps(stat, indent=2) if arguments.json else render(stat))
    return 0


def render(stat: dict[str, Any]) -> str:
    """A cache's `stat` as lines of name and value."""
    lines = {name: value for name, value in stat.items() if value or type(value) in (int, float)}
    lines.pop("metadata", None)
    lines.update({f"metadata.{name}": value for name, value in stat["metadata"].items()})
    width = max(map(len, lines))
    numbers = ("examples", "tokens", "bytes")
    return "\n".join(
        f"{name.ljust(width)}  {f'{value:,}' if name in numbers else value}" for name, value in lines.items()
    )


def _merge(arguments: argparse.Namespace) -> int:
    from kdkernels.compression.merge import merge
    from kdkernels.compression.reader import CacheReader
    from kdkernels.compression.writer import CacheWriter

    settings = CacheReader(arguments.parts[0]).settings
    exists = Path(arguments.path, "manifest.json").is_file()
    with CacheWriter(arguments.path) if exists else CacheWriter.create(arguments.path, settings) as writer:
        new = merge(writer, arguments.parts)
        print(f"{arguments.path}: {new} examples taken in, {len(writer.reader)} in all")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from kdkernels.compression import importers

    compression = _json(arguments.compression) if arguments.compression else None
    hashed = ""
    if arguments.tokenizer:
        from kdkernels.trainers.models import load_tokenizer, tokenizer_hash

        hashed = tokenizer_hash(load_tokenizer("tokenizer", arguments.tokenizer))
    examples = importers.read(
        arguments.format, arguments.source, vocab_size=arguments.vocab_size, compression=compression, k=arguments.k
    )
    with _bar(len(examples), arguments.quiet) as bar:
        cache = importers.write(
            examples, arguments.out, vocab_size=arguments.vocab_size, temperature=arguments.temperature,
            bits=arguments.bits, teacher=arguments.teacher, tokenizer=arguments.tokenizer, tokenizer_hash=hashed,
            aligned=arguments.aligned, resume=arguments.resume, progress=bar.update,
        )  # fmt: skip
    print(render(cache.stat()))
    return 0


def _json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"compression is {path!r}; it cannot be read ({error}); give a JSON file") from error
    if not isinstance(value, dict):
        raise UserError(f"compression {path!r} holds a {type(value).__name__}; allowed: one table of settings")
    return value


def _bar(total: int, quiet: bool) -> Any:
    try:
        tqdm = importlib.import_module("tqdm")
    except ModuleNotFoundError:
        return _NoBar()
    return tqdm.tqdm(total=total, unit="example", disable=quiet, dynamic_ncols=True)


class _NoBar:
    """Where tqdm is not installed."""

    n = 0

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """Nothing to show."""
        self.n += count
