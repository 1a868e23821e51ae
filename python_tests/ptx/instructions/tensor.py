"""Tensor-core instructions of one warp: mma.sync on 16-bit floating-point numbers, and ldmatrix, which feeds it.

Fragments are laid out over the lanes as the ISA draws them (9.7.14.5, "Warp-level matrix instructions"): with g = lane
/ 4 and t = lane % 4, register i of A holds row g + 8 (i mod 2), columns 2t, 2t + 1 of the i / 2-th eight; of B rows 2t,
2t + 1 of the i-th eight, column g; of C and D row g + 8 (i / 2), column 2t + i mod 2. Products and sums are float32,
added in numpy's order: the hardware's is not stated.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..errors import Divergence, Unsupported
from ..lanes import WARP, Lanes, Mask, Step, implements
from ..parser import Instruction, members
from ..rounding import from_bf16
from .loads import count_shared

Array = np.ndarray[Any, Any]
_LANE = np.arange(WARP)
_GROUP, _PAIR = _LANE >> 2, 2 * (_LANE & 3)


def whole_warps(lanes: Lanes, mask: Mask, what: str) -> Array:
    """Numbers of the warps that execute; all lanes of each must."""
    rows = (lanes.present if mask is None else mask).reshape(-1, WARP)
    if (rows.any(1) != rows.all(1)).any():
        raise Divergence(f"`{what}` in part of a warp")
    return np.flatnonzero(rows.any(1))


def halves(register: Array, warps: Array, kind: str) -> Array:
    """float32 [warps, 32, 2]: the two numbers in each lane's register."""
    bits = np.ascontiguousarray(register.reshape(-1, WARP)[warps]).view(np.uint16).reshape(len(warps), WARP, 2)
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


@implements("mma", allow="sync aligned m16n8k8 m16n8k16 row col *")
def mma(lanes: Lanes, instruction: Instruction) -> Step:
    """D = A B + C for A [16, K], B [K, 8] in bfloat16 or float16, C and D [16, 8] in float32."""
    shape = re.fullmatch(
        r"sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16|f16)\.\2\.f32", ".".join(instruction.modifiers)
    )
    if shape is None:
        raise Unsupported("a matrix product of another shape or type")
    inner, kind = int(shape[1]), shape[2]
    to, a, b = ([lanes.registers[name] for name in members(operand)] for operand in instruction.operands[:3])
    c = [lanes.source(name, "f32") for name in members(instruction.operands[3])]

    def step(mask: Mask) -> None:
        warps = whole_warps(lanes, mask, instruction.text)
        left, right = np.zeros((len(warps), 16, inner), np.float32), np.zeros((len(warps), inner, 8), np.float32)
        total = np.zeros((len(warps), 16, 8), np.float32)
        for i, register in enumerate(a):
            for j, values in enumerate(np.moveaxis(halves(register, warps, kind), 2, 0)):
                left[:, _GROUP + 8 * (i & 1), _PAIR + j + 8 * (i >> 1)] = values
        for i, register in enumerate(b):
            for j, values in enumerate(np.moveaxis(halves(register, warps, kind), 2, 0)):
                right[:, _PAIR + j + 8 * i, _GROUP] = values
        for i, values in enumerate(c):
            total[:, _GROUP + 8 * (i >> 1), _PAIR + (i & 1)] = np.broadcast_to(values, lanes.count).reshape(-1, WARP)[
                warps
            ]
        total += left @ right
        for i, register in enumerate(to):
            register.view(np.float32).reshape(-1, WARP)[warps] = total[:, _GROUP + 8 * (i >> 1), _PAIR + (i & 1)]

    return step


@implements("ldmatrix", allow="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def ldmatrix(lanes: Lanes, instruction: Instruction) -> Step:
    """1, 2 or 4 matrices [8, 8] of 16-bit elements: lane 8 k + i has the address of row i of the k-th, and lane 4 i + j
    gets entries 2 j and 2 j + 1 of that row; of the transposed matrix with .trans."""
    to = [lanes.registers[name] for name in members(instruction.operands[0])]
    addresses, counts = lanes.addresses(instruction.operands[1]), lanes.counts[instruction.index]

    def step(mask: Mask) -> None:
        warps = whole_warps(lanes, mask, instruction.text)
        for k, register in enumerate(to):
            threads = (warps[:, None] * WARP + np.arange(8 * k, 8 * k + 8)).reshape(-1)
            ctas = lanes.cta[threads]
            offsets = lanes.shared.locate(addresses()[threads], ctas, 16, instruction.text)
            lanes.shared.read(offsets, 16, lanes.cluster_warp[threads], ctas, instruction.text)
            count_shared(counts, offsets, threads, 16)
            matrix = np.ascontiguousarray(lanes.shared.views[16][offsets // 16]).view(np.uint16).reshape(-1, 8, 8)
            if instruction.has("trans"):
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            register.reshape(-1, WARP)[warps] = matrix.reshape(-1, 64).view(np.uint32)

    return step
