"""Shared memory of the CTAs in flight: bytes, who wrote and read them since the last barrier, and what is wrong.

The check works on granules of `granule` bytes, the smallest shared access of the kernel. A granule remembers its last
writer and reader (warp, and that CTA's barrier interval at the time). Two accesses of different warps conflict if one
is a plain write and no barrier lies between. Lanes of one warp are taken to be in step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import Misaligned, OutOfBounds, SharedRace, Uninitialised, WriteConflict
from .memory import UNITS, same_bits

Array = np.ndarray[Any, Any]

RANK_SHIFT = 24  # a shared address: (cluster rank + 1) << 24 | offset; rank field 0 is the own CTA
NOBODY, SEVERAL, ATOMIC = -1, -2, -3


class SharedMemory:
    """Shared memory of `ctas` CTAs, `size` bytes each, the CTAs of a cluster side by side."""

    def __init__(self, ctas: int, size: int, granule: int, cluster: int, *, check: bool = True) -> None:
        self.size, self.cluster, self.check, self.granule = size, cluster, check, granule
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

    def locate(self, addresses: Array, ctas: Array, size: int, what: str) -> Array:
        """Byte offsets into `bytes`. `ctas`: position of each access's own CTA among those in flight."""
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            raise Misaligned(f"shared address no multiple of {size} in `{what}`")
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

    def _now(self, granules: Array, actor: Array) -> Array:
        """Time of an access: barriers of the owner CTA, or only cluster barriers if the actor is of another CTA."""
        return (self.cluster_interval[actor] << 32) | self.interval[actor]

    def _conflicts(self, time: Array, who: Array, now: Array, warp: Array) -> Array:
        """Whether earlier accesses at `time` by `who` are unordered with one at `now` by `warp`."""
        other = (who != warp) & (who != NOBODY)
        if self.cluster == 1:
            return other & (time == now)
        same_cta = (who >> 5) == (warp >> 5)
        return other & np.where(same_cta, time == now, (time >> 32) == (now >> 32))

    def read(self, offsets: Array, size: int, warps: Array, ctas: Array, what: str) -> None:
        """Notes a read; `warps` are warp numbers within the cluster."""
        if not self.check:
            return
        granules, warp, actor = self._touched(offsets, size, warps, ctas)
        now = self._now(granules, actor)
        if not self.written[granules].all():
            raise Uninitialised(f"read of shared memory that nothing wrote in `{what}`")
        if self._conflicts(self.write_time[granules], self.writer[granules], now, warp).any():
            raise SharedRace(f"`{what}` reads what another warp wrote since the last barrier")
        fresh = (self.read_time[granules] != now) | (self.reader[granules] == warp)
        self.reader[granules] = np.where(fresh, warp, SEVERAL)
        several = self.reader[granules] != warp  # lanes of this very access that lost to another warp
        self.reader[granules[several]] = SEVERAL
        self.read_time[granules] = now

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
        now = self._now(granules, actor)
        self._check_write(granules, now, warp, what, ATOMIC if atomic else NOBODY)
        self.writer[granules] = ATOMIC if atomic else warp
        self.write_time[granules], self.written[granules] = now, True

    def _check_write(self, granules: Array, now: Array, warp: Array, what: str, pardoned: int) -> None:
        writer = self.writer[granules]
        after_write = self._conflicts(self.write_time[granules], writer, now, warp) & (writer != pardoned)
        if after_write.any():
            raise SharedRace(f"`{what}` writes what another warp wrote since the last barrier")
        if self._conflicts(self.read_time[granules], self.reader[granules], now, warp).any():
            raise SharedRace(f"`{what}` writes what another warp read since the last barrier")
