"""Deliberate damage to compiled code: to show that the emulator notices it.

A mutant is the PTX text with one statement changed. `Mutants(text).barriers()` and its kin list them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: what was done, at which line, and the changed module."""

    kind: str
    line: int
    statement: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind} at line {self.line}: {self.statement}"


class Mutants:
    """Mutants of one PTX module."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _changed(self, kind: str, pattern: str, replacement: str) -> Iterator[Mutant]:
        for match in re.finditer(pattern, self.text, re.MULTILINE):
            line = self.text.count("\n", 0, match.start(1)) + 1
            new = self.text[: match.start()] + match.expand(replacement) + self.text[match.end() :]
            yield Mutant(kind, line, match[1].strip(), new)

    def barriers(self) -> list[Mutant]:
        """Each barrier of a CTA or a cluster removed."""
        pattern = r"^[ \t]*((?:bar\.sync|barrier\.(?:sync|cluster\.(?:wait|arrive)))[^;]*;)"
        return list(self._changed("barrier removed", pattern, ""))

    def waits(self) -> list[Mutant]:
        """Each wait for asynchronous copies removed."""
        return list(self._changed("wait removed", r"^[ \t]*(cp\.async\.(?:bulk\.)?wait_[^;]*;)", ""))

    def masks(self) -> list[Mutant]:
        """The guard of each guarded global access dropped."""
        pattern = r"^[ \t]*(@!?%\w+\s+((?:ld|st|red|atom)\.global[^;]*;))"
        return list(self._changed("mask dropped", pattern, r"\2"))

    def shuffles(self) -> list[Mutant]:
        """Each butterfly shuffle with the wrong distance: 0 instead of its own."""
        pattern = r"^[ \t]*((shfl\.sync\.bfly\.b32\s+[^,]+,\s*[^,]+,)\s*\d+(,[^;]*;))"
        return list(self._changed("shuffle distance 0", pattern, r"\2 0\3"))

    def everything(self) -> list[Mutant]:
        """All of them."""
        return [*self.barriers(), *self.waits(), *self.masks(), *self.shuffles()]
