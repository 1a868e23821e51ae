"""cvt: between integer widths, integers and floats, and float formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import rounding
from ..errors import Unsupported
from ..lanes import Lanes, Mask, Step, implements
from ..parser import Instruction
from ..scalars import BITS, PACKED, element, is_float
from .floating import mode, rounded, saturate, wide

Array = np.ndarray[Any, Any]

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@implements("cvt", allow="rn rz rm rp rni rzi rmi rpi ftz sat relu satfinite")
def cvt(lanes: Lanes, instruction: Instruction) -> Step:
    """cvt.destination.source; of two sources the first becomes the upper half."""
    to, kind = instruction.modifiers[-2:]
    if instruction.has("relu", "satfinite"):
        raise Unsupported("cvt with .relu or .satfinite")
    if to in PACKED:
        return _pair(lanes, instruction, to)
    source = lanes.widened(instruction.operands[1], kind)
    convert = conversion(instruction, to, kind)
    assign = lanes.assigner(instruction.operands[0], to)
    flush = instruction.has("ftz")

    def step(mask: Mask) -> None:
        values = np.atleast_1d(source)
        values = _flushed(values) if flush and kind == "f32" else values
        result = convert(values)
        assign(_flushed(result) if flush and to == "f32" else result, mask)

    return step


def _flushed(values: Array) -> Array:
    """float32 with zeros of their sign for subnormals."""
    with rounding.flushing():
        return values * np.float32(1)


def _pair(lanes: Lanes, instruction: Instruction, to: str) -> Step:
    base, how = PACKED[to], mode(instruction)
    if len(instruction.operands) != 3 or base == "f32":
        raise Unsupported("this form of a packed cvt")
    upper, lower = (lanes.source(token, "f32") for token in instruction.operands[1:])
    assign = lanes.assigner(instruction.operands[0])

    def step(mask: Mask) -> None:
        halves = np.empty((lanes.count, 2), np.uint16)
        halves[:, 0] = rounded(np.atleast_1d(lower), base, how).view(np.uint16)
        halves[:, 1] = rounded(np.atleast_1d(upper), base, how).view(np.uint16)
        assign(halves.view(np.uint32).reshape(-1), mask)

    return step


def conversion(instruction: Instruction, to: str, kind: str) -> Callable[[Array], Array]:
    """The function from arrays of `kind` to arrays of `to`."""
    if is_float(kind):
        return _float_to_float(instruction, to, kind) if is_float(to) else _float_to_integer(instruction, to, kind)
    if is_float(to):
        return _integer_to_float(instruction, to)
    dtype = element(to)
    if instruction.has("sat"):
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

        def clamp(values: Array) -> Array:
            bounds = np.iinfo(values.dtype)
            return np.clip(values, max(low, bounds.min), min(high, bounds.max)).astype(dtype)

        return clamp
    return lambda values: values.astype(dtype)


def _float_to_float(instruction: Instruction, to: str, kind: str) -> Callable[[Array], Array]:
    integral = next((_TO_INTEGRAL[name] for name in instruction.modifiers if name in _TO_INTEGRAL), None)
    how = mode(instruction)

    def convert(values: Array) -> Array:
        values = wide(values, kind) if kind in {"f16", "bf16"} else values
        if integral is not None:
            values = integral(values)
        if instruction.has("sat"):
            values = saturate(values)
        if to in {"f16", "bf16"}:
            return rounded(rounding.odd_to_f32(values) if kind == "f64" else values, to, how)
        result = values.astype(element(to)) if how == "rn" else rounding.narrow(values, element(to), how)
        return rounding.canonical(result) if to == "f32" and kind != "f32" else result

    if to == "bf16" and how not in {"rn", "rz"}:
        raise Unsupported(f"bf16 rounding .{how}")
    return convert


def _float_to_integer(instruction: Instruction, to: str, kind: str) -> Callable[[Array], Array]:
    """Rounds, then clamps to the type's range; NaN becomes 0."""
    integral = next((_TO_INTEGRAL[name] for name in instruction.modifiers if name in _TO_INTEGRAL), None)
    if integral is None:
        raise Unsupported("float to integer without a rounding")
    dtype = element(to)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def convert(values: Array) -> Array:
        values = wide(values, kind) if kind in {"f16", "bf16"} else values
        whole = integral(values.astype(np.float64))
        inside = (whole >= float(low)) & (whole < float(high) + (1.0 if BITS[to] < 64 else 0.0))
        result = np.where(inside, whole, 0.0).astype(dtype)
        result = np.where(whole >= float(high), dtype(high), result)
        return np.where(whole < float(low), dtype(low), result)

    return convert


def _integer_to_float(instruction: Instruction, to: str) -> Callable[[Array], Array]:
    how = mode(instruction)
    if how != "rn":
        raise Unsupported(f"integer to float rounded .{how}")

    def convert(values: Array) -> Array:
        if to in {"f32", "f64"}:
            return values.astype(element(to))
        return rounded(rounding.odd_to_f32(values.astype(np.float64)), to)

    return convert
