"""atom and red: threads act one after the other, in the order of their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..lanes import Lanes, Mask, Step, implements
from ..parser import Instruction, members
from ..scalars import BITS, PACKED, element
from .floating import rounded, wide
from .loads import HINTS, SPACES, active, count_global, count_shared, resolve, space_of

Array = np.ndarray[Any, Any]

_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def combine(operation: str, old: Array, value: Array, kind: str, new: Array | None) -> Array:
    """What the memory holds afterwards."""
    base = PACKED.get(kind, kind)
    if base in {"f16", "bf16"}:
        return rounded(_plain(operation, wide(old, base), wide(value, base)), base).view(old.dtype)
    if operation == "cas":
        assert new is not None
        return np.where(old == value, new, old)
    if operation == "inc":
        return np.where(old >= value, old.dtype.type(0), old + old.dtype.type(1))
    if operation == "dec":
        return np.where((old == 0) | (old > value), value, old - old.dtype.type(1))
    return _plain(operation, old, value)


def _plain(operation: str, old: Array, value: Array) -> Array:
    if operation in {"min", "max"} and old.dtype.kind == "f":
        return (np.fmin if operation == "min" else np.fmax)(old, value)
    functions = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    result: Array = value.copy() if operation == "exch" else functions[operation](old, value)
    return result


def _turns(places: Array) -> list[Array]:
    """Accesses in rounds: no place twice in a round, accesses to one place in order of their threads."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    start = np.maximum.accumulate(np.where(first, np.arange(len(places)), 0))
    turn = np.empty(len(places), np.int64)
    turn[order] = np.arange(len(places)) - start
    return [np.flatnonzero(turn == number) for number in range(int(turn.max()) + 1)]


@implements("atom", "red", allow=f"{HINTS} {SPACES} {' '.join(_OPERATIONS)} noftz acq_rel v2 v4 async")
def atomic(lanes: Lanes, instruction: Instruction) -> Step:
    """destination = old value; memory = operation(old value, operand)."""
    if instruction.has("async"):
        raise Unsupported("red.async")
    operands = list(instruction.operands)
    target = operands.pop(0) if instruction.opcode == "atom" else "_"
    kind = instruction.type
    operation = next(name for name in _OPERATIONS if instruction.has(name))
    parts, targets = members(operands[1]), members(target)
    if instruction.has("v2", "v4") and instruction.opcode == "atom" and len(targets) != len(parts):
        raise Unsupported("this vector atomic")
    each = BITS[kind] // 8
    sources = [lanes.source(part, f"b{8 * each}") for part in parts]
    new = lanes.source(operands[2], f"b{8 * each}") if len(operands) > 2 else None
    registers = [lanes.target(name) for name in targets] if instruction.opcode == "atom" else []
    state = _Atomic(lanes, instruction, operation, kind, each, len(parts))
    addresses = lanes.addresses(operands[0])

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        columns = [np.ascontiguousarray(np.broadcast_to(source, lanes.count)[threads]) for source in sources]
        fresh = None if new is None else np.broadcast_to(new, lanes.count)[threads]
        old = state.apply(threads, addresses()[threads], columns, fresh)
        for register, value in zip(registers, old, strict=False):
            if register is not None:
                register[threads] = value

    return step


class _Atomic:
    def __init__(
        self, lanes: Lanes, instruction: Instruction, operation: str, kind: str, each: int, parts: int
    ) -> None:
        self.lanes, self.what, self.counts = lanes, instruction.text, lanes.counts[instruction.index]
        self.space, self.operation, self.kind = space_of(instruction), operation, kind
        self.each, self.parts = each, parts

    def apply(self, threads: Array, addresses: Array, values: list[Array], new: Array | None) -> list[Array]:
        """Performs the operations; the old values, one array per vector element."""
        memory, place = self._memory(threads, addresses)
        table = memory.view(values[0].dtype).reshape(-1, self.parts)
        dtype = element(self.kind)
        old = [np.empty_like(column) for column in values]
        for turn in _turns(place):
            where = place[turn]
            for position, column in enumerate(values):
                before = table[where, position]
                fresh = None if new is None else new[turn].view(dtype)
                after = combine(self.operation, before.view(dtype), column[turn].view(dtype), self.kind, fresh)
                table[where, position] = after.view(before.dtype)
                old[position][turn] = before
        return old

    def _memory(self, threads: Array, addresses: Array) -> tuple[Array, Array]:
        lanes, size = self.lanes, self.each * self.parts
        space, addresses = resolve(self.space, addresses, self.what)
        if space == "global":
            count_global(lanes, self.counts, addresses, threads, size)
            return lanes.memory.units(addresses, size, self.what, read=self.operation != "exch")
        if space != "shared":
            raise Unsupported(f"atomics on {space} memory")
        ctas = lanes.cta[threads]
        offsets = lanes.shared.locate(addresses, ctas, size, self.what)
        count_shared(self.counts, offsets, threads, size)
        return lanes.shared.atomic(offsets, size, lanes.cluster_warp[threads], ctas, self.what)
