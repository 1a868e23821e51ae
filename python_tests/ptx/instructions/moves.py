"""mov, selp, cvta, and instructions without effect on results: fences, prefetches, hints."""

from __future__ import annotations

import numpy as np

from ..errors import Trap
from ..lanes import GENERIC_WINDOWS, Lanes, Mask, Step, implements
from ..parser import Instruction, members
from ..scalars import BITS, UNSIGNED
from ._steps import function_step


@implements("mov")
def mov(lanes: Lanes, instruction: Instruction) -> Step:
    """Copies; packs `{a, b}` into a wider register, the first element lowest, or unpacks it."""
    destination, source = instruction.operands
    bits = BITS[instruction.type]
    if destination.startswith("{"):
        return _unpack(lanes, members(destination), source, bits)
    if source.startswith("{"):
        return _pack(lanes, destination, members(source), bits)
    kind = "pred" if bits == 1 else f"b{bits}"
    value = lanes.source(source, kind)
    return function_step(lanes, instruction, lambda: value, kind)


def _unpack(lanes: Lanes, parts: list[str], source: str, bits: int) -> Step:
    each = bits // len(parts)
    register = lanes.source(source, f"b{bits}")
    columns = np.broadcast_to(register, lanes.count).copy() if register.ndim == 0 else register
    table = columns.view(UNSIGNED[each]).reshape(lanes.count, len(parts))
    assigners = [lanes.assigner(part) for part in parts]

    def step(mask: Mask) -> None:
        values = [table[:, position].copy() for position in range(len(parts))]
        for assign, value in zip(assigners, values, strict=True):
            assign(value, mask)

    return step


def _pack(lanes: Lanes, destination: str, parts: list[str], bits: int) -> Step:
    each = bits // len(parts)
    sources = [lanes.source(part, f"b{each}") for part in parts]
    assign = lanes.assigner(destination)

    def step(mask: Mask) -> None:
        table = np.empty((lanes.count, len(parts)), UNSIGNED[each])
        for position, source in enumerate(sources):
            table[:, position] = source
        assign(table.view(UNSIGNED[bits]).reshape(-1), mask)

    return step


@implements("selp")
def selp(lanes: Lanes, instruction: Instruction) -> Step:
    """a if the predicate holds, else b."""
    _, first, second, condition = instruction.operands
    kind = f"b{BITS[instruction.type]}"
    a, b, holds = lanes.source(first, kind), lanes.source(second, kind), lanes.predicate(condition)
    return function_step(lanes, instruction, lambda: np.where(holds(), a, b), kind)


@implements("cvta", allow="to global shared::cta shared::cluster shared local const")
def cvta(lanes: Lanes, instruction: Instruction) -> Step:
    """Between generic addresses and those of a state space."""
    space = next(name.split("::")[0] for name in instruction.modifiers if name not in {"to", "u64", "u32"})
    value, window = lanes.source(instruction.operands[1], "u64"), np.uint64(GENERIC_WINDOWS.get(space, 0))
    change = np.subtract if instruction.has("to") else np.add
    return function_step(lanes, instruction, lambda: change(value, window), "u64")


@implements("isspacep", allow="global shared::cta shared local const")
def isspacep(lanes: Lanes, instruction: Instruction) -> Step:
    """Whether a generic address lies in the window of a state space."""
    address = lanes.source(instruction.operands[1], "u64")
    shared, local = (np.uint64(GENERIC_WINDOWS[name]) for name in ("shared", "local"))
    space = instruction.modifiers[0].split("::")[0]
    tests = {
        "shared": lambda: (address >= shared) & (address < local),
        "local": lambda: (address >= local) & (address < np.uint64(1 << 40)),
        "global": lambda: address >= np.uint64(1 << 40),
    }
    return function_step(lanes, instruction, tests[space], "pred")


@implements(
    "membar",
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "nanosleep",
    "griddepcontrol",
    "pragma",
    "setmaxnreg",
    allow="*",
)
def nothing(lanes: Lanes, instruction: Instruction) -> Step:
    """Orders or hints: memory here is sequentially consistent, so that there is nothing to do."""
    return lambda mask: None


@implements("trap", "call", "brkpt", allow="*")
def trap(lanes: Lanes, instruction: Instruction) -> Step:
    """A failed device assertion, or a call: refused when reached."""

    def step(mask: Mask) -> None:
        raise Trap(f"reached `{instruction.text}`")

    return step


@implements("fence", allow="*")
def fence(lanes: Lanes, instruction: Instruction) -> Step:
    """fence.proxy.async lets asynchronous copies see the plain writes before it; other fences change nothing here."""
    if not instruction.has("proxy"):
        return lambda mask: None
    shared = lanes.shared

    def step(mask: Mask) -> None:
        ctas = slice(None) if mask is None else np.unique(lanes.cta[mask])
        shared.fenced[ctas] = shared.sequence

    return step


@implements("createpolicy", allow="*")
def createpolicy(lanes: Lanes, instruction: Instruction) -> Step:
    """A cache policy: an opaque number that only cache hints read, and those change no result."""
    policy = np.uint64(0)
    return function_step(lanes, instruction, lambda: policy, "b64")
