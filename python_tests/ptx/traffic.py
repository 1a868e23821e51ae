"""What a warp's memory request costs: 32-byte sectors of global memory, passes over the banks of shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SECTOR_SHIFT = 5
BANK_ROW = 128  # bytes that 32 banks deliver in one pass


def _distinct(keys: Array) -> int:
    """How many different keys; most often they are ascending already."""
    steps = np.diff(keys)
    if steps.size and int(steps.min()) < 0:
        keys = np.sort(keys)
        steps = np.diff(keys)
    return int(np.count_nonzero(steps)) + 1


def sectors(addresses: Array, warps: Array) -> tuple[int, int]:
    """(requests, sectors): warps with an active lane, and the different sectors of each warp, summed.

    `addresses` int64 [lanes] of accesses that are aligned and at most 32 bytes; `warps` int64 [lanes], ascending.
    """
    if not len(addresses):
        return 0, 0
    keys = (warps << 48) | (addresses >> SECTOR_SHIFT)
    requests = int(np.count_nonzero(np.diff(warps))) + 1
    return requests, _distinct(keys)


def bank_passes(addresses: Array, warps: Array, lanes: Array, size: int) -> tuple[int, int]:
    """(passes, least passes) that the 32 banks of 4 bytes need for shared accesses of `size` bytes.

    Lanes go in groups that could fill all banks at once: 32 lanes of 4 bytes, 16 of 8, 8 of 16. A pass serves one word
    of each bank to any number of lanes; a group needs as many passes as its fullest bank holds different words.
    """
    if not len(addresses):
        return 0, 0
    unit = max(size, 4)
    per_row = BANK_ROW // unit
    groups = (warps * 32 + (lanes & 31)) // per_row
    keys = np.sort((groups << 32) | (addresses // unit))
    keys = keys[np.concatenate(([True], keys[1:] != keys[:-1]))]
    group, bank = keys >> 32, keys & (per_row - 1)
    _, position = np.unique(group, return_inverse=True)
    counts = np.bincount(position * per_row + bank, minlength=(int(position[-1]) + 1) * per_row)
    fullest = counts.reshape(-1, per_row).max(1)
    return int(fullest.sum()), len(fullest)
