"""Extended-precision integer arithmetic: add, sub and mad with carry in and out (one carry bit per thread)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..lanes import Lanes, Mask, Step, implements
from ..parser import Instruction

Array = np.ndarray[Any, Any]


def carry_of(lanes: Lanes) -> Array:
    """The condition-code register CC.CF."""
    carry: Array = lanes.progress.setdefault("carry", np.zeros(lanes.count, np.bool_))
    return carry


@implements("addc", "subc", "madc", allow="cc lo hi")
def with_carry(lanes: Lanes, instruction: Instruction) -> Step:
    """32-bit add, sub or mad (low or high product) that takes (addc) and with .cc gives a carry, or a borrow."""
    if instruction.type not in {"u32", "s32", "b32"}:
        raise Unsupported("carries of this type")
    kind = instruction.type if instruction.has("hi") else "u32"
    sources = [lanes.source(token, kind) for token in instruction.operands[1:]]
    assign, carry = lanes.assigner(instruction.operands[0]), carry_of(lanes)
    subtract, takes = instruction.opcode.startswith("sub"), instruction.opcode.endswith("c")
    dtype = np.int64

    def step(mask: Mask) -> None:
        first, *rest = (np.asarray(source).astype(dtype) for source in sources)
        if len(rest) == 2:
            product = first * rest[0] if kind == "s32" else (first.astype(np.uint64) * rest[0].astype(np.uint64))
            word = product >> product.dtype.type(32) if instruction.has("hi") else product
            first, rest = (word & product.dtype.type(0xFFFFFFFF)).astype(dtype), rest[1:]
        second = rest[0] & 0xFFFFFFFF
        carried = carry if takes else np.bool_(0)
        total = (first & 0xFFFFFFFF) - second - carried if subtract else (first & 0xFFFFFFFF) + second + carried
        total = np.broadcast_to(total, lanes.count)
        assign((total & 0xFFFFFFFF).astype(np.uint32), mask)
        if instruction.has("cc"):
            out = (total >> 32) != 0
            carry[...] = out if mask is None else np.where(mask, out, carry)

    return step
