"""Instructions across the lanes of a warp. Every lane that the member mask names must execute them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Divergence, Unsupported
from ..lanes import WARP, Lanes, Mask, Step, implements
from ..parser import Instruction
from ..rounding import canonical
from ..scalars import element

Array = np.ndarray[Any, Any]
_WEIGHTS = np.uint32(1) << np.arange(WARP, dtype=np.uint32)


def together(lanes: Lanes, mask: Mask, members: Array, what: str) -> Array:
    """Checks the member masks (uint32 per thread) against the lanes that are here: bool [warps, 32]."""
    here = lanes.present if mask is None else mask
    rows = here.reshape(-1, WARP)
    converged = (rows * _WEIGHTS).sum(1, dtype=np.uint32)
    named = np.broadcast_to(members, lanes.count).reshape(-1, WARP)
    if members.ndim == 0 and int(members) == 0xFFFFFFFF and (mask is None or rows.all(1)[rows.any(1)].all()):
        return rows
    exited_ok = ~lanes.present.reshape(-1, WARP)
    for_all = named & ~(exited_ok * _WEIGHTS).sum(1, dtype=np.uint32)[:, None]
    if (rows & ((for_all & ~converged[:, None]) != 0)).any():
        raise Divergence(f"`{what}` names lanes that do not execute it together")
    if (rows & ((named & _WEIGHTS) == 0)).any():
        raise Divergence(f"`{what}` is executed by a lane that its mask does not name")
    return rows


@implements("shfl", allow="sync up down bfly idx")
def shuffle(lanes: Lanes, instruction: Instruction) -> Step:
    """The value of another lane; p says whether that lane is within the segment (if not, the own value)."""
    direction = instruction.modifiers[1]
    names = instruction.operands[0].split("|")
    assign = lanes.assigner(names[0])
    assign_inside = lanes.assigner(names[1]) if len(names) > 1 else None
    value = lanes.source(instruction.operands[1], "b32")
    offset, clamp, members = (lanes.source(token, "u32") for token in instruction.operands[2:5])
    base = np.arange(lanes.count) - lanes.lane
    fixed = shuffle_sources(direction, lanes.lane, offset, clamp) if offset.ndim == clamp.ndim == 0 else None

    def step(mask: Mask) -> None:
        rows = together(lanes, mask, members, instruction.text)
        from_lane, inside = fixed if fixed is not None else shuffle_sources(direction, lanes.lane, offset, clamp)
        source = base + from_lane
        if mask is not None and not rows.reshape(-1)[source[mask]].all():
            raise Divergence(f"`{instruction.text}` reads a lane that does not execute it")
        assign(np.broadcast_to(value, lanes.count)[source], mask)
        if assign_inside:
            assign_inside(inside, mask)

    return step


def shuffle_sources(direction: str, lane: Array, offset: Array, clamp: Array) -> tuple[Array, Array]:
    """(source lane, whether it is inside the segment) by the ISA's formulas."""
    b, c = np.asarray(offset, np.int64) & 31, np.asarray(clamp, np.int64)
    segment, limit = (c >> 8) & 31, c & 31
    highest = (lane & segment) | (limit & ~segment)
    lowest = lane & segment
    if direction == "up":
        source = lane - b
        inside = source >= highest
    elif direction == "down":
        source = lane + b
        inside = source <= highest
    elif direction == "bfly":
        source = lane ^ b
        inside = source <= highest
    else:
        source = lowest | (b & ~segment)
        inside = source <= highest
    return np.where(inside, source, lane), inside


@implements("vote", allow="sync all any uni ballot")
def vote(lanes: Lanes, instruction: Instruction) -> Step:
    """all, any, uni (all equal) or the ballot of a predicate over the named lanes."""
    how = instruction.modifiers[1]
    assign = lanes.assigner(instruction.operands[0])
    predicate, members = lanes.predicate(instruction.operands[1]), lanes.source(instruction.operands[2], "u32")

    def step(mask: Mask) -> None:
        rows = together(lanes, mask, members, instruction.text)
        named = np.broadcast_to(members, lanes.count) & _weights(lanes, rows)
        ballot = _weights(lanes, rows & predicate().reshape(-1, WARP)) & named
        results = {
            "ballot": ballot,
            "any": ballot != 0,
            "all": ballot == named,
            "uni": (ballot == 0) | (ballot == named),
        }
        assign(results[how], mask)

    return step


