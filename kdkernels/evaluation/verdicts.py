"""What a judge is shown and what it says, and how its answers are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SIMILARITY_KEYS = ("style", "logic", "content", "overall")


@dataclass(frozen=True)
class SimilarityCase:
    """Two answers to one prompt. `earlier` holds the user's turns before it, in a conversation of several."""

    prompt: str
    reference: str
    response: str
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class SimilarityScores:
    """style, logic, content: 0 (diverges), 1 (partly aligns), 2 (closely mirrors); overall: 1 (very different) to 5."""

    style: float
    logic: float
    content: float
    overall: float


@dataclass(frozen=True)
class KnownNames:
    """The names that a judge without understanding looks for: the model's own, those of others, and wrong answers.

    sources: per model the names that it and its makers go by. wrong: other names that contradict a fact.
    """

    own: tuple[str, ...] = ()
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class IdentityCase:
    """An answer about the speaker's identity; `facts` are statements about who it really is."""

    prompt: str
    answer: str
    facts: tuple[str, ...]
    names: KnownNames = KnownNames()

    @property
    def sources(self) -> tuple[str, ...]:
        """The models that it may pass itself off as."""
        return tuple(self.names.sources)


@dataclass(frozen=True)
class IdentityVerdict:
    """Whether the answer conflicts with the facts about "I", and which of the sources it claims to be (or be from)."""

    conflict: bool
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unparsable:
    """A judge's answer that is no verdict: its text, and what is wrong with it. Counted, never scored."""

    text: str
    problem: str


def read_similarity(answer: Any) -> SimilarityScores | Unparsable:
    """Scores from a mapping, four numbers, or a text that holds a JSON object with the four keys."""
    if isinstance(answer, (SimilarityScores, Unparsable)):
        return answer
    if isinstance(answer, (tuple, list)) and len(answer) == len(SIMILARITY_KEYS):
        answer = dict(zip(SIMILARITY_KEYS, answer, strict=True))
    found = _mapping(answer, SIMILARITY_KEYS)
    if isinstance(found, Unparsable):
        return found
    values = {}
    for key in SIMILARITY_KEYS:
        value = _number(found.get(key))
        allowed = value is not None and (1 <= value <= 5 if key == "overall" else value in (0, 1, 2))
        if value is None or not allowed:
            scale = "1 to 5" if key == "overall" else "0, 1 or 2"
            return Unparsable(_text(answer), f"{key} is {_short(found.get(key))}; allowed: {scale}")
        values[key] = value
    return SimilarityScores(**values)


def read_identity(answer: Any, sources: tuple[str, ...]) -> IdentityVerdict | Unparsable:
    """A verdict from a mapping, a bool (conflict), or a text with a JSON object of `conflict` and `claims`.

    `claims` is a name or a list of names; names that are none of `sources` are left out (the conflict stays).
    """
    if isinstance(answer, (IdentityVerdict, Unparsable)):
        return answer
    if isinstance(answer, bool):
        return IdentityVerdict(answer)
    found = _mapping(answer, ("conflict",))
    if isinstance(found, Unparsable):
        return found
    conflict = found.get("conflict")
    if isinstance(conflict, str) and conflict.strip().lower() in ("true", "false", "yes", "no"):
        conflict = conflict.strip().lower() in ("true", "yes")
    if not isinstance(conflict, bool):
        return Unparsable(_text(answer), f"conflict is {_short(conflict)}; allowed: true or false")
    claims = found.get("claims")
    names = [claims] if isinstance(claims, str) else list(claims) if isinstance(claims, (list, tuple)) else []
    known = {source.casefold(): source for source in sources}
    claimed = dict.fromkeys(known[str(n).strip().casefold()] for n in names if str(n).strip().casefold() in known)
    return IdentityVerdict(conflict, tuple(claimed) if conflict else ())


def _mapping(answer: Any, keys: tuple[str, ...]) -> Mapping[str, Any] | Unparsable:
    """The mapping itself, or the last JSON object in a text that has one of `keys`."""
    if isinstance(answer, Mapping):
        return answer
    if not isinstance(answer, str):
        return Unparsable(_text(answer), f"a {type(answer).__name__}; allowed: a mapping or a text with JSON")
    found = [value for value in _objects(answer) if any(key in value for key in keys)]
    if not found:
        return Unparsable(answer, "no JSON object with " + ", ".join(keys))
    if any(value != found[-1] for value in found[:-1]):
        return Unparsable(answer, "several JSON objects that differ")
    return found[-1]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in a text that is not inside another."""
    decoder, place = json.JSONDecoder(), 0
    while (place := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        if isinstance(value, dict):
            yield value


def _number(value: Any) -> float | None:
    """An int, a float, or a text that is one number."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else repr(answer)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
