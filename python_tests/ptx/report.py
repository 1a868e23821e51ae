"""What a launch executed: instructions by opcode and class, memory requests, sectors, bytes, bank passes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from .parser import Instruction

SPECIAL = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"}


@dataclasses.dataclass
class Counts:
    """Of one static instruction, over a launch."""

    threads: int = 0  # executions by threads whose guard holds
    warps: int = 0  # issues: warps with any lane at the instruction, whatever its guard
    requests: int = 0  # warps that accessed memory
    sectors: int = 0  # 32-byte sectors of global memory
    bytes: int = 0  # asked for by threads
    passes: int = 0  # over the banks of shared memory
    least_passes: int = 0  # without conflicts


UNTOUCHED = Counts()
"""Stands for every instruction that is never executed: most of a kernel, and a launch would make thousands."""


def classify(instruction: Instruction) -> str:
    """load, store, atomic, special (function unit), barrier or other. `div` counts as special: it issues rcp."""
    opcode = instruction.opcode
    if opcode in {"ld", "ldu", "ldmatrix"} and not instruction.has("param"):
        return "load"
    if opcode == "cp" and len(instruction.operands) > 1:
        into_global = next(m for m in instruction.modifiers if m.split("::")[0] in {"shared", "global"}) == "global"
        return "store" if into_global else "load"
    if opcode == "st":
        return "store"
    if opcode in {"atom", "red"}:
        return "atomic"
    if opcode in {"bar", "barrier", "mbarrier", "fence", "membar"}:
        return "barrier"
    if opcode in SPECIAL or (opcode == "div" and instruction.type == "f32"):
        return "special"
    return "other"


@dataclasses.dataclass
class Report:
    """Counts of one launch. Sums are over all threads or warps of the grid."""

    kernel: str
    instructions: Sequence[Instruction]
    counts: Sequence[Counts]
    grid: tuple[int, int, int]
    threads: int  # of a CTA
    seconds: float = 0.0
    target: int = 0

    def _select(self, *classes: str) -> Iterable[Counts]:
        pairs = zip(self.instructions, self.counts, strict=True)
        return (count for instruction, count in pairs if not classes or classify(instruction) in classes)

    @property
    def thread_instructions(self) -> int:
        """Instructions executed by threads."""
        return sum(count.threads for count in self.counts)

    @property
    def warp_instructions(self) -> int:
        """Instructions issued to warps."""
        return sum(count.warps for count in self.counts)

    @property
    def load_sectors(self) -> int:
        """32-byte sectors of global loads, asynchronous copies among them."""
        return sum(count.sectors for count in self._select("load"))

    @property
    def store_sectors(self) -> int:
        """32-byte sectors of global stores."""
        return sum(count.sectors for count in self._select("store"))

    @property
    def atomic_sectors(self) -> int:
        """32-byte sectors of global atomics."""
        return sum(count.sectors for count in self._select("atomic"))

    @property
    def special(self) -> int:
        """Special-function operations by threads."""
        return sum(count.threads for count in self._select("special"))

    @property
    def bank_conflicts(self) -> int:
        """Passes over shared memory's banks beyond those that conflict-free accesses need."""
        return sum(count.passes - count.least_passes for count in self.counts)

    def by_class(self) -> dict[str, int]:
        """Thread-instructions by class."""
        return self._grouped(classify)

    def by_opcode(self) -> dict[str, int]:
        """Thread-instructions by opcode with modifiers."""
        return self._grouped(lambda instruction: ".".join((instruction.opcode, *instruction.modifiers)))

    def _grouped(self, key: object) -> dict[str, int]:
        totals: dict[str, int] = defaultdict(int)
        for instruction, count in zip(self.instructions, self.counts, strict=True):
            totals[key(instruction)] += count.threads  # type: ignore[operator]
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def widths(self) -> dict[str, set[int]]:
        """Bytes per thread of the executed global loads and stores: {16} is 16-byte accesses throughout."""
        found: dict[str, set[int]] = {"load": set(), "store": set()}
        for instruction, count in zip(self.instructions, self.counts, strict=True):
            if count.sectors and classify(instruction) in found and count.threads:
                found[classify(instruction)].add(count.bytes // count.threads)
        return found

    def width_share(self, kind: str, width: int = 16) -> float:
        """Of the bytes of global accesses of a class ("load", "store"): the share in accesses of that many a thread."""
        pairs = zip(self.instructions, self.counts, strict=True)
        counts = [c for i, c in pairs if c.sectors and c.threads and classify(i) == kind]
        return sum(c.bytes for c in counts if c.bytes == width * c.threads) / sum(c.bytes for c in counts)

    def summary(self) -> dict[str, int | float]:
        """The totals."""
        names = "thread_instructions warp_instructions load_sectors store_sectors atomic_sectors special bank_conflicts"
        return {name: getattr(self, name) for name in names.split()} | {"seconds": round(self.seconds, 3)}
