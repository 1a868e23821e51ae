"""Prompts and answers as JSON lines, and answers made by a model where a file has none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError
from kdkernels.evaluation.chat import Chat
from kdkernels.evaluation.results import write_text

Answer = str | list[str] | None


@dataclass(frozen=True)
class Record:
    """A prompt (a text, or the user's turns) with the answers of either side, None where missing."""

    id: str
    dataset: str
    prompt: str | list[str]
    reference: Answer = None
    response: Answer = None

    @property
    def turns(self) -> list[str]:
        """The user's turns."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


def read_records(path: str | Path) -> list[Record]:
    """Lines {"prompt": text or list of turns} and, where known, "reference", "response", "id", "dataset"."""
    found = []
    for number, row in _rows(path):
        where = f"{path}: line {number}"
        unknown = sorted(set(row) - {"id", "dataset", "prompt", "reference", "response"})
        if unknown:
            raise UserError(f"{where} has {unknown[0]!r}; allowed: prompt, reference, response, id, dataset")
        prompt = row.get("prompt")
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and _texts(prompt)):
            raise UserError(f"{where}: prompt is {prompt!r:.60}; allowed: a text, or a list of the user's turns")
        answers = {side: _answer(row.get(side), f"{where}: {side}") for side in ("reference", "response")}
        found.append(Record(str(row.get("id", number)), str(row.get("dataset", "all")), prompt, **answers))
    if not found:
        raise UserError(f"{path} is empty; give a line of JSON for each prompt")
    return found


def with_answers(records: Sequence[Record], side: str, path: str | Path) -> list[Record]:
    """Fill `side` from another file, lines {"id" or "prompt", side: answer}; prompts without a line stay."""
    by_key: dict[str, Answer] = {}
    for number, row in _rows(path):
        key = _key("id", str(row["id"])) if "id" in row else _key("prompt", row.get("prompt"))
        if side not in row or key == _key("prompt", None):
            raise UserError(f"{path}: line {number} has no {side!r}, or neither id nor prompt; allowed: both")
        if key in by_key:
            raise UserError(f"{path}: line {number} repeats {key}; leave one out")
        by_key[key] = _answer(row[side], f"{path}: line {number}: {side}")
    found, used = [], set()
    for record in records:
        keys = [key for key in (_key("id", record.id), _key("prompt", record.prompt)) if key in by_key]
        used.update(keys[:1])
        found.append(_filled(record, side, by_key[keys[0]]) if keys else record)
    left = sorted(set(by_key) - used)
    if left:
        raise UserError(f"{path} answers {left[0]}, which is none of the prompts; correct the file")
    return found


def generate(
    records: Sequence[Record], side: str, chat: Chat, progress: Callable[[int, int], None] | None = None
) -> list[Record]:
    """Let a model answer where `side` is missing; in conversations it sees its own earlier answers."""
    missing = [i for i, record in enumerate(records) if getattr(record, side) is None]
    talks: dict[int, list[dict[str, str]]] = {i: [] for i in missing}
    total, done = sum(len(records[i].turns) for i in missing), 0
    for turn in range(max((len(records[i].turns) for i in missing), default=0)):
        batch = [i for i in missing if turn < len(records[i].turns)]
        for i in batch:
            talks[i].append({"role": "user", "content": records[i].turns[turn]})
        for place, reply in chat.replies([talks[i] for i in batch]):
            talks[batch[place]] = [*talks[batch[place]], {"role": "assistant", "content": reply.text}]
            done += 1
            if progress is not None:
                progress(done, total)
    found = list(records)
    for i in missing:
        answers = [message["content"] for message in talks[i] if message["role"] == "assistant"]
        found[i] = _filled(found[i], side, answers[0] if isinstance(found[i].prompt, str) else answers)
    return found


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """One line each, as `read_records` reads them."""
    lines = [json.dumps({k: v for k, v in vars(r).items() if v is not None}, ensure_ascii=False) for r in records]
    write_text(path, "\n".join(lines) + "\n")


def _filled(record: Record, side: str, answer: Answer) -> Record:
    return replace(record, reference=answer) if side == "reference" else replace(record, response=answer)


def _rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        # not splitlines: U+2028 and its like may stand within a line of JSON
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is a {type(row).__name__}; allowed: a JSON object")
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{path}: line {number} holds half a surrogate pair (\\ud800 to \\udfff); allowed: text")
        yield number, row


def _answer(value: Any, where: str) -> Answer:
    if value is None or isinstance(value, str) or (isinstance(value, list) and _texts(value)):
        return value
    raise UserError(f"{where} is {value!r:.60}; allowed: a text, a list of texts for a conversation, or null")


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _key(kind: str, value: Any) -> str:
    return f"{kind} {json.dumps(value, ensure_ascii=False)}"
