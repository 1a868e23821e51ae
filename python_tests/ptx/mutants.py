"""Deliberate damage to compiled code: to show that the emulator notices it.

A mutant is the PTX text with one statement changed. `Mutants(text).barriers()` and its kin list them.
"""

from __future__ import annotations

import dataclasses
import re
import struct
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

    def maxima(self) -> list[Mutant]:
        """Each maximum of floating-point numbers made a minimum."""
        return list(self._changed("minimum for maximum", r"^[ \t]*(max((?:\.NaN)?\.f32[^;]*;))", r"min\2"))

    def bounds(self) -> list[Mutant]:
        """Each comparison of signed integers off by one: equal numbers go to the other side."""
        kind, swapped = "bound off by one", {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
        pairs = [(rf"^[ \t]*(setp\.{old}(\.s(?:32|64)[^;]*;))", rf"setp.{new}\2") for old, new in swapped.items()]
        return [mutant for pattern, new in pairs for mutant in self._changed(kind, pattern, new)]

    def replacements(self, *constants: float) -> list[Mutant]:
        """Each choice between a register and one of these constants left to the register."""
        words = "|".join("0f" + struct.pack(">f", constant).hex().upper() for constant in constants)
        first, second = rf"(?:{words}),\s*(%\w+)", rf"(%\w+),\s*(?:{words})"
        kind, opcode = "replacement dropped", r"^[ \t]*(selp\.[bf]32(\s+%\w+,\s*)"
        patterns = [rf"{opcode}{choice},\s*%\w+;)" for choice in (first, second)]
        return [mutant for pattern in patterns for mutant in self._changed(kind, pattern, r"mov.b32\2\3;")]

    def stores(self, distance: int) -> list[Mutant]:
        """Each global store that many bytes further on: into the next row, if rows are as long."""
        pattern = r"^[ \t]*(((?:@!?%\w+\s+)?st\.global[^\[;]*\[\s*%\w+\s*)(?:\+\s*0\s*)?(\][^;]*;))"
        return list(self._changed("store displaced", pattern, rf"\2 + {distance} \3"))

    def everything(self) -> list[Mutant]:
        """Those that need no number: barriers, waits, masks, shuffles."""
        return [*self.barriers(), *self.waits(), *self.masks(), *self.shuffles()]
