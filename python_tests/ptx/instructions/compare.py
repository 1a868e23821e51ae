"""setp, set and the comparisons behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import rounding
from ..errors import Unsupported
from ..lanes import Lanes, Mask, Step, implements
from ..parser import Instruction
from ..scalars import PACKED, is_float
from ._steps import function_step

Array = np.ndarray[Any, Any]

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_FLOATING = {f"{name}u" for name in ("eq", "ne", "lt", "le", "gt", "ge")} | {"num", "nan"}
_MODIFIERS = " ".join([*_ORDERED, *_FLOATING, *_JOIN, "ftz"])


def comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    """The comparison: of floats, ordered ones are false for NaN, those ending in u true."""
    if name in _ORDERED and not (floating and name == "ne"):
        return _ORDERED[name]
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name == "neu":
        return np.not_equal
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    opposite = _ORDERED[{"eq": "ne", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}[name[:-1]]]
    if name == "equ":
        return lambda a, b: ~((a < b) | (a > b))
    return lambda a, b: ~opposite(a, b)


def _compared(lanes: Lanes, instruction: Instruction, name: str, kind: str) -> Callable[[], Array]:
    """The comparison of operands 1 and 2 as a function."""
    base = PACKED.get(kind, kind)
    a, b = (lanes.source(token, kind) for token in instruction.operands[1:3])
    compare = comparison(name, is_float(kind))
    if base == "bf16":
        return lambda: compare(rounding.from_bf16(a), rounding.from_bf16(b))
    if instruction.has("ftz"):
        if base != "f32":
            raise Unsupported(f"{kind} comparison with .ftz")

        def flushed() -> Array:
            with rounding.flushing():
                return compare(a, b)

        return flushed
    return lambda: compare(a, b)


@implements("setp", allow=_MODIFIERS)
def setp(lanes: Lanes, instruction: Instruction) -> Step:
    """p = compare(a, b) [join c], and q = not compare(a, b) [join c]; of packed types p and q are the two halves."""
    kind, first, *rest = instruction.operands[0].split("|"), instruction.modifiers[0], *instruction.modifiers[1:-1]
    compare = _compared(lanes, instruction, first, instruction.type)
    assigners = [lanes.assigner(token) for token in kind]
    join = next((_JOIN[name] for name in rest if name in _JOIN), None)
    extra = lanes.predicate(instruction.operands[3]) if join else None

    def step(mask: Mask) -> None:
        result = np.atleast_1d(compare())
        halves = [result[0::2], result[1::2]] if instruction.type in PACKED else [result, ~result]
        for assign, half in zip(assigners, halves, strict=False):
            assign(join(half, extra()) if join and extra else half, mask)

    return step


@implements("set", allow=_MODIFIERS)
def set_value(lanes: Lanes, instruction: Instruction) -> Step:
    """All ones (1.0 for a floating destination) where the comparison holds, else 0."""
    destination, kind = instruction.modifiers[-2:]
    if instruction.has(*_JOIN) or kind in PACKED or destination not in {"u32", "s32", "f32"}:
        raise Unsupported("this form of set")
    compare = _compared(lanes, instruction, instruction.modifiers[0], kind)
    one = np.float32(1).view(np.uint32) if destination == "f32" else np.uint32(0xFFFFFFFF)
    return function_step(lanes, instruction, lambda: np.where(compare(), one, np.uint32(0)), "b32")
