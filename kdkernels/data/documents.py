"""Text on disk as documents, by domain.

A domain is a file or a folder (read recursively, in the order of the names, hidden files left out).
A text file is one document; a line of a .jsonl file is one document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kdkernels.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")


def find_domains(data: str, domain: dict[str, str]) -> dict[str, Path]:
    """Domains by name: the subfolders of `data` (or `data` itself where it has none), then `domain`'s paths."""
    found: dict[str, Path] = {}
    if data:
        root = Path(data).expanduser()
        if not root.exists():
            raise UserError(f"data is {data!r}; no such file or folder; give a folder of text files")
        folders = sorted(p for p in root.iterdir() if _visible(p) and p.is_dir()) if root.is_dir() else []
        loose = root.is_file() or any(p.suffix in SUFFIXES for p in root.iterdir() if p.is_file() and _visible(p))
        if folders and loose:
            raise UserError(
                f"data is {data!r}; it holds both text files and folders, so its domains are unclear; "
                "move the files into a folder, or name every domain with --domain NAME=PATH"
            )
        found = {p.name: p for p in folders} if folders else {root.stem: root}
    for name, where in domain.items():
        path = Path(where).expanduser()
        if not path.exists():
            raise UserError(f"domain {name!r} is {where!r}; no such file or folder; correct the path")
        if name in found:
            raise UserError(f"domain {name!r} is given twice, by data {data!r} and by {where!r}; rename one")
        found[name] = path
    return found


def _visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name != "__pycache__"


def text_files(path: Path) -> list[Path]:
    """The files of one domain, sorted by their path inside it, so that the order is the same everywhere."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{str(path)!r} ends in {path.suffix!r}; allowed: {' '.join(SUFFIXES)}; convert it")
        return [path]
    inside = (p.relative_to(path) for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    return [path / p for p in sorted(inside, key=lambda p: p.parts) if all(_visible(Path(x)) for x in p.parts)]


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """Every document of one domain that holds more than blanks."""
    for file in text_files(path):
        texts = _json_lines(file, text_key) if file.suffix == ".jsonl" else [_read(file)]
        yield from (text for text in texts if text.strip())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def _json_lines(file: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{str(file)!r} line {number} is not JSON ({error}); correct it") from error
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise UserError(f"{str(file)!r} line {number} has no text under {key!r}; set --text-key or correct it")
        yield row[key]
