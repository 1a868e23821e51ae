"""One version of a student: everything that lies in the folder of a run, and what it lacks.

Looked at are `config.json`, `metrics.jsonl` and `summary.json` of `kdkernels distill`, and, anywhere beneath, the
results of `kdkernels evaluate` (recognised by their `kind`), its `answers.jsonl`, and `kdkernels generate --json`. A
result with "before" in its path is that of the student before distillation. A file that cannot be read is a problem
that the report shows, not an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError
from kdkernels.evaluation.compare_result import ComparisonResult
from kdkernels.evaluation.diversity import DiversityResult, response_diversity
from kdkernels.evaluation.identity_result import IdentityResult
from kdkernels.evaluation.records import read_records
from kdkernels.evaluation.results import Result
from kdkernels.evaluation.similarity_result import SimilarityResult

KINDS: dict[str, tuple[str, type[Result]]] = {
    ComparisonResult.kind: ("comparison", ComparisonResult),
    SimilarityResult.kind: ("similarity", SimilarityResult),
    IdentityResult.kind: ("identity", IdentityResult),
    DiversityResult.kind: ("diversity", DiversityResult),
}
REPORT = "kdkernels.report"
_SKIPPED = {"student", "teacher", "checkpoints", "text", "data", "node_modules"}
_ANSWERS = {"answers.jsonl": "", "identity.jsonl": " identity"}
_DEPTH = 4
_BEFORE = re.compile(r"(?<![a-z])before(?![a-z])")


@dataclass
class Version:
    """What is known of a student. Dictionaries are as their files hold them; None where there is no file."""

    name: str
    path: Path
    config: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    """By "comparison", "similarity", "identity", "diversity", and these with " before"."""
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Prompts and answers, by "", " before" and " identity" (`identity.jsonl`: questions about identity)."""
    generations: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def rows(self, event: str) -> list[dict[str, Any]]:
        """Lines of the log of one kind."""
        return [row for row in self.log if row.get("event") == event]

    def comparison(self) -> ComparisonResult | None:
        """The white-box comparison."""
        found = self.results.get("comparison")
        return found if isinstance(found, ComparisonResult) else None

    def similarity(self, before: bool = False) -> SimilarityResult | None:
        """RSE."""
        found = self.results.get("similarity" + (" before" if before else ""))
        return found if isinstance(found, SimilarityResult) else None

    def identity(self, before: bool = False) -> IdentityResult | None:
        """ICE."""
        found = self.results.get("identity" + (" before" if before else ""))
        return found if isinstance(found, IdentityResult) else None

    def diversity(self, before: bool = False) -> DiversityResult | None:
        """Of the answers that RSE compared."""
        found = self.results.get("diversity" + (" before" if before else ""))
        return found if isinstance(found, DiversityResult) else None


def load_versions(folders: list[str]) -> list[Version]:
    """A version for each folder, named as short as keeps them apart."""
    paths = [Path(folder).expanduser() for folder in folders]
    for path, given in zip(paths, folders, strict=True):
        if not path.is_dir():
            raise UserError(
                f"run is {given!r}; no such folder; give the output folder of kdkernels distill or evaluate"
            )
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"runs is {folders}; one comes twice; leave it out")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [load_version(path, name) for path, name in zip(paths, names, strict=True)]


def load_version(path: Path, name: str) -> Version:
    """Read a folder; `UserError` where it holds nothing of ours."""
    found = Version(name, path)
    found.config = _table(path / "config.json", found)
    found.summary = _table(path / "summary.json", found)
    for key in ("before", "after"):
        if found.summary is not None and not _is_tables(found.summary.get(key, {})):
            found.problems.append(f"summary.json: {key} holds no scores by domain and was left out")
            found.summary = {name: value for name, value in found.summary.items() if name != key}
    _read_log(path / "metrics.jsonl", found)
    for file in _files(path):
        if file.name in _ANSWERS:
            _read_answers(file, found, _ANSWERS[file.name])
        elif file.suffix == ".json":
            _read_result(file, found)
    for side in ("", " before"):
        _measure_diversity(found, side)
    if not (found.log or found.summary or found.results or found.generations):
        lost = f" ({found.problems[0]})" if found.problems else ""
        raise UserError(
            f"run is {str(path)!r}; it holds no metrics.jsonl, no summary.json and no result of kdkernels "
            f"evaluate{lost}; give the output folder of a run"
        )
    return found


