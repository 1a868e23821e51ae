"""Floating-point arithmetic: f32, f64, f16, bf16 and their packed pairs.

float32 `.ftz` runs with the processor's own flushing. 16-bit types compute in float32 (float64 for fma) and round once.
Results that are NaN are PTX's canonical NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import rounding
from ..errors import Unsupported
from ..lanes import Builder, Lanes, Mask, Step, implements
from ..parser import Instruction
from ..scalars import BITS, PACKED, element, is_float
from . import integer
from ._steps import function_step

Array = np.ndarray[Any, Any]
ROUNDINGS = ("rn", "rz", "rm", "rp")


def mode(instruction: Instruction) -> str:
    """The rounding of the instruction; to nearest even if none is written."""
    return next((name for name in instruction.modifiers if name in ROUNDINGS), "rn")


def split_types(floating: Builder, integral: Builder) -> Builder:
    """One opcode, two families: by the instruction's type."""

    def build(lanes: Lanes, instruction: Instruction) -> Step:
        return (floating if is_float(instruction.type) else integral)(lanes, instruction)

    return build


def wide(values: Array, kind: str) -> Array:
    """Operands of a 16-bit type as float32."""
    return rounding.from_bf16(values) if kind == "bf16" else values.astype(np.float32)


def rounded(values: Array, kind: str, how: str = "rn") -> Array:
    """float32 results as a 16-bit type."""
    return rounding.to_bf16(values, how) if kind == "bf16" else rounding.to_f16(values, how)


def saturate(values: Array) -> Array:
    """To [0, 1], NaN to 0."""
    return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, values.dtype.type(0), values.dtype.type(1)))


def finish(instruction: Instruction, function: Callable[..., Array]) -> Callable[..., Array]:
    """Adds flushing, saturation and the canonical NaN to a float32 or float64 function."""
    flush, clamp = instruction.has("ftz"), instruction.has("sat")

    def finished(*sources: Array) -> Array:
        if flush:
            with rounding.flushing():
                result = np.atleast_1d(function(*sources))
        else:
            result = np.atleast_1d(function(*sources))
        if clamp:
            return saturate(result)
        return rounding.canonical(result) if result.dtype == np.float32 else result

    return finished


def _in_place(lanes: Lanes, instruction: Instruction, ufunc: np.ufunc, *sources: Array) -> Step:
    """A float32 ufunc that writes straight into the register: the commonest instructions."""
    register = lanes.target(instruction.operands[0])
    if register is None:
        raise Unsupported("the sink as a result")
    view, flush = register.view(np.float32), instruction.has("ftz")

    def step(mask: Mask) -> None:
        with rounding.flushing(flush):
            if mask is None:
                rounding.canonical(ufunc(*sources, out=view))
            else:
                value = rounding.canonical(np.atleast_1d(ufunc(*sources)))
                register[...] = np.where(mask, value.view(register.dtype), register)

    return step


def operands(lanes: Lanes, instruction: Instruction) -> list[Array]:
    """The sources. Mixed precision (`add.f32.bf16 d, a, c`): all but the last are 16-bit, and exact in float32."""
    kind, tokens = instruction.type, instruction.operands[1:]
    types = [name for name in instruction.modifiers if name in BITS]
    if len(types) == 1:
        return [lanes.source(token, kind) for token in tokens]
    if types[0] != "f32" or kind not in {"f16", "bf16"}:
        raise Unsupported("this mixture of types")
    return [*(lanes.source(token, kind) for token in tokens[:-1]), lanes.source(tokens[-1], "f32")]


def mixed(instruction: Instruction, function: Callable[..., Array]) -> Callable[..., Array] | None:
    """For a mixed-precision instruction, the float32 function with its 16-bit sources widened; else None."""
    if sum(name in BITS for name in instruction.modifiers) == 1:
        return None
    kind = instruction.type
    return lambda *sources: function(*(wide(source, kind) for source in sources[:-1]), sources[-1])


_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def binary(lanes: Lanes, instruction: Instruction) -> Step:
    """add, sub, mul."""
    kind, how, ufunc = instruction.type, mode(instruction), _BINARY[instruction.opcode]
    sources = operands(lanes, instruction)
    base = PACKED.get(kind, kind)
    if widened := mixed(instruction, ufunc):
        if how != "rn":
            raise Unsupported("this rounding of mixed precision")
        return function_step(lanes, instruction, finish(instruction, widened), "f32", *sources)
    if base in {"f16", "bf16"}:
        return function_step(lanes, instruction, _narrow_op(instruction, ufunc, base), kind, *sources)
    if how == "rn" and base == "f32" and not instruction.has("sat"):
        return _in_place(lanes, instruction, ufunc, *sources)
    if how == "rn":
        return function_step(lanes, instruction, finish(instruction, ufunc), kind, *sources)
    if base == "f64":
        raise Unsupported(f"float64 rounding .{how}")

    def directed(a: Array, b: Array) -> Array:
        a64, b64 = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
        exact = a64 * b64 if ufunc is np.multiply else rounding.odd_sum(a64, b64 if ufunc is np.add else -b64)
        return rounding.narrow(np.atleast_1d(exact), np.float32, how)

    return function_step(lanes, instruction, finish(instruction, directed), kind, *sources)


