"""Shared memory of the CTAs in flight: bytes, who wrote and read them since the last barrier, and what is wrong.

The check works on granules of `granule` bytes, the smallest shared access of the kernel. A granule remembers its last
writer and reader (a code, below) and the barrier intervals of that CTA at the time. Two accesses of different warps
conflict if one is a plain write and no barrier lies between: of the CTA if both belong to it, else of the cluster.
A warp that waited successfully on an mbarrier has seen all that came before. Lanes of one warp are taken to be in step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import Misaligned, OutOfBounds, SharedRace, Uninitialised, WriteConflict
from .memory import UNITS, same_bits

Array = np.ndarray[Any, Any]

RANK_SHIFT = 24  # a shared address: (cluster rank + 1) << 24 | offset; rank field 0 is the own CTA
# Who accessed a granule: a warp of the cluster (rank * 32 + warp, 0 and up), several warps of one CTA, atomics of one
# CTA, a bulk copy, or nobody.
NOBODY, BULK, SEVERAL, ATOMIC = -1, -2, -16, -64


def several(warp: Array) -> Array:
    """The code for several warps of the CTA of `warp`."""
    return SEVERAL - (warp >> 5)


def cta_of(code: Array) -> Array:
    """The cluster rank behind a code."""
    return np.where(code >= 0, code >> 5, np.where(code <= ATOMIC, ATOMIC - code, SEVERAL - code))


class SharedMemory:
    """Shared memory of `ctas` CTAs, `size` bytes each, the CTAs of a cluster side by side."""

    def __init__(self, ctas: int, size: int, granule: int, cluster: int, *, check: bool, ordered: bool) -> None:
        self.size, self.cluster, self.check, self.granule = size, cluster, check, granule
        self.ordered = ordered  # whether mbarriers order accesses, which costs a sequence number for each
        self.pitch = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(ctas * self.pitch, 0xCD, np.uint8)
        self.views = {width: self.bytes.view(unit) for width, unit in UNITS.items()}
        granules = len(self.bytes) // granule
        self.writer = np.full(granules, NOBODY, np.int32)
        self.write_time = np.full(granules, -1, np.int64)
        self.reader = np.full(granules, NOBODY, np.int32)
        self.read_time = np.full(granules, -1, np.int64)
        self.written = np.zeros(granules, np.bool_)
        self.interval = np.zeros(ctas, np.int64)  # barriers each CTA has passed
        self.cluster_interval = np.zeros(ctas, np.int64)  # cluster barriers
        self.sequence = 0
        self.write_sequence = np.zeros(granules if ordered else 0, np.int64)
        self.read_sequence = np.zeros(granules if ordered else 0, np.int64)
        self.acquired = np.zeros((ctas // cluster, cluster * 32), np.int64)  # by warp: sequence at its last wait
        self.fenced = np.zeros(ctas, np.int64)  # sequence at the CTA's last fence.proxy.async

    def locate(self, addresses: Array, ctas: Array, size: int, what: str) -> Array:
        """Byte offsets into `bytes`. `ctas`: position of each access's own CTA among those in flight."""
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            raise Misaligned(f"shared address no multiple of {size} in `{what}`")
        return self.span(addresses, ctas, size, what)

    def span(self, addresses: Array, ctas: Array, size: int, what: str) -> Array:
        """Byte offsets of accesses to `size` bytes, aligned or not."""
        rank = addresses >> RANK_SHIFT
        if rank.any():
            if int(rank.max()) > self.cluster or int(rank.min()) < 0:
                raise OutOfBounds(f"shared address of no CTA of the cluster in `{what}`")
            ctas = np.where(rank > 0, ctas // self.cluster * self.cluster + rank - 1, ctas)
            addresses = addresses & ((1 << RANK_SHIFT) - 1)
        if int(addresses.max()) + size > self.size:
            raise OutOfBounds(f"shared byte {int(addresses.max())} of {self.size} in `{what}`")
        return addresses + ctas * self.pitch

    def _touched(self, offsets: Array, size: int, *per_access: Array) -> tuple[Array, ...]:
        """Granules of the accesses, and the given values for each granule."""
        count = max(size // self.granule, 1)
        if count == 1:
            return (offsets // self.granule, *per_access)
        granules = (offsets[:, None] // self.granule + np.arange(count)).reshape(-1)
        return (granules, *(np.repeat(values, count) for values in per_access))

    def _now(self, actor: Array) -> Array:
        """Time of an access: cluster barriers and barriers that the acting CTA has passed."""
        return (self.cluster_interval[actor] << 32) | self.interval[actor]

    def _conflicts(self, kind: str, granules: Array, warp: Array, actor: Array) -> Array:
        """Whether the last `kind` (write, read) of each granule is unordered with an access by `warp` now."""
        who, time = (self.writer, self.write_time) if kind == "write" else (self.reader, self.read_time)
        who, time, now = who[granules], time[granules], self._now(actor)
        found = (who != warp) & (who != NOBODY)
        if self.cluster == 1:
            found &= time == now
        else:
            within = (cta_of(who) == warp >> 5) | (who == BULK)  # ordered by the barriers of the CTA
            found &= np.where(within, time == now, (time >> 32) == (now >> 32))
        if self.ordered:
            sequence = self.write_sequence if kind == "write" else self.read_sequence
            found &= sequence[granules] > self.acquired[actor // self.cluster, warp]
        return found

    def read(self, offsets: Array, size: int, warps: Array, ctas: Array, what: str) -> None:
        """Notes a read; `warps` are warp numbers within the cluster."""
        if not self.check:
            return
        granules, warp, actor = self._touched(offsets, size, warps, ctas)
        if not self.written[granules].all():
            raise Uninitialised(f"read of shared memory that nothing wrote in `{what}`")
        if self._conflicts("write", granules, warp, actor).any():
            raise SharedRace(f"`{what}` reads what another warp wrote since the last barrier")
        now = self._now(actor)
        fresh = (self.read_time[granules] != now) | (self.reader[granules] == warp)
        self.reader[granules] = np.where(fresh, warp, several(warp))
        lost = self.reader[granules] != warp  # to another warp of this very instruction
        self.reader[granules[lost]] = several(warp[lost])
        self.read_time[granules] = now
        if self.ordered:
            self.sequence += 1
            self.read_sequence[granules] = self.sequence

    def store(self, offsets: Array, size: int, warps: Array, ctas: Array, what: str, values: Array) -> None:
        """Writes units and notes it."""
        self._write(offsets, size, warps, ctas, what, atomic=False)
        view, index = self.views[size], offsets // size
        view[index] = values
        if self.check and not same_bits(view[index], values):
            raise WriteConflict(f"two threads write different values to one place in `{what}`")

    def atomic(self, offsets: Array, size: int, warps: Array, ctas: Array, what: str) -> tuple[Array, Array]:
        """Notes atomic operations, which do not conflict with each other; the units and their indices."""
        self._write(offsets, size, warps, ctas, what, atomic=True)
        return self.views[size], offsets // size

    def _write(self, offsets: Array, size: int, warps: Array, ctas: Array, what: str, *, atomic: bool) -> None:
        if not self.check:
            return
        granules, warp, actor = self._touched(offsets, size, warps, ctas)
        self._check_write(granules, warp, actor, what, atomic=atomic)
        self.writer[granules] = ATOMIC - (warp >> 5) if atomic else warp
        self.write_time[granules], self.written[granules] = self._now(actor), True
        if self.ordered:
            self.sequence += 1
            self.write_sequence[granules] = self.sequence

    def _check_write(self, granules: Array, warp: Array, actor: Array, what: str, *, atomic: bool) -> None:
        after_write = self._conflicts("write", granules, warp, actor)
        if atomic:
            after_write &= self.writer[granules] > ATOMIC
        if after_write.any():
            raise SharedRace(f"`{what}` writes what another warp wrote since the last barrier")
        if self._conflicts("read", granules, warp, actor).any():
            raise SharedRace(f"`{what}` writes what another warp read since the last barrier")

    def announce(self, offset: int, size: int, warp: int, cta: int, what: str) -> None:
        """A bulk copy into `size` bytes is issued: from here on it may write."""
        if self.check:
            granules, warps, actor = self._touched(np.array([offset]), size, np.array([warp]), np.array([cta]))
            self._check_write(granules, warps, actor, what, atomic=False)

    def deliver(self, offset: int, data: Array) -> None:
        """A bulk copy arrives; whoever reads it must have waited, or be behind a barrier after one who has."""
        self.bytes[offset : offset + len(data)] = data
        granules = np.arange(offset // self.granule, (offset + len(data) - 1) // self.granule + 1)
        self.sequence += 1
        owner = offset // self.pitch
        self.writer[granules], self.written[granules] = BULK, True
        self.write_time[granules] = (self.cluster_interval[owner] << 32) | self.interval[owner]
        if self.ordered:
            self.write_sequence[granules] = self.sequence

    def take(self, offset: int, size: int, cta: int, what: str) -> Array:
        """A bulk copy reads shared memory by the asynchronous proxy; plain writes must be fenced before."""
        granules = np.arange(offset // self.granule, (offset + size - 1) // self.granule + 1)
        if self.check and not self.written[granules].all():
            raise Uninitialised(f"read of shared memory that nothing wrote in `{what}`")
        plain = self.writer[granules] != BULK
        if self.check and (self.write_sequence[granules[plain]] > self.fenced[cta]).any():
            raise SharedRace(f"`{what}` reads plain writes without fence.proxy.async between")
        return self.bytes[offset : offset + size].copy()

    def check_exit(self) -> None:
        """No CTA may leave while another of its cluster can still touch its memory."""
        if not self.check or self.cluster == 1:
            return
        owner = np.arange(len(self.writer)) * self.granule // self.pitch
        for who, time in ((self.reader, self.read_time), (self.writer, self.write_time)):
            remote = (who != NOBODY) & (who != BULK) & (cta_of(who) != owner % self.cluster)
            if (remote & (time >> 32 == self.cluster_interval[owner])).any():
                raise SharedRace("a CTA may leave before another of its cluster has accessed its shared memory")
