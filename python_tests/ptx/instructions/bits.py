"""Bitwise logic, shifts, and bit fields."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..lanes import Lanes, Step, implements
from ..parser import Instruction
from ..scalars import BITS, container, is_signed
from ._steps import function_step, ufunc_step

Array = np.ndarray[Any, Any]

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@implements("and", "or", "xor")
def logic(lanes: Lanes, instruction: Instruction) -> Step:
    """Bitwise, predicates too."""
    kind = instruction.type
    if kind == "pred":
        a, b = (lanes.predicate(token) for token in instruction.operands[1:])
        return function_step(lanes, instruction, lambda: _LOGIC[instruction.opcode](a(), b()), kind)
    sources = [lanes.source(token, kind) for token in instruction.operands[1:]]
    return ufunc_step(lanes, instruction, _LOGIC[instruction.opcode], kind, *sources)


@implements("not")
def invert(lanes: Lanes, instruction: Instruction) -> Step:
    """Bitwise complement."""
    kind = instruction.type
    return ufunc_step(lanes, instruction, np.invert, kind, lanes.source(instruction.operands[1], kind))


@implements("cnot")
def cnot(lanes: Lanes, instruction: Instruction) -> Step:
    """1 for zero, else 0."""
    value = lanes.source(instruction.operands[1], instruction.type)
    return function_step(lanes, instruction, lambda: (value == 0).astype(value.dtype), instruction.type)


@implements("shl", "shr")
def shift(lanes: Lanes, instruction: Instruction) -> Step:
    """Amounts beyond the width count as the width: zeros, or copies of the sign."""
    kind, bits = instruction.type, BITS[instruction.type]
    value, amount = lanes.source(instruction.operands[1], kind), lanes.source(instruction.operands[2], "u32")
    left, signed = instruction.opcode == "shl", is_signed(kind) and instruction.opcode == "shr"
    ufunc = np.left_shift if left else np.right_shift
    if amount.ndim == 0 and int(amount) < bits:
        return ufunc_step(lanes, instruction, ufunc, kind, value, amount.astype(value.dtype))

    def compute() -> Array:
        small = np.minimum(amount, np.uint32(bits - 1)).astype(value.dtype)
        result = ufunc(value, small)
        return result if signed else np.where(amount >= bits, value.dtype.type(0), result)

    return function_step(lanes, instruction, compute, kind)


@implements("shf", allow="l r wrap clamp")
def funnel(lanes: Lanes, instruction: Instruction) -> Step:
    """The pair b:a shifted; its upper half (left) or lower half (right). .clamp holds the amount at 32."""
    a, b, amount = (lanes.source(token, "b32") for token in instruction.operands[1:])

    def compute() -> Array:
        pair = (np.asarray(b, np.uint64) << np.uint64(32)) | a
        by = (amount & np.uint32(31)) if instruction.has("wrap") else np.minimum(amount, np.uint32(32))
        by = np.asarray(by, np.uint64)
        shifted = ((pair << by) >> np.uint64(32)) if instruction.has("l") else (pair >> by)
        return (shifted & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return function_step(lanes, instruction, compute, "b32")


@implements("lop3")
def lop3(lanes: Lanes, instruction: Instruction) -> Step:
    """Any logic function of three inputs, by its table of eight bits (index a b c)."""
    a, b, c = (lanes.source(token, "b32") for token in instruction.operands[1:4])
    table = int(instruction.operands[4], 0)

    def compute() -> Array:
        result = np.zeros(lanes.count, np.uint32)
        for index in range(8):
            if table >> index & 1:
                result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        return result

    return function_step(lanes, instruction, compute, "b32")


@implements("prmt")
def prmt(lanes: Lanes, instruction: Instruction) -> Step:
    """Four bytes picked from the pair b:a; the selector's high bit replicates the byte's sign."""
    a, b, selector = (lanes.source(token, "b32") for token in instruction.operands[1:])

    def compute() -> Array:
        pair = (np.asarray(b, np.uint64) << np.uint64(32)) | a
        result = np.zeros(lanes.count, np.uint32)
        for position in range(4):
            choice = (selector >> np.uint32(4 * position)) & np.uint32(15)
            byte = (pair >> (np.asarray(choice & np.uint32(7), np.uint64) << np.uint64(3))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(choice & np.uint32(8), sign, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * position)
        return result

    return function_step(lanes, instruction, compute, "b32")


@implements("bfe")
def extract(lanes: Lanes, instruction: Instruction) -> Step:
    """`length` bits from `position`, zero- or sign-extended; bits beyond the width are the sign (or zero)."""
    kind, bits = instruction.type, BITS[instruction.type]
    value = lanes.source(instruction.operands[1], kind)
    position, length = (lanes.source(token, "u32") for token in instruction.operands[2:])

    def compute() -> Array:
        start = np.asarray(position & np.uint32(255), np.int64)
        size = np.asarray(length & np.uint32(255), np.int64)
        raw = np.asarray(value).view(container(bits)).astype(np.uint64)
        last = np.minimum(start + size - 1, bits - 1).astype(np.uint64)
        sign = np.where(size > 0, (raw >> last) & np.uint64(1), 0) if is_signed(kind) else np.uint64(0)
        field = np.where(start > 63, np.uint64(0), raw >> np.minimum(start, 63).astype(np.uint64))
        taken = np.clip(np.minimum(size, bits - start), 0, 64)
        ones = np.where(
            taken > 63, ~np.uint64(0), (np.uint64(1) << np.minimum(taken, 63).astype(np.uint64)) - np.uint64(1)
        )
        result = (field & ones) | np.where(np.asarray(sign) != 0, ~ones, np.uint64(0))
        return result.astype(container(bits))

    return function_step(lanes, instruction, compute, kind)


@implements("bfi")
def insert(lanes: Lanes, instruction: Instruction) -> Step:
    """b with `length` bits from `position` replaced by the low bits of a."""
    kind, bits = instruction.type, BITS[instruction.type]
    a, b = (lanes.source(token, kind) for token in instruction.operands[1:3])
    position, length = (lanes.source(token, "u32") for token in instruction.operands[3:])

    def compute() -> Array:
        start = np.asarray(position & np.uint32(255), np.uint64)
        size = np.asarray(length & np.uint32(255), np.uint64)
        most = np.uint64(63)
        ones = np.where(size > most, ~np.uint64(0), (np.uint64(1) << np.minimum(size, most)) - np.uint64(1))
        place = np.where(start > most, np.uint64(0), ones << np.minimum(start, most))
        moved = np.asarray(a, np.uint64) << np.minimum(start, most)
        return ((np.asarray(b, np.uint64) & ~place) | (moved & place)).astype(container(bits))

    return function_step(lanes, instruction, compute, kind)


@implements("bmsk", allow="clamp wrap")
def mask_bits(lanes: Lanes, instruction: Instruction) -> Step:
    """b ones from bit a up; .clamp only."""
    if not instruction.has("clamp"):
        raise Unsupported("bmsk.wrap")
    start, size = (lanes.source(token, "u32") for token in instruction.operands[1:])

    def compute() -> Array:
        first, count = (np.minimum(v, np.uint32(32)).astype(np.uint64) for v in (start, size))
        ones = ((np.uint64(1) << count) - np.uint64(1)) << first
        return (ones & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return function_step(lanes, instruction, compute, "b32")


def bit_length(values: Array) -> Array:
    """Position of the highest set bit plus 1, 0 for zero; uint32."""
    wide = np.asarray(values).astype(np.uint64)
    upper = np.frexp((wide >> np.uint64(32)).astype(np.float64))[1]
    lower = np.frexp((wide & np.uint64(0xFFFFFFFF)).astype(np.float64))[1]
    return np.where(upper > 0, upper + 32, lower).astype(np.uint32)


def _reverse(values: Array) -> Array:
    octets = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(-1, values.itemsize)
    flipped = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1, bitorder="big")
    return np.ascontiguousarray(flipped[:, ::-1]).view(values.dtype).reshape(-1)


@implements("popc", "clz", "brev", "bfind", allow="shiftamt")
def scan(lanes: Lanes, instruction: Instruction) -> Step:
    """Count of ones, leading zeros, bit reversal, highest bit that differs from the sign."""
    kind, bits = instruction.type, BITS[instruction.type]
    value = lanes.source(instruction.operands[1], kind)

    def find() -> Array:
        raw = np.where(value < 0, ~value, value) if is_signed(kind) else value
        length = bit_length(np.asarray(raw).view(container(bits)))
        found = np.uint32(bits) - length if instruction.has("shiftamt") else length - np.uint32(1)
        return np.where(length == 0, np.uint32(0xFFFFFFFF), found)

    functions = {
        "popc": lambda: np.bitwise_count(value).astype(np.uint32),
        "clz": lambda: np.uint32(bits) - bit_length(value),
        "brev": lambda: _reverse(np.broadcast_to(value, lanes.count)),
        "bfind": find,
    }
    return function_step(
        lanes, instruction, functions[instruction.opcode], "u32" if instruction.opcode != "brev" else kind
    )
