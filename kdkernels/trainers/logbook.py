"""Metrics as JSON lines, resumable: a checkpoint remembers the length of the file, and resuming cuts it back."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any


class Logbook:
    """Appends one JSON object per line to `path`; every line is flushed, so a reader may follow along."""

    def __init__(self, path: Path, length: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(length)

    def write(self, event: str, **values: Any) -> None:
        """One line; numbers that JSON cannot hold become null."""
        row = {"event": event, "time": round(time.time(), 3), **values}
        self._file.write((json.dumps(_finite(row), ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def length(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, MiB; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: its figure survives exec, so a child may report its parent's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / unit
