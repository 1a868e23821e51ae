"""cp.async: copies from global to shared memory that take effect only when a wait covers them.

Until then shared memory keeps its old contents, so that a missing wait shows. The copy counts as a write by its thread
at the wait. Data are read at the issue: global memory that a kernel writes and copies asynchronously is not modelled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..lanes import Lanes, Mask, Step, implements
from ..parser import Instruction
from .bulk import bulk
from .loads import HINTS, active, count_global

Array = np.ndarray[Any, Any]
_OPEN = -1  # group of a copy that is not committed


@dataclasses.dataclass
class Copy:
    """Copies of one executed cp.async."""

    threads: Array
    offsets: Array  # in shared memory
    data: Array  # uint8 [threads, size]
    group: Array
    what: str

    def select(self, chosen: Array) -> Copy:
        """Those of some threads."""
        return Copy(self.threads[chosen], self.offsets[chosen], self.data[chosen], self.group[chosen], self.what)


_BULK = "bulk bulk_group read shared::cluster mbarrier::complete_tx::bytes"


@implements("cp", allow=f"{HINTS} async commit_group wait_group wait_all global shared shared::cta {_BULK}")
def copy(lanes: Lanes, instruction: Instruction) -> Step:
    """cp.async and cp.async.bulk, their groups and waits."""
    if instruction.modifiers[0] != "async":
        raise Unsupported("cp other than cp.async")
    if instruction.has("mbarrier"):
        raise Unsupported("cp.async.mbarrier.arrive")
    if instruction.has("bulk"):
        return bulk(lanes, instruction)
    if instruction.has("commit_group"):
        return lambda mask: _commit(lanes, active(lanes, mask))
    if instruction.has("wait_group", "wait_all"):
        left = int(instruction.operands[0], 0) if instruction.has("wait_group") else -1
        return lambda mask: _wait(lanes, mask, left)
    return _issue(lanes, instruction)


def _issue(lanes: Lanes, instruction: Instruction) -> Step:
    operands = instruction.operands
    target, source, size = lanes.addresses(operands[0]), lanes.addresses(operands[1]), int(operands[2], 0)
    taken = lanes.source(operands[3], "u32") if len(operands) > 3 and not instruction.has("L2::cache_hint") else None
    counts, what = lanes.counts[instruction.index], instruction.text

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        offsets = lanes.shared.locate(target()[threads], lanes.cta[threads], size, what)
        amount = np.full(len(threads), size) if taken is None else np.broadcast_to(taken, lanes.count)[threads]
        if not np.isin(amount, (0, size)).all():
            raise Unsupported(f"partial source size in `{what}`")
        data = np.zeros((len(threads), size), np.uint8)
        full = np.flatnonzero(amount)
        if len(full):
            addresses = source()[threads[full]]
            data[full] = lanes.memory.load(addresses, size, what).view(np.uint8).reshape(-1, size)
            count_global(lanes, counts, addresses, threads[full], size)
        lanes.asynchronous.append(Copy(threads, offsets, data, np.full(len(threads), _OPEN), what))

    return step


def _commit(lanes: Lanes, threads: Array) -> None:
    for entry in lanes.asynchronous:
        mine = (entry.group == _OPEN) & np.isin(entry.threads, threads)
        entry.group[mine] = lanes.groups[entry.threads[mine]]
    lanes.groups[threads] += 1


def _wait(lanes: Lanes, mask: Mask, left: int) -> None:
    """Completes all but the newest `left` groups of each executing thread; -1: everything, committed or not."""
    waits = np.ones(lanes.count, np.bool_) if mask is None else mask
    remaining = []
    for entry in lanes.asynchronous:
        due = waits[entry.threads]
        if left >= 0:
            due = due & (entry.group != _OPEN) & (entry.group < lanes.groups[entry.threads] - left)
        if due.any():
            _complete(lanes, entry.select(due))
        if not due.all():
            remaining.append(entry.select(~due))
    lanes.asynchronous = remaining


def _complete(lanes: Lanes, entry: Copy) -> None:
    size, shared = entry.data.shape[1], lanes.shared
    values = entry.data.view({4: np.uint32, 8: np.uint64, 16: np.complex128}[size]).reshape(-1)
    warps, ctas = lanes.cluster_warp[entry.threads], lanes.cta[entry.threads]
    shared.store(entry.offsets, size, warps, ctas, entry.what, values)
