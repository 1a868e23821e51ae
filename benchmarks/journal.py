"""What a stopped run had finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Named pieces of work whose results survive the process, one JSON line each.

    Args:
        path: the file; its first line holds the settings.
        settings: if the file was written under others, it is begun anew.
        say: called with a line for each piece.
    """

    def __init__(self, path: Path, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self._found: dict[str, Any] = {}
        head = json.dumps({"settings": settings}, default=str)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines[:1] == [head]:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # cut off while it was written
                    break
                self._found[entry["name"]] = entry["result"]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps({"name": name, "result": result}) for name, result in self._found.items()]
        path.write_text("".join(f"{line}\n" for line in [head, *kept]))

    def do(self, name: str, work: Callable[[], Any]) -> Any:
        """The result noted under ``name``, or that of ``work``, which is noted."""
        if name in self._found:
            self.say(f"{name}: done before")
            return self._found[name]
        start = time.monotonic()
        result = work()
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, "result": result}) + "\n")
        self.say(f"{name}: {time.monotonic() - start:.0f} s")
        return result

    def close(self) -> None:
        """Everything is done: nothing to go on with."""
        self.path.unlink()
