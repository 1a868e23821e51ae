"""mbarrier objects: arrivals, expected bytes, phases; and the transfers that complete on them.

A transfer's data appear in shared memory only when a thread waits on its mbarrier (or arrives at it anew), as late as
the program can tell: a missing wait reads old contents. A failed wait lets other threads run before it is repeated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..errors import Fault, SharedRace, Unsupported
from ..lanes import Lanes, Mask, Step, implements
from ..parser import Instruction
from .loads import active, resolve

Array = np.ndarray[Any, Any]

_WORDS = "shared shared::cta shared::cluster release acquire relaxed cta cluster"


@dataclasses.dataclass
class Transfer:
    """Bytes on their way into shared memory at `offset` of the batch."""

    offset: int
    data: Array


@dataclasses.dataclass
class Barrier:
    """One mbarrier object."""

    count: int  # arrivals that end a phase
    pending: int  # of them, still missing
    maker: int  # thread that initialised it
    made: tuple[int, int]  # cluster barriers and barriers that the maker's CTA had passed
    bytes: int = 0  # still expected, less those of `transfers`
    phase: int = 0
    transfers: list[Transfer] = dataclasses.field(default_factory=list)

    def settle(self, lanes: Lanes) -> None:
        """Ends the phase if all have arrived and the expected bytes are all on their way."""
        if self.pending == 0 and self.bytes == 0:
            for transfer in self.transfers:
                lanes.shared.deliver(transfer.offset, transfer.data)
            self.transfers.clear()
            self.pending = self.count
            self.phase += 1
            lanes.progress["phases"] = lanes.progress.get("phases", 0) + 1

    def arrive(self, lanes: Lanes, number: int, what: str) -> None:
        """`number` arrivals."""
        self.settle(lanes)
        if number > self.pending:
            raise Fault(f"more arrivals than the mbarrier's count of {self.count} in one phase: `{what}`")
        self.pending -= number


def barriers(lanes: Lanes) -> dict[int, Barrier]:
    """The mbarriers of the batch by their byte offset."""
    table: dict[int, Barrier] = lanes.progress.setdefault("mbarriers", {})
    return table


def barrier_at(lanes: Lanes, offset: int, threads: Array, what: str) -> Barrier:
    """The mbarrier at an offset for some threads. Raises Fault where none was initialised, or not visibly to them."""
    found = barriers(lanes).get(int(offset))
    if found is None:
        raise Fault(f"no mbarrier is initialised there: `{what}`")
    ctas, (cluster_time, time) = lanes.cta[threads], found.made
    unordered = (lanes.shared.cluster_interval[ctas] == cluster_time) & (lanes.warp[threads] != lanes.warp[found.maker])
    unordered &= (lanes.shared.interval[ctas] == time) | (ctas != lanes.cta[found.maker])
    if unordered.any():
        raise SharedRace(f"no barrier between the initialisation of the mbarrier and `{what}`")
    return found


def _now(lanes: Lanes, thread: int) -> tuple[int, int]:
    cta = lanes.cta[thread]
    return int(lanes.shared.cluster_interval[cta]), int(lanes.shared.interval[cta])


def place(lanes: Lanes, operand: str, what: str) -> Any:
    """A function from threads to the offsets of the mbarriers they name."""
    addresses = lanes.addresses(operand)

    def offsets(threads: Array) -> Array:
        space, found = (
            resolve("generic", addresses()[threads], what) if _generic(what) else ("shared", addresses()[threads])
        )
        if space != "shared":
            raise Fault(f"an mbarrier outside shared memory: `{what}`")
        return lanes.shared.locate(found, lanes.cta[threads], 8, what)

    return offsets


def _generic(what: str) -> bool:
    return "shared" not in what.split("[", maxsplit=1)[0]


@implements("mbarrier", allow=f"init inval arrive arrive_drop expect_tx test_wait try_wait parity noComplete {_WORDS}")
def mbarrier(lanes: Lanes, instruction: Instruction) -> Step:
    """init, inval, arrive (expect_tx), expect_tx, test_wait and try_wait (parity)."""
    action = instruction.modifiers[0]
    if instruction.has("noComplete", "arrive_drop"):
        raise Unsupported("arrive_drop, noComplete")
    if action in {"test_wait", "try_wait"}:
        return _wait(lanes, instruction)
    if action == "arrive":
        return _arrive(lanes, instruction)
    offsets = place(lanes, instruction.operands[0], instruction.text)
    number = lanes.source(instruction.operands[1], "u32") if len(instruction.operands) > 1 else np.array(0)

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        table = barriers(lanes)
        amounts = np.broadcast_to(number, lanes.count)[threads]
        for thread, offset, amount in zip(threads, offsets(threads).tolist(), amounts.tolist(), strict=True):
            if action == "init":
                table[offset] = Barrier(amount, amount, int(thread), _now(lanes, thread))
                continue
            barrier = barrier_at(lanes, offset, np.array([thread]), instruction.text)
            if action == "inval":
                del table[offset]
            else:
                barrier.bytes += amount

    return step


def _arrive(lanes: Lanes, instruction: Instruction) -> Step:
    operands = list(instruction.operands)
    target = "_" if operands[0].startswith("[") else operands.pop(0)
    offsets = place(lanes, operands[0], instruction.text)
    assign = lanes.assigner(target)
    extra = lanes.source(operands[1], "u32") if len(operands) > 1 else np.array(1)
    expects = instruction.has("expect_tx")

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        state = np.zeros(lanes.count, np.uint64)
        amounts = np.broadcast_to(extra, lanes.count)[threads].tolist()
        for thread, offset, amount in zip(threads.tolist(), offsets(threads).tolist(), amounts, strict=True):
            barrier = barrier_at(lanes, offset, np.array([thread]), instruction.text)
            barrier.settle(lanes)
            state[thread] = barrier.phase
            barrier.bytes += amount if expects else 0
            barrier.arrive(lanes, 1 if expects else amount, instruction.text)
            if not barrier.transfers:
                barrier.settle(lanes)
        assign(state, mask)

    return step


def _wait(lanes: Lanes, instruction: Instruction) -> Step:
    assign = lanes.assigner(instruction.operands[0])
    offsets = place(lanes, instruction.operands[1], instruction.text)
    parity = instruction.has("parity")
    wanted = lanes.source(instruction.operands[2], "u32" if parity else "u64")

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        found, index = np.unique(offsets(threads), return_inverse=True)
        phases = np.empty(len(found), np.int64)
        for position, offset in enumerate(found):
            barrier = barrier_at(lanes, offset, threads[index == position], instruction.text)
            barrier.settle(lanes)
            phases[position] = barrier.phase
        phase, asked = phases[index], np.broadcast_to(wanted, lanes.count)[threads].astype(np.int64)
        done = (phase & 1) != (asked & 1) if parity else phase != asked
        result = np.zeros(lanes.count, np.bool_)
        result[threads] = done
        assign(result, mask)
        passed, shared = threads[done], lanes.shared
        shared.acquired[lanes.cta[passed] // shared.cluster, lanes.cluster_warp[passed]] = shared.sequence
        lanes.progress["failed"] = threads[~done]

    return step


def send(lanes: Lanes, thread: int, offset: int, destination: int, data: Array, what: str) -> None:
    """A transfer by a thread whose bytes count on the mbarrier at `offset`."""
    barrier = barrier_at(lanes, offset, np.array([thread]), what)
    if len(barrier.transfers) == 0:
        barrier.settle(lanes)
    barrier.bytes -= len(data)
    barrier.transfers.append(Transfer(destination, data))
