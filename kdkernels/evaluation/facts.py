"""Identity facts, questions and known models: YAML files, or the same as plain values.

Shipped files lie in `data/`; their formats are in docs/evaluation.md. Every error names the file and the entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError
from kdkernels.evaluation.verdicts import KnownNames
from kdkernels.optional import need

ASPECTS = ("team", "industry", "technology", "geography", "cooperation")
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Facts:
    """Who the model is: `statements` by aspect, `own` the names that it, its makers and places rightly go by,
    `wrong` further names that would contradict the statements."""

    name: str
    statements: Mapping[str, tuple[str, ...]]
    own: tuple[str, ...]
    wrong: tuple[str, ...] = ()

    @property
    def all_statements(self) -> tuple[str, ...]:
        """Of every aspect, in the aspects' order."""
        return tuple(text for aspect in ASPECTS for text in self.statements.get(aspect, ()))

    def names(self, sources: Sequence[Source]) -> KnownNames:
        """What the offline judge looks for; names that are the model's own are nobody else's."""
        own = {name.casefold() for name in self.own}
        others = {s.name: tuple(name for name in s.names if name.casefold() not in own) for s in sources}
        return KnownNames(self.own, {name: names for name, names in others.items() if names}, self.wrong)


@dataclass(frozen=True)
class Source:
    """A model that others may be distilled from, and the names that it and its makers go by."""

    name: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about identity; {source} in its text stands for a suspected source."""

    id: str
    aspect: str
    language: str
    text: str


def load_facts(value: str | Path | Mapping[str, Any] | Facts) -> Facts:
    """From a YAML file, a shipped one by name ("facts-en", "facts-zh": of no real model), or a mapping."""
    if isinstance(value, Facts):
        return value
    table, where = _read(value, "facts")
    names = [_text(table, "name", where), *_texts(table, "aliases", where)]
    statements, wrong = {}, []
    for aspect, value_of in _mapping(table.get("facts"), f"{where}: facts").items():
        place = f"{where}: facts.{aspect}"
        _check_aspect(aspect, place)
        entry = _mapping(value_of, place)
        statements[aspect] = tuple(_texts(entry, "statements", place, needed=True))
        names += _texts(entry, "names", place)
        wrong += _texts(entry, "wrong", place)
    if not statements:
        raise UserError(f"{where}: facts is empty; give at least one aspect of {', '.join(ASPECTS)}")
    return Facts(names[0], statements, tuple(dict.fromkeys(names)), tuple(dict.fromkeys(wrong)))


def load_sources(value: str | Path | Mapping[str, Any] | None = None) -> tuple[Source, ...]:
    """Known models, from a YAML file or a mapping of name -> list of names; None is the shipped list."""
    table, where = _read("sources" if value is None else value, "sources")
    entries = _mapping(table.get("sources", table), f"{where}: sources")
    found = []
    for name, names in entries.items():
        others = _texts({"names": names}, "names", f"{where}: sources.{name}")
        found.append(Source(str(name), tuple(dict.fromkeys([str(name), *others]))))
    return tuple(found)


def load_questions(value: Any = None, language: str | None = None) -> tuple[Question, ...]:
    """From a YAML file, a list of mappings or of `Question`; None is the shipped ones. Texts must differ."""
    if value is None:
        tables = [_read(f"questions-{name}", "questions") for name in LANGUAGES]
    elif isinstance(value, (str, Path, Mapping)):
        tables = [_read(value, "questions")]
    else:
        tables = [({"questions": list(value)}, "questions")]
    found = [question for table, where in tables for question in _questions(table, where)]
    found = [question for question in found if language in (None, question.language)]
    if not found:
        raise UserError("questions are empty" + (f" in language {language!r}" if language else "") + "; give some")
    for key in ("id", "text"):
        seen: set[str] = set()
        for question in found:
            if getattr(question, key) in seen:
                raise UserError(f"questions: {key} {getattr(question, key)!r} occurs twice; leave one out")
            seen.add(getattr(question, key))
    return tuple(found)


def _questions(table: Mapping[str, Any], where: str) -> list[Question]:
    entries = table.get("questions")
    if not isinstance(entries, list):
        raise UserError(f"{where}: questions is {_short(entries)}; allowed: a list of id, aspect, text")
    found = []
    for number, item in enumerate(entries):
        if isinstance(item, Question):
            found.append(item)
            continue
        place = f"{where}: questions[{number}]"
        entry = _mapping(item, place)
        aspect = _text(entry, "aspect", place)
        _check_aspect(aspect, place)
        language = _text({"language": "en", **table, **entry}, "language", place)
        identity = _text({"id": f"{language}-{number}", **entry}, "id", place)
        found.append(Question(identity, aspect, language, _text(entry, "text", place)))
    return found


def shipped(name: str) -> Any:
    """A file of `data/` by its stem, or None."""
    path = files("kdkernels.evaluation") / "data" / f"{name}.yaml"
    return path if path.is_file() else None


def _read(value: Any, what: str) -> tuple[Mapping[str, Any], str]:
    """(mapping, where it comes from)."""
    if isinstance(value, Mapping):
        return value, what
    if not isinstance(value, (str, Path)):
        raise UserError(f"{what} is a {type(value).__name__}; allowed: a YAML file's path or a mapping")
    path: Any = Path(value).expanduser()
    if not path.is_file():
        path = shipped(str(value))
    if path is None:
        raise UserError(f"{what} is {str(value)!r}; no such file; give a YAML file")
    return load_yaml(path), str(value)


def load_yaml(path: Any) -> Mapping[str, Any]:
    """A YAML file whose top is a mapping (safe loading: plain values only)."""
    yaml = need("yaml", f"reading {path.name}")
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _check_aspect(aspect: Any, where: str) -> None:
    if aspect not in ASPECTS:
        raise UserError(f"{where}: aspect is {_short(aspect)}; allowed: {', '.join(ASPECTS)}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {_short(value)}; allowed: a mapping")
    return value


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} is {_short(value)}; allowed: a text")
    return value.strip()


def _texts(table: Mapping[str, Any], key: str, where: str, *, needed: bool = False) -> list[str]:
    value = table.get(key, [])
    value = [value] if isinstance(value, str) else value
    if (
        not isinstance(value, list)
        or not all(isinstance(v, str) and v.strip() for v in value)
        or (needed and not value)
    ):
        raise UserError(f"{where}: {key} is {_short(value)}; allowed: a list of texts (quote numbers, true and false)")
    return [v.strip() for v in value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
