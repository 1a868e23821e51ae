"""cp.async.bulk and st.async: copies by the asynchronous proxy.

Into shared memory they complete on an mbarrier. Out of shared memory they belong to bulk groups and are carried out,
from what shared memory holds then, when a wait covers them: changing the source too early shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Fault, Misaligned, Unsupported
from ..lanes import Lanes, Mask, Step
from ..memory import as_unit
from ..parser import Instruction, members
from ..report import Counts
from ..scalars import BITS
from .loads import active
from .mbarrier import place, send

Array = np.ndarray[Any, Any]


@dataclasses.dataclass
class BulkStore:
    """A copy from shared to global memory on its way."""

    thread: int
    source: int
    address: int
    size: int
    group: int  # -1: not committed
    what: str


def bulk(lanes: Lanes, instruction: Instruction) -> Step:
    """Any cp.async.bulk that is no tensor copy."""
    spaces = [name.split("::")[0] for name in instruction.modifiers if name.split("::")[0] in {"shared", "global"}]
    if instruction.has("tensor", "prefetch") or any("multicast" in name for name in instruction.modifiers):
        raise Unsupported("tensor, prefetch and multicast copies")
    if instruction.has("commit_group"):
        return lambda mask: _commit(lanes, active(lanes, mask))
    if instruction.has("wait_group"):
        left = int(instruction.operands[0], 0)
        return lambda mask: _wait(lanes, active(lanes, mask), left)
    if spaces == ["global", "shared"]:
        return _store(lanes, instruction)
    if spaces in (["shared", "global"], ["shared", "shared"]):
        return _load(lanes, instruction, from_global=spaces[1] == "global")
    raise Unsupported("this form of cp.async.bulk")


def _each(lanes: Lanes, instruction: Instruction, perform: Callable[[int, int, int, int, Array], None]) -> Step:
    """Calls `perform(thread, destination, source, size, thread as an array)` for each executing thread."""
    destination, source = lanes.addresses(instruction.operands[0]), lanes.addresses(instruction.operands[1])
    amount = lanes.source(instruction.operands[2], "u32")

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        sizes = np.broadcast_to(amount, lanes.count)[threads]
        for thread, to, start, size in zip(
            threads.tolist(), destination()[threads].tolist(), source()[threads].tolist(), sizes.tolist(), strict=True
        ):
            if (to | start | size) % 16 or not size:
                raise Misaligned(f"bulk copy of {size} bytes, or from or to no multiple of 16: `{instruction.text}`")
            perform(thread, to, start, size, np.array([thread]))

    return step


def _count(counts: Counts, address: int, size: int) -> None:
    counts.requests += 1
    counts.sectors += (address + size - 1) // 32 - address // 32 + 1
    counts.bytes += size


def _load(lanes: Lanes, instruction: Instruction, *, from_global: bool) -> Step:
    barrier = place(lanes, instruction.operands[3], instruction.text)
    counts, what, shared = lanes.counts[instruction.index], instruction.text, lanes.shared

    def perform(thread: int, to: int, start: int, size: int, one: Array) -> None:
        cta = int(lanes.cta[thread])
        offset = int(shared.span(np.array([to]), np.array([cta]), size, what)[0])
        if from_global:
            addresses = start + 16 * np.arange(size // 16)
            data = lanes.memory.load(addresses, 16, what).view(np.uint8)
            _count(counts, start, size)
        else:
            data = shared.take(int(shared.span(np.array([start]), np.array([cta]), size, what)[0]), size, cta, what)
        shared.announce(offset, size, int(lanes.cluster_warp[thread]), cta, what)
        send(lanes, thread, int(barrier(one)[0]), offset, data, what)

    return _each(lanes, instruction, perform)


def _store(lanes: Lanes, instruction: Instruction) -> Step:
    counts, what, shared = lanes.counts[instruction.index], instruction.text, lanes.shared
    pending: list[BulkStore] = lanes.progress.setdefault("bulk stores", [])

    def perform(thread: int, to: int, start: int, size: int, one: Array) -> None:
        cta = int(lanes.cta[thread])
        source = int(shared.span(np.array([start]), np.array([cta]), size, what)[0])
        shared.take(source, size, cta, what)
        _count(counts, to, size)
        pending.append(BulkStore(thread, source, to, size, -1, what))

    return _each(lanes, instruction, perform)


def _groups(lanes: Lanes) -> dict[int, int]:
    """Bulk groups committed so far, by thread."""
    groups: dict[int, int] = lanes.progress.setdefault("bulk groups", {})
    return groups


def _commit(lanes: Lanes, threads: Array) -> None:
    groups = _groups(lanes)
    for entry in lanes.progress.get("bulk stores", []):
        if entry.group < 0 and (threads == entry.thread).any():
            entry.group = groups.get(entry.thread, 0)
    for thread in threads.tolist():
        groups[thread] = groups.get(thread, 0) + 1


def _wait(lanes: Lanes, threads: Array, left: int) -> None:
    groups, pending = _groups(lanes), lanes.progress.get("bulk stores", [])
    for entry in list(pending):
        due = 0 <= entry.group < groups.get(entry.thread, 0) - left
        if due and (threads == entry.thread).any():
            cta = int(lanes.cta[entry.thread])
            data = lanes.shared.take(entry.source, entry.size, cta, entry.what).view(np.complex128)
            lanes.memory.store(entry.address + 16 * np.arange(len(data)), data, 16, entry.what)
            pending.remove(entry)


def check_exit(lanes: Lanes) -> None:
    """Shared memory must not go away under a copy that reads it, nor an mbarrier under one that writes."""
    if lanes.progress.get("bulk stores"):
        raise Fault(f"a thread leaves before its copy is waited for: `{lanes.progress['bulk stores'][0].what}`")
    for barrier in lanes.progress.get("mbarriers", {}).values():
        if barrier.transfers:
            raise Fault("a CTA leaves while a transfer into its shared memory is under way that nobody waited for")


def store_async(lanes: Lanes, instruction: Instruction) -> Step:
    """st.async: values into the shared memory of a CTA of the cluster, completing on an mbarrier there."""
    parts, what = members(instruction.operands[1]), instruction.text
    each = BITS[instruction.type] // 8
    size = each * len(parts)
    sources = [lanes.source(part, f"b{8 * each}") for part in parts]
    destination, barrier = lanes.addresses(instruction.operands[0]), place(lanes, instruction.operands[2], what)

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        columns = [np.ascontiguousarray(np.broadcast_to(source, lanes.count)[threads]) for source in sources]
        data = np.ascontiguousarray(as_unit(columns, size)).view(np.uint8).reshape(len(threads), size)
        offsets = lanes.shared.locate(destination()[threads], lanes.cta[threads], size, what)
        for thread, offset, at, value in zip(
            threads.tolist(), offsets.tolist(), barrier(threads).tolist(), data, strict=True
        ):
            lanes.shared.announce(offset, size, int(lanes.cluster_warp[thread]), int(lanes.cta[thread]), what)
            send(lanes, thread, at, offset, value, what)

    return step
