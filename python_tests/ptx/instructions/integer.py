"""Integer arithmetic, modulo the type's width."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..lanes import Lanes, Step, implements
from ..parser import Instruction
from ..scalars import BITS, SIGNED, UNSIGNED, is_signed
from ._steps import function_step, ufunc_step
from .carry import with_carry

Array = np.ndarray[Any, Any]


def _sources(lanes: Lanes, instruction: Instruction) -> list[Array]:
    return [lanes.source(token, instruction.type) for token in instruction.operands[1:]]


def add(lanes: Lanes, instruction: Instruction) -> Step:
    """add and sub, wrapping; .sat clamps s32, .cc sets the carry."""
    if instruction.has("cc"):
        return with_carry(lanes, instruction)
    sources = _sources(lanes, instruction)
    ufunc = np.add if instruction.opcode == "add" else np.subtract
    if instruction.has("sat"):
        low, high = -(1 << 31), (1 << 31) - 1
        return function_step(
            lanes,
            instruction,
            lambda a, b: np.clip(ufunc(a, b, dtype=np.int64), low, high).astype(np.int32),
            "s32",
            *sources,
        )
    return ufunc_step(lanes, instruction, ufunc, instruction.type, *sources)


def _double(kind: str) -> type:
    """The type of a full product."""
    return (SIGNED if is_signed(kind) else UNSIGNED)[2 * BITS[kind]]


def product(a: Array, b: Array, kind: str, part: str) -> Array:
    """mul's .lo, .hi or .wide."""
    if part == "lo":
        result: Array = np.multiply(a, b)
        return result
    if BITS[kind] == 64:
        return _high64(a, b, signed=is_signed(kind))
    full: Array = np.multiply(a, b, dtype=_double(kind))
    return full if part == "wide" else (full >> full.dtype.type(BITS[kind])).astype(a.dtype)


def _high64(a: Array, b: Array, *, signed: bool) -> Array:
    """The upper 64 bits of a 128-bit product."""
    x, y = (np.atleast_1d(np.asarray(v)).view(np.uint64) for v in (a, b))
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    lower = x0 * y1 + (middle & mask)
    high = x1 * y1 + (middle >> half) + (lower >> half)
    if signed:
        zero = np.uint64(0)
        high = high - np.where(x.view(np.int64) < 0, y, zero) - np.where(y.view(np.int64) < 0, x, zero)
    return high


def _part(instruction: Instruction) -> str:
    return next((name for name in ("lo", "hi", "wide") if instruction.has(name)), "lo")


def mul(lanes: Lanes, instruction: Instruction) -> Step:
    """mul.lo, .hi, .wide."""
    kind, part = instruction.type, _part(instruction)
    sources = _sources(lanes, instruction)
    if part == "lo":
        return ufunc_step(lanes, instruction, np.multiply, kind, *sources)
    return function_step(lanes, instruction, lambda a, b: product(a, b, kind, part), kind, *sources)


def mad(lanes: Lanes, instruction: Instruction) -> Step:
    """a * b (low, high or wide) + c; .cc sets the carry."""
    if instruction.has("cc"):
        return with_carry(lanes, instruction)
    kind, part = instruction.type, _part(instruction)
    if instruction.has("sat"):
        raise Unsupported("mad.sat")
    a, b = (lanes.source(token, kind) for token in instruction.operands[1:3])
    wide_kind = f"{kind[0]}{2 * BITS[kind]}" if part == "wide" else kind
    c = lanes.source(instruction.operands[3], wide_kind)

    def compute() -> Array:
        base = product(a, b, kind, part)
        return base.view(c.dtype) + c if base.dtype.itemsize == c.dtype.itemsize else base + c

    return function_step(lanes, instruction, compute, wide_kind)


def divide(lanes: Lanes, instruction: Instruction) -> Step:
    """div (toward zero) and rem (sign of the dividend). Division by zero gives all ones; rem the dividend."""
    kind = instruction.type
    a, b = _sources(lanes, instruction)

    def compute() -> Array:
        x, y = np.broadcast_arrays(np.atleast_1d(a), np.atleast_1d(b))
        zero = y == 0
        safe = np.where(zero, y.dtype.type(1), y)
        remainder = np.fmod(x, safe)
        if instruction.opcode == "rem":
            return np.where(zero, x, remainder)
        return np.where(zero, ~y.dtype.type(0), (x - remainder) // safe)

    return function_step(lanes, instruction, compute, kind)


implements("rem")(divide)


def extreme(lanes: Lanes, instruction: Instruction) -> Step:
    """min and max; .relu clamps at 0."""
    ufunc = np.minimum if instruction.opcode == "min" else np.maximum
    if instruction.has("relu"):
        zero = np.int32(0)
        return function_step(
            lanes, instruction, lambda a, b: np.maximum(ufunc(a, b), zero), "s32", *_sources(lanes, instruction)
        )
    return ufunc_step(lanes, instruction, ufunc, instruction.type, *_sources(lanes, instruction))


def sign_change(lanes: Lanes, instruction: Instruction) -> Step:
    """neg and abs; the smallest number is its own."""
    ufunc = np.negative if instruction.opcode == "neg" else np.absolute
    return ufunc_step(lanes, instruction, ufunc, instruction.type, *_sources(lanes, instruction))


@implements("sad")
def sad(lanes: Lanes, instruction: Instruction) -> Step:
    """c + |a - b|."""

    def compute(a: Array, b: Array, c: Array) -> Array:
        return c + (np.maximum(a, b) - np.minimum(a, b))

    return function_step(lanes, instruction, compute, instruction.type, *_sources(lanes, instruction))