def _files(root: Path) -> Iterator[Path]:
    """Files beneath, near ones first, models and text left out."""
    level = [root]
    for _ in range(_DEPTH):
        deeper = []
        for folder in level:
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
            yield from (Path(e.path) for e in inside if e.is_file())
            wanted = (e for e in inside if e.is_dir() and e.name not in _SKIPPED and not e.name.startswith("."))
            deeper += [Path(e.path) for e in wanted]
        level = deeper


def _side(file: Path, version: Version) -> str:
    return " before" if _BEFORE.search(str(file.relative_to(version.path)).lower()) else ""


def _text(file: Path, version: Version) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        version.problems.append(f"{file.relative_to(version.path)} cannot be read: {error}")
        return None


def _table(file: Path, version: Version) -> dict[str, Any] | None:
    text = _text(file, version) if file.is_file() else None
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        version.problems.append(f"{file.relative_to(version.path)} is no JSON: {error}")
        return None
    if not isinstance(value, dict):
        version.problems.append(f"{file.relative_to(version.path)} holds a {type(value).__name__}; allowed: a table")
        return None
    return value


def _read_log(file: Path, version: Version) -> None:
    text = _text(file, version) if file.is_file() else None
    for number, line in enumerate((text or "").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):  # the last line of a run that was killed
            version.problems.append(f"{file.name}: line {number} is no JSON object and was left out")
            continue
        if not _is_event(row):
            version.problems.append(f"{file.name}: line {number} is no event of a run and was left out")
            continue
        version.log.append(row)


def _is_event(row: dict[str, Any]) -> bool:
    """Whether the fields that a page is made from have their types."""
    event, step = row.get("event"), row.get("step")
    if event not in ("step", "eval", "ddk"):
        return True
    if not isinstance(step, (int, float)) or isinstance(step, bool) or not 0 <= step < 1e15:
        return False
    if event == "eval":
        return _is_tables(row.get("domains"))
    return event == "step" or all(isinstance(row.get(name, {}), dict) for name in ("weights", "discrepancy"))


def _is_tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _is_generation(row: Any) -> bool:
    """A row of `kdkernels generate --json`, whose curves are numbers or None."""
    if not isinstance(row, dict) or "teacher_tokens" not in row:
        return False
    curves = row.get("by_position") or {}
    return isinstance(curves, dict) and all(
        item is None or (isinstance(item, (int, float)) and not isinstance(item, bool))
        for curve in curves.values()
        for item in (curve if isinstance(curve, list) else [])
    )


def _read_result(file: Path, version: Version) -> None:
    """A result by its kind, or figures of `kdkernels generate`; files of others are passed over."""
    with file.open("rb") as opened:
        head = opened.read(4096)
    ours = b'"kdkernels.' in head
    if not ours and b'"teacher_tokens"' not in head:
        return
    where = str(file.relative_to(version.path))
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        version.problems.append(f"{where} cannot be read: {error}")
        return
    if not ours:
        rows = values if isinstance(values, list) else [values]
        version.generations += [row for row in rows if _is_generation(row)]
        if not all(map(_is_generation, rows)):
            version.problems.append(f"{where} holds rows that are none of kdkernels generate; they were left out")
        return
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        if isinstance(kind, str) and kind.startswith("kdkernels.") and kind != REPORT:
            version.problems.append(f"{where} is a {kind!r}, which this report does not know")
        return
    key, result = KINDS[kind]
    key += _side(file, version)
    if key in version.results:
        version.problems.append(f"{where} is one more {key}; the first found is shown")
        return
    try:
        version.results[key] = result.from_dict(values)
    except (UserError, TypeError, KeyError, AttributeError, ValueError) as error:
        version.problems.append(f"{where} cannot be read: {error}")


def _read_answers(file: Path, version: Version, side: str) -> None:
    side += _side(file, version)
    if side in version.answers:
        return
    try:
        version.answers[side] = [vars(record) for record in read_records(file)]
    except UserError as error:
        version.problems.append(str(error))


def _measure_diversity(version: Version, side: str) -> None:
    """From the answers, where no result lies ready."""
    if "diversity" + side in version.results or side not in version.answers:
        return
    pairs = [(r["response"], r["reference"]) for r in version.answers[side]]
    pairs = [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]  # of conversations, none
    try:
        found = response_diversity([a for a, _ in pairs], [b for _, b in pairs])
    except UserError as error:
        version.problems.append(f"diversity{side}: {error}")
        return
    version.results["diversity" + side] = found
