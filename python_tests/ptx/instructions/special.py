"""Division and the functions of the special-function unit, approximate or correctly rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..lanes import Lanes, Step, implements
from ..parser import Instruction
from ..scalars import PACKED
from . import integer
from ._steps import function_step
from .floating import finish, rounded, split_types, wide

Array = np.ndarray[Any, Any]


def divide(lanes: Lanes, instruction: Instruction) -> Step:
    """div.rn, div.full and div.approx of float32, div.rn of float64."""
    kind = instruction.type
    sources = [lanes.source(token, kind) for token in instruction.operands[1:]]
    approximation = lanes.launch.approximation
    if instruction.has("approx", "full") and kind == "f32":

        def quotient(a: Array, b: Array) -> Array:
            return approximation.divide(a, b, full=instruction.has("full"))

    elif instruction.has("rn"):
        quotient = np.divide
    else:
        raise Unsupported("this rounding of div")
    return function_step(lanes, instruction, finish(instruction, quotient), kind, *sources)


implements("div", allow="rn full approx ftz")(split_types(divide, integer.divide))


@implements("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", allow="approx rn ftz")
def special(lanes: Lanes, instruction: Instruction) -> Step:
    """Functions of the special-function unit, and the correctly rounded rcp.rn and sqrt.rn."""
    kind, opcode = instruction.type, instruction.opcode
    value = lanes.source(instruction.operands[1], kind)
    if kind == "f32" and instruction.has("approx"):
        function = getattr(lanes.launch.approximation, opcode)
    elif kind in {"f32", "f64"} and instruction.has("rn") and opcode in {"rcp", "sqrt"}:
        function = np.reciprocal if opcode == "rcp" else np.sqrt
    elif kind == "f64" and opcode in {"rcp", "rsqrt"} and instruction.has("approx") and instruction.has("ftz"):
        function = _coarse64(opcode)
    else:
        return _special_narrow(lanes, instruction)
    return function_step(lanes, instruction, finish(instruction, function), kind, value)


def _coarse64(opcode: str) -> Callable[[Array], Array]:
    """rcp and rsqrt.approx.ftz.f64: of the upper 32 bits only, to the upper 32 bits only (about 20 bits are right)."""
    upper, tiny = np.uint64(0xFFFFFFFF00000000), 2.0**-1022

    def compute(x: Array) -> Array:
        cut = (np.atleast_1d(x).view(np.uint64) & upper).view(np.float64)
        cut = np.where(np.abs(cut) < tiny, np.copysign(0.0, cut), cut)
        exact = np.reciprocal(cut if opcode == "rcp" else np.sqrt(cut))
        exact = np.where(np.abs(exact) < tiny, np.copysign(0.0, exact), exact)
        return (exact.view(np.uint64) & upper).view(np.float64)

    return compute


def _special_narrow(lanes: Lanes, instruction: Instruction) -> Step:
    """ex2 and tanh of 16-bit types: relative error 2^-9.9 (f16) and 2^-7 (bf16), tanh 2^-10.987 and 2^-8."""
    kind, opcode = instruction.type, instruction.opcode
    base = PACKED.get(kind, kind)
    if base not in {"f16", "bf16"} or opcode not in {"ex2", "tanh"}:
        raise Unsupported("this function of this type")
    value = lanes.source(instruction.operands[1], kind)
    approximation = lanes.launch.approximation
    bounds = {"ex2": {"f16": 2.0**-9.9, "bf16": 2.0**-7}, "tanh": {"f16": 2.0**-10.987, "bf16": 2.0**-8}}
    bound = bounds[opcode][base] - (2.0**-11 if base == "f16" else 2.0**-9)
    function = np.exp2 if opcode == "ex2" else np.tanh

    def compute(source: Array) -> Array:
        x = np.atleast_1d(wide(source, base))
        exact = function(x, dtype=np.float64)
        moved = (exact * (1 + max(bound, 0.0) * approximation.share(x, 10))).astype(np.float32)
        if instruction.has("ftz"):
            moved = np.where(np.abs(moved) < np.float32(2.0**-126), np.copysign(np.float32(0), moved), moved)
        return rounded(moved, base)

    return function_step(lanes, instruction, compute, kind, value)
