"""How kernels are launched: the only table of tuned constants, and the one function every launch goes through.

The constants were chosen by counting (compiled PTX executed, ptxas' report), not by measuring time:

- A thread holds one 16-byte vector a side. Two took 12 registers more and saved 0.2 of 26 instructions a pair.
- A row costs every thread about 450 instructions beside its entries (reductions, logarithms, the masked first tile).
  At V = 131072 in bfloat16 that is 0.9, 1.8 and 3.6 a pair with 8, 16 and 32 warps.
- The later sweeps find in L2 what all running rows leave there. With about 32 warps on a multiprocessor, 132 of them
  and 40 MB of L2 to spend, W warps a row keep rows of up to 9.5 KB * W (both operands) there: so long rows get many
  warps. Sweeps alternate in direction, so that a row that is too long still hits at its turning point.
- The separable kernels issue up to 69.6 instructions a pair with 8 warps (alpha-beta on sm_80 and sm_90) and should
  stay below 70: 8 warps at most. They hold 8 entries' intermediate values, up to 112 registers, and would spill at 32
  warps (64 registers).
- Statistics take 12 registers more: 16 warps at most (at 32 sm_100 spills).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

VECTOR = 16
"""Bytes of the widest load."""


class Shape(NamedTuple):
    """Threads of a program, and the registers that each may have (None: as ptxas likes)."""

    warps: int
    registers: int | None = None

    @property
    def vectors(self) -> int:
        """Of one side in a tile: one a thread."""
        return 32 * self.warps

    def options(self) -> dict[str, Any]:
        """Compile options. Contraction to fused multiply-adds is wanted: the kernels' sums of products rely on it for
        their instruction counts, and where exactness depends on it they say ``fma``. Nothing is left to pipeline: loads
        go straight to registers."""
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}


_BYTES_PER_WARP = {8: 6 * 1024, 9: 9728, 10: 12 * 1024}
"""Bytes of a row pair for each of its warps that stay in L2, by major compute capability: A100 108 multiprocessors and
40 MB, of which a side's half is near; H100 132 and 50 MB; B200 148 and 126 MB."""
_WARPS = (4, 8, 16, 32)
_MOST_SEPARABLE, _MOST_WITH_STATS = 8, 16
_REGISTERS = 128  # two programs of 8 warps; left alone, ptxas aims at 64 or 80 and spills a few bytes


def shape(vocab: int, itemsize: int, online: bool, stats: bool, major: int) -> Shape:
    """For rows of ``vocab`` entries of ``itemsize`` bytes a side; ``online``: forward or reverse KL."""
    pair, each = 2 * vocab * itemsize, _BYTES_PER_WARP.get(major, _BYTES_PER_WARP[9])
    warps = next((w for w in _WARPS if pair <= each * w), _WARPS[-1])
    most = _WARPS[-1] if online else _MOST_SEPARABLE
    return Shape(min(warps, most, _MOST_WITH_STATS if stats else most), None if online else _REGISTERS)


def sparse_shape(vocab: int, itemsize: int, stats: bool, major: int) -> Shape:
    """For rows of a student against a sparse teacher: one side to keep in L2. Left alone, ptxas takes 40 registers for
    16 warps and spills 20 bytes; with statistics 64 are too few on sm_80."""
    warps = shape(vocab // 2, itemsize, True, True, major).warps
    return Shape(min(warps, 8), 96) if stats else Shape(warps, 64)


GATE, GATE_DECIDE = Shape(4), Shape(8, _REGISTERS)
"""Of the gate: sweeps of parts of a row, and the program that decides on a row."""
GATE_SEARCH = 1024
"""Entries that the latter looks at together."""
_GATE_PROGRAMS, _GATE_TILES, _MOST_GATE_PARTS = 528, 4, 1024
"""Four programs on each of 132 multiprocessors: few rows use all of the GPU. A part has at most 4 tiles, as one program
looks for the token in it, but for rows of more than 4096 tiles."""


def gate_parts(rows: int, vocab: int, vector: int) -> tuple[int, int]:
    """Places of a part of a row, a multiple of a tile, and how many parts a row has."""
    tile = GATE.vectors * vector
    tiles = -(-(vocab + vector) // tile)  # a row may begin behind the boundary it is read from
    wanted = min(max(_GATE_PROGRAMS // rows, -(-tiles // _GATE_TILES)), _MOST_GATE_PARTS)
    each = -(-tiles // wanted)
    return each * tile, -(-tiles // each)


SCALING = Shape(8)
_SCALING_VECTORS = 4
_SCALING_PROGRAMS = 2048
"""Two rounds of eight a multiprocessor, on 132 of them. A factor of 1 ends each after one read: the launch is as short
for a gradient of gigabytes as for a small one."""


def scaling(rows: int, columns: int, itemsize: int) -> tuple[int, int, int]:
    """Entries of a tile and the grid (over rows, over tiles) for a gradient times a factor."""
    size = _SCALING_VECTORS * SCALING.vectors * VECTOR // itemsize
    over_rows = min(rows, _SCALING_PROGRAMS)
    return size, over_rows, min(-(-columns // size), _SCALING_PROGRAMS // over_rows)


def architecture(device: torch.device) -> int:
    """Major compute capability; 9 where there is no GPU to ask."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def start(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Launch ``kernel``; tests put an emulator in its place."""
    kernel[grid](**arguments, **options)