def _weights(lanes: Lanes, rows: Array) -> Array:
    """Rows of lanes as bit masks, one copy per thread."""
    return np.repeat((rows * _WEIGHTS).sum(1, dtype=np.uint32), WARP)


@implements("activemask")
def activemask(lanes: Lanes, instruction: Instruction) -> Step:
    """The lanes that execute together."""
    assign = lanes.assigner(instruction.operands[0])

    def step(mask: Mask) -> None:
        assign(_weights(lanes, (lanes.present if mask is None else mask).reshape(-1, WARP)), mask)

    return step


@implements("match", allow="any all sync")
def match(lanes: Lanes, instruction: Instruction) -> Step:
    """The named lanes whose value equals the own one (any), or all of them if every value is equal (all)."""
    names = instruction.operands[0].split("|")
    assigners = [lanes.assigner(name) for name in names]
    value, members = (
        lanes.source(instruction.operands[1], instruction.type),
        lanes.source(instruction.operands[2], "u32"),
    )

    def step(mask: Mask) -> None:
        rows = together(lanes, mask, members, instruction.text)
        table = np.broadcast_to(value, lanes.count).reshape(-1, WARP)
        equal = (table[:, :, None] == table[:, None, :]) & rows[:, None, :]
        named = np.broadcast_to(members, lanes.count) & _weights(lanes, rows)
        found = (equal * _WEIGHTS).sum(2, dtype=np.uint32).reshape(-1) & named
        if instruction.has("any"):
            assigners[0](found, mask)
            return
        same = found == named
        assigners[0](np.where(same, named, np.uint32(0)), mask)
        if len(assigners) > 1:
            assigners[1](same, mask)

    return step


@implements("redux", allow="sync add min max and or xor abs NaN")
def redux(lanes: Lanes, instruction: Instruction) -> Step:
    """A reduction over the named lanes, for all of them. f32 min and max skip NaN unless .NaN."""
    operation, kind = instruction.modifiers[1], instruction.type
    assign = lanes.assigner(instruction.operands[0])
    value, members = lanes.source(instruction.operands[1], kind), lanes.source(instruction.operands[2], "u32")
    reduce = _reduction(instruction, operation)

    def step(mask: Mask) -> None:
        rows = together(lanes, mask, members, instruction.text)
        named = np.broadcast_to(members, lanes.count)
        if not (named.reshape(-1, WARP) == named.reshape(-1, WARP)[:, :1])[rows.any(1)].all():
            raise Unsupported(f"different member masks within a warp in `{instruction.text}`")
        source = np.broadcast_to(value, lanes.count).reshape(-1, WARP)
        if instruction.has("abs"):
            source = np.abs(source)
        assign(np.repeat(reduce(source, rows), WARP).astype(element(kind)), mask)

    return step


def _reduction(instruction: Instruction, operation: str) -> Callable[[Array, Array], Array]:
    floating = instruction.type == "f32"
    ufunc = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": np.fmin if floating and not instruction.has("NaN") else np.minimum,
        "max": np.fmax if floating and not instruction.has("NaN") else np.maximum,
    }[operation]

    def reduce(source: Array, rows: Array) -> Array:
        if operation in {"min", "max"}:
            first = source[np.arange(len(rows)), rows.argmax(1)][:, None]  # neutral for idempotent operations
        else:
            first = source.dtype.type(-1 if operation == "and" and source.dtype.kind == "i" else 0)
            if operation == "and" and source.dtype.kind == "u":
                first = ~first
        result: Array = ufunc.reduce(np.where(rows, source, first), axis=1, dtype=source.dtype)
        return canonical(result) if floating else result

    return reduce


@implements("elect", allow="sync")
def elect(lanes: Lanes, instruction: Instruction) -> Step:
    """One leader of the named lanes: the lowest."""
    names = instruction.operands[0].split("|")
    assign_lane, assign_leader = lanes.assigner(names[0]), lanes.assigner(names[1])
    members = lanes.source(instruction.operands[1], "u32")

    def step(mask: Mask) -> None:
        rows = together(lanes, mask, members, instruction.text)
        leader = np.repeat(rows.argmax(1), WARP)
        assign_lane(leader.astype(np.uint32), mask)
        assign_leader(lanes.lane == leader, mask)

    return step


@implements("bar", "barrier", allow="warp sync")
def bar_warp(lanes: Lanes, instruction: Instruction) -> Step:
    """bar.warp.sync: the named lanes must be here together."""
    members = lanes.source(instruction.operands[0], "u32")

    def step(mask: Mask) -> None:
        together(lanes, mask, members, instruction.text)

    return step
