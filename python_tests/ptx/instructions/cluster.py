"""Addresses of the shared memory of other CTAs of a cluster."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import OutOfBounds
from ..lanes import Lanes, Mask, Step, implements
from ..parser import Instruction
from ..shared import RANK_SHIFT
from ._steps import function_step

Array = np.ndarray[Any, Any]


@implements("mapa", allow="shared::cluster")
def mapa(lanes: Lanes, instruction: Instruction) -> Step:
    """The address in CTA `rank` of the cluster that corresponds to one of the own CTA, generic or shared."""
    kind = instruction.type
    address, rank = lanes.source(instruction.operands[1], kind), lanes.source(instruction.operands[2], "u32")

    assign, width = lanes.assigner(instruction.operands[0]), address.dtype.type

    def step(mask: Mask) -> None:
        asked = np.broadcast_to(rank, lanes.count)
        if (asked[slice(None) if mask is None else mask] >= lanes.launch.cluster).any():
            raise OutOfBounds(f"no such CTA in the cluster of {lanes.launch.cluster}: `{instruction.text}`")
        own = address & ~width(0xFF << RANK_SHIFT)
        assign(own | ((asked.astype(width) + width(1)) << width(RANK_SHIFT)), mask)

    return step


@implements("getctarank", allow="shared::cluster")
def getctarank(lanes: Lanes, instruction: Instruction) -> Step:
    """The rank of the CTA whose shared memory an address means."""
    address = lanes.source(instruction.operands[1], instruction.type)

    def compute() -> Array:
        field = (np.broadcast_to(address, lanes.count) >> address.dtype.type(RANK_SHIFT)) & address.dtype.type(0xFF)
        return np.where(field == 0, lanes.rank, field.astype(np.int64) - 1).astype(np.uint32)

    return function_step(lanes, instruction, compute, "u32")
