"""What the person installing asked for, read from the environment once."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

MODES = ("auto", "cpu", "cuda", "none")
SANITIZERS = {"address,undefined", "undefined", "address", "thread"}


class BuildError(Exception):
    """The native build cannot go on; the text says why and what to do."""


@dataclass(frozen=True)
class Options:
    """`mode` is one of MODES; `sanitize` a -fsanitize= list or ""; `jobs` >= 1."""

    mode: str
    sanitize: str
    jobs: int

    @property
    def native(self) -> bool:
        """Whether anything is to be compiled: never for `none`, and on Linux only for `auto`."""
        return self.mode != "none" and not (self.mode == "auto" and sys.platform != "linux")


def _jobs() -> int:
    asked = os.environ.get("KD_JOBS") or os.environ.get("MAX_JOBS")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdigit() or int(asked) < 1:
        raise BuildError(f"KD_JOBS (or MAX_JOBS) is {asked!r}; it must be a positive number of parallel compiles")
    return int(asked)


def read() -> Options:
    """The options of this build. Raises BuildError for a value that means nothing."""
    mode = os.environ.get("KD_BUILD", "auto").strip().lower() or "auto"
    if mode not in MODES:
        raise BuildError(f"KD_BUILD is {mode!r}; it must be one of {', '.join(MODES)} (auto: CUDA iff nvcc is found)")
    sanitize = os.environ.get("KD_SANITIZE", "").replace(" ", "")
    if sanitize and sanitize not in SANITIZERS:
        raise BuildError(f"KD_SANITIZE is {sanitize!r}; it must be one of {'; '.join(sorted(SANITIZERS))}, or unset")
    return Options(mode, sanitize, _jobs())
