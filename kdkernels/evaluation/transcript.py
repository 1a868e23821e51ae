"""The transcript of an ICE run: a JSON-lines file, one event a line, from which a stopped run goes on.

start      the settings, whose change is refused on resuming
template   step, id, text, language, parent, mutator, by
answer     step, question, aspect, template, prompt, answer
verdict    step, question, conflict, claims; or problem and text where the judge gave none
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from kdkernels.errors import UserError


class Transcript:
    """Events by kind and place; written as they happen, read again on resuming. Without a path they are only kept."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any], *, resume: bool) -> None:
        self.events: dict[tuple[str, int, str], dict[str, Any]] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        place = Path(path).expanduser()
        old = _read(place) if place.is_file() else b""
        if old and not resume:
            raise UserError(f"transcript {str(path)!r} exists; go on with resume=True (--resume) or name another file")
        settings = json.loads(json.dumps(settings))
        self._take(old, settings, str(path))
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("r+b" if place.is_file() else "wb") as file:
                file.truncate(len(old))  # a line that was cut short by a kill
            self._file = place.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"transcript {str(path)!r} cannot be written ({error.strerror}); name another") from error
        if not old:
            self._write({"event": "start", "settings": settings})

    def get(self, event: str, step: int, question: str = "") -> dict[str, Any] | None:
        """An event that has happened."""
        return self.events.get((event, step, question))

    def add(self, event: str, step: int, question: str = "", **values: Any) -> dict[str, Any]:
        """Keep and write an event."""
        place = {"question": question} if question else {}
        record = {"event": event, "step": step, **place, **values}
        self.events[event, step, question] = record
        self._write(record)
        return record

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()

    def _take(self, content: bytes, settings: dict[str, Any], path: str) -> None:
        """Read the events; settings must be those of the start."""
        for number, line in enumerate(content.splitlines()):
            try:
                record = json.loads(line)
                if number == 0:
                    before = record["settings"]
                    changed = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
                    if changed:
                        raise UserError(
                            f"transcript {path!r} was begun with other {', '.join(sorted(changed))}; take the same or "
                            "name another file"
                        )
                    continue
                self.events[record["event"], record["step"], record.get("question", "")] = record
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"transcript {path!r}: line {number + 1} is no event; mend it or name another file"
                ) from error


def _read(path: Path) -> bytes:
    """The file up to its last whole line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
