"""Runs a launch: batches of CTAs, every thread with its own program counter, threads at the same place together.

The group with the smallest program counter runs until it branches, waits or meets another group: forward branches
rejoin at the latest where their paths do. Barriers park threads; a CTA goes on when none of its threads runs. Threads
that have not left and can never be released are a fault.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .errors import BarrierDivergence, Fault, Unsupported
from .instructions import bulk
from .lanes import WARP, Lanes, Launch, Mask, Step, bind, check
from .parser import Instruction
from .report import UNTOUCHED, Counts, Report

Array = np.ndarray[Any, Any]

PARKED, WAITING, DONE = 1 << 29, 1 << 30, (1 << 31) - 1  # instead of a place in the code
MOST_LANES = 1 << 14  # threads in flight; more does not fit the caches, fewer is slower per thread
PATIENCE = 1 << 22  # steps within which any loop of a test kernel ends
RETRIES = 64  # failed waits on mbarriers in a row, while nothing else can run


def execute(launch: Launch, *, most_lanes: int = MOST_LANES) -> Report:
    """Runs every CTA of the grid. Results are in memory afterwards; returns the counts."""
    kernel, started = launch.kernel, time.perf_counter()
    if kernel.threads not in {None, launch.threads}:
        raise Fault(f"{kernel.name} is compiled for {kernel.threads} threads, launched with {launch.threads}")
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    padded = -(-launch.threads // WARP) * WARP
    batch = max(1, most_lanes // padded // launch.cluster) * launch.cluster
    counts = [UNTOUCHED] * len(kernel.instructions)
    order = _cluster_order(launch, total)
    if not kernel.checked:
        for instruction in kernel.instructions:
            if not instruction.is_control:
                check(instruction)
        kernel.checked = True
    with np.errstate(all="ignore"), _no_collection():
        for first in range(0, total, batch):
            _Batch(Lanes(launch, order[first : first + batch], counts)).run()
    seconds = time.perf_counter() - started
    return Report(kernel.name, kernel.instructions, counts, launch.grid, launch.threads, seconds)


def _cluster_order(launch: Launch, total: int) -> Array:
    """CTA numbers with those of a cluster side by side, by rank."""
    if any(grid % size for grid, size in zip(launch.grid, launch.kernel.cluster, strict=True)):
        raise Fault(f"grid {launch.grid} is no multiple of the cluster {launch.kernel.cluster}")
    number = np.arange(total, dtype=np.int64)
    if launch.cluster == 1:
        return number
    (gx, gy, _), (cx, cy, cz) = launch.grid, launch.kernel.cluster
    x, y, z = number % gx, number // gx % gy, number // (gx * gy)
    cluster = (z // cz * (gy // cy) + y // cy) * (gx // cx) + x // cx
    rank = (z % cz * cy + y % cy) * cx + x % cx
    return np.lexsort((rank, cluster)).astype(np.int64)


class _Batch:
    """Execution of one batch of CTAs."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.code = lanes, lanes.kernel.instructions
        self.steps: list[Step | None] = [None] * len(self.code)  # bound when first executed
        self.guards: list[Callable[[], Array] | None] = [
            None if i.guard is None else lanes.predicate("!" * i.negated + i.guard) for i in self.code
        ]
        self.counter = np.where(lanes.present, 0, DONE)  # program counters; WAITING and DONE are larger than any
        self.resume = np.zeros(lanes.count, np.int64)  # where a waiting thread is
        self.at_cluster = np.zeros(lanes.count, np.bool_)  # waits for its cluster, not its CTA
        self.arrived = np.zeros(lanes.count, np.bool_)  # at the cluster barrier
        self.steps_left = PATIENCE
        self.retries = self.phases_seen = 0
        self.parks = lanes.kernel.has_mbarriers

    def run(self) -> None:
        """Until every thread has left."""
        while True:
            current = int(self.counter.min())
            if current == DONE:
                self.lanes.shared.check_exit()
                bulk.check_exit(self.lanes)
                return
            if current >= PARKED:
                self._release()
                continue
            here = self.counter == current
            if here.all():
                self._straight(current, None, len(self.code))
            else:
                others = self.counter[~here]
                self._straight(current, here, int(others.min()))

    def _straight(self, current: int, mask: Mask, limit: int) -> None:
        """Runs the group from `current` until it branches apart, waits, leaves, or reaches `limit`."""
        active = self.lanes.count if mask is None else int(np.count_nonzero(mask))
        warps = active // WARP if mask is None else int(np.count_nonzero(mask.reshape(-1, WARP).any(1)))
        code, steps, guards, counts = self.code, self.steps, self.guards, self.lanes.counts
        while current < limit:
            instruction, count, guard = code[current], counts[current], guards[current]
            if count is UNTOUCHED:
                count = counts[current] = Counts()
            count.warps += warps
            executing, number = mask, active
            if guard is not None:
                holds = guard()
                executing = holds if mask is None else holds & mask
                number = int(np.count_nonzero(executing))
                if number == active:
                    executing = mask
            count.threads += number
            if instruction.is_control:
                following = self._control(instruction, mask, executing, number, active)
                if following is None:
                    return
                if following <= current:
                    self._tick(instruction)
                    if mask is not None:  # a loop in a part: others may be behind it
                        self.counter[mask] = following
                        return
                current = following
                continue
            if number:
                step = steps[current]
                if step is None:
                    step = steps[current] = bind(self.lanes, instruction)
                step(executing)
                if self.parks and self._park(instruction, mask):
                    return
            current += 1
        if mask is None:
            raise Fault("execution runs off the end of the kernel")
        self.counter[mask] = current

    def _tick(self, instruction: Instruction) -> None:
        self.steps_left -= 1
        if not self.steps_left:
            raise Fault(f"no end in sight at `{instruction.text}`")

    def _control(self, instruction: Instruction, mask: Mask, executing: Mask, number: int, active: int) -> int | None:
        """The place where the whole group goes on; None if it split, waits or has left."""
        opcode, after = instruction.opcode, instruction.index + 1
        if number == 0:
            return after
        everyone = slice(None) if mask is None else mask
        chosen = everyone if executing is None else executing
        if opcode == "bra":
            if number == active:
                return instruction.target
            self.counter[everyone] = after
            self.counter[chosen] = instruction.target
            return None
        self.counter[everyone] = after
        if opcode in {"ret", "exit"}:
            self.counter[chosen] = DONE
            return None
        return self._barrier(instruction, chosen, number == active and mask is None)

    def _barrier(self, instruction: Instruction, chosen: Any, everyone: bool) -> int | None:
        """`bar.sync 0` and `barrier.cluster`. With every thread of the batch there, nobody has to wait."""
        lanes, after = self.lanes, instruction.index + 1
        cluster = instruction.has("cluster")
        if not cluster:
            _plain_barrier(instruction)
        elif instruction.has("arrive"):
            if self.arrived[chosen].any():
                raise BarrierDivergence(f"a second arrival without a wait between: `{instruction.text}`")
            self.arrived[chosen] = True
            return after if everyone else None
        elif not self.arrived[chosen].all():
            raise BarrierDivergence(f"a wait at the cluster barrier without an arrival: `{instruction.text}`")
        if everyone:
            self._pass(np.arange(lanes.ctas), cluster)
            return after
        self.counter[chosen], self.resume[chosen] = WAITING, instruction.index
        self.at_cluster[chosen] = cluster
        return None

    def _pass(self, ctas: Array, cluster: bool) -> None:
        """A barrier of these CTAs is complete."""
        shared = self.lanes.shared
        shared.interval[ctas] += 1
        if cluster:
            shared.cluster_interval[ctas] += 1
            self.arrived.reshape(self.lanes.ctas, -1)[ctas] = False

    def _park(self, instruction: Instruction, mask: Mask) -> bool:
        """After a wait on an mbarrier: threads for which it failed let the others run first. Whether there are any."""
        failed = self.lanes.progress.pop("failed", ())
        if not len(failed):
            return False
        self.counter[slice(None) if mask is None else mask] = instruction.index + 1
        self.counter[failed], self.resume[failed] = PARKED, instruction.index + 1
        return True

    def _release(self) -> None:
        """Nothing runs: completes barriers, else lets the parked threads try again."""
        if self._release_ctas() or self._release_clusters():
            return
        parked = self.counter == PARKED
        phases = self.lanes.progress.get("phases", 0)
        if not parked.any():
            raise BarrierDivergence("threads wait at a cluster barrier that others of the cluster never reach")
        self.retries = self.retries + 1 if phases == self.phases_seen else 0
        if self.retries > RETRIES:
            raise BarrierDivergence("threads wait for a phase of an mbarrier that never ends")
        self.phases_seen = phases
        self.counter[parked] = self.resume[parked]

    def _release_ctas(self) -> bool:
        """Lets those CTAs go on whose threads all wait at one barrier of the CTA."""
        lanes, size = self.lanes, self.lanes.padded
        counter = self.counter.reshape(lanes.ctas, size)
        waiting = counter == WAITING
        places, at_cluster = self.resume.reshape(lanes.ctas, size), self.at_cluster.reshape(lanes.ctas, size)
        free = waiting.any(1) & ~(waiting & at_cluster).any(1) & (waiting | (counter == DONE)).all(1)
        for cta in np.flatnonzero(waiting.any(1)):
            found = np.unique(places[cta][waiting[cta]])
            if len(found) > 1:
                texts = " and ".join(f"`{self.code[place].text}` (instruction {place})" for place in found)
                raise BarrierDivergence(f"threads of one CTA wait at {texts}")
            if free[cta]:
                self._whole_warps(cta, waiting[cta])
        self._go_on(np.flatnonzero(free), waiting, cluster=False)
        return bool(free.any())

    def _release_clusters(self) -> bool:
        """Lets those clusters go on whose threads have all arrived or left."""
        lanes, size, per = self.lanes, self.lanes.padded, self.lanes.launch.cluster
        waiting = (self.counter == WAITING) & self.at_cluster
        groups = (waiting | (self.counter == DONE)).reshape(-1, per * size)
        complete = groups.all(1) & waiting.reshape(-1, per * size).any(1)
        self._go_on(np.flatnonzero(np.repeat(complete, per)), waiting.reshape(lanes.ctas, size), cluster=True)
        return bool(complete.any())

    def _whole_warps(self, cta: int, waiting: Array) -> None:
        """bar.sync is for whole warps: a lane that has left while another of its warp waits is undefined behaviour."""
        start = cta * self.lanes.padded
        present = self.lanes.present[start : start + self.lanes.padded].reshape(-1, WARP)
        warps = waiting.reshape(-1, WARP)
        if (warps.any(1) & (warps != present).any(1)).any():
            raise BarrierDivergence("a barrier is executed by a part of a warp")

    def _go_on(self, ctas: Array, waiting: Array, *, cluster: bool) -> None:
        if not len(ctas):
            return
        released = np.zeros_like(waiting)
        released[ctas] = waiting[ctas]
        lanes = released.reshape(-1)
        self.counter[lanes] = self.resume[lanes] + 1
        self._pass(ctas, cluster)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's cycle collector off: many small objects are made here, none in cycles, and it would take a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plain_barrier(instruction: Instruction) -> None:
    """Refuses named barriers, thread counts and reductions."""
    known = set(instruction.modifiers) <= {"sync", "aligned", "cta"}
    if not known or instruction.operands[:1] not in {("0",), ()} or len(instruction.operands) > 1:
        raise Unsupported(f"`{instruction.text}`: only bar.sync 0 of the whole CTA is known")