def _narrow_op(instruction: Instruction, function: Callable[..., Array], base: str) -> Callable[..., Array]:
    """A 16-bit operation: exact enough in float32 that rounding again is harmless (24 >= 2 * 11 + 2 bits)."""
    if instruction.has("ftz", "rz", "rm", "rp"):
        raise Unsupported("16-bit arithmetic that flushes or rounds another way than to nearest")

    def compute(*sources: Array) -> Array:
        result = np.atleast_1d(function(*(wide(source, base) for source in sources)))
        return rounded(saturate(result) if instruction.has("sat") else result, base)

    return compute


def fma(lanes: Lanes, instruction: Instruction) -> Step:
    """a * b + c with one rounding (`mad` of floating types is the same)."""
    kind, how = instruction.type, mode(instruction)
    sources = operands(lanes, instruction)
    base = PACKED.get(kind, kind)

    def fused(a: Array, b: Array, c: Array) -> Array:
        return rounding.fma32(a, b, c, how)

    if widened := mixed(instruction, fused):
        return function_step(lanes, instruction, finish(instruction, widened), "f32", *sources)
    if base == "f32":
        return function_step(lanes, instruction, finish(instruction, fused), kind, *sources)
    if how != "rn":
        raise Unsupported(f"{base} fma rounded .{how}")
    if base == "f64":
        return function_step(lanes, instruction, rounding.fma64, kind, *sources)
    if instruction.has("ftz"):
        raise Unsupported("16-bit fma with .ftz")

    def fused16(a: Array, b: Array, c: Array) -> Array:
        exact = rounding.odd_to_f32(rounding.fma16(wide(a, base), wide(b, base), wide(c, base)))
        if instruction.has("relu"):
            exact = np.where(np.isnan(exact), exact, np.maximum(exact, np.float32(0)))
        return rounded(saturate(exact) if instruction.has("sat") else exact, base)

    return function_step(lanes, instruction, fused16, kind, *sources)


implements("add", "sub", allow="rn rz rm rp ftz sat cc")(split_types(binary, integer.add))
implements("mul", allow="rn rz rm rp ftz sat lo hi wide")(split_types(binary, integer.mul))
implements("fma", allow="rn rz rm rp ftz sat relu")(fma)
implements("mad", allow="rn rz rm rp ftz sat lo hi wide cc")(split_types(fma, integer.mad))


def _extreme(opcode: str, propagate: bool) -> Callable[..., Array]:
    """min or max: the other operand for one NaN (unless `propagate`), -0 below +0."""
    largest = opcode == "max"
    pick: np.ufunc = {
        (False, False): np.fmin,
        (False, True): np.minimum,
        (True, False): np.fmax,
        (True, True): np.maximum,
    }[largest, propagate]
    join = np.bitwise_and if largest else np.bitwise_or

    def compute(a: Array, b: Array) -> Array:
        result = np.atleast_1d(pick(a, b))
        zero = result == 0
        if zero.any():
            both = zero & (np.asarray(a) == 0) & (np.asarray(b) == 0)
            bits = result.view(np.uint32 if result.dtype == np.float32 else np.uint64)
            first, second = (np.broadcast_to(np.asarray(x), result.shape) for x in (a, b))
            signs = join(np.signbit(first), np.signbit(second)).astype(bits.dtype) << bits.dtype.type(
                bits.itemsize * 8 - 1
            )
            bits[both] = signs[both]
        return result

    return compute


def extreme(lanes: Lanes, instruction: Instruction) -> Step:
    """min and max of two or three operands; .NaN propagates NaN, .xorsign.abs takes sizes and multiplies signs."""
    kind, base = instruction.type, PACKED.get(instruction.type, instruction.type)
    if instruction.has("relu"):
        raise Unsupported("floating-point .relu")
    sources = [lanes.source(token, kind) for token in instruction.operands[1:]]
    pick = _extreme(instruction.opcode, instruction.has("NaN"))

    def compute(a: Array, *others: Array) -> Array:
        if instruction.has("xorsign"):
            (b,) = others
            size = pick(np.abs(a), np.abs(b))
            return np.where(np.signbit(a) ^ np.signbit(b), -size, size)
        for other in others:
            a = pick(a, other)
        return np.array(a)

    if base in {"f16", "bf16"}:
        return function_step(lanes, instruction, _narrow_op(instruction, compute, base), kind, *sources)
    return function_step(lanes, instruction, finish(instruction, compute), kind, *sources)


implements("min", "max", allow="ftz NaN relu xorsign abs")(split_types(extreme, integer.extreme))


def sign_change(lanes: Lanes, instruction: Instruction) -> Step:
    """neg and abs act on the sign bit; with .ftz subnormals become zeros."""
    kind = instruction.type
    value = lanes.source(instruction.operands[1], kind)
    bits = value.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[value.itemsize])
    sign = bits.dtype.type(1 << (value.itemsize * 8 - 1))

    def compute() -> Array:
        source = bits
        if instruction.has("ftz"):
            with rounding.flushing():
                source = (np.atleast_1d(value) * np.float32(1)).view(np.uint32)
        result: Array = source ^ sign if instruction.opcode == "neg" else source & ~sign
        return np.atleast_1d(result).view(element(kind))

    return function_step(lanes, instruction, compute, kind)


implements("neg", "abs", allow="ftz")(split_types(sign_change, integer.sign_change))


@implements("copysign")
def copysign(lanes: Lanes, instruction: Instruction) -> Step:
    """The magnitude of b with the sign of a."""
    a, b = (lanes.source(token, instruction.type) for token in instruction.operands[1:])
    return function_step(lanes, instruction, lambda: np.copysign(b, a), instruction.type)
