"""Global memory: an emulated 64-bit address space over the bytes of CPU tensors.

Every tensor argument becomes one allocation in a window of its own, 64 GiB away from the next: an access that leaves
its tensor meets no other tensor. The bytes are the tensor's own (nothing is copied), so a tensor whose strides span
gigabytes costs only the pages that are touched. Gaps between the rows of a strided tensor are out of bounds too.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import Fault, Misaligned, OutOfBounds, Uninitialised, WriteConflict

WINDOW = 1 << 36  # bytes from one allocation's window to the next
SHARED_WINDOW = 1 << 33  # generic addresses of shared memory start here
LOCAL_WINDOW = 1 << 34
FIRST_WINDOW = 1 << 40
PAGE = 512  # what an allocation is aligned to; a view keeps its offset within it

UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # complex128: any 16 bytes
Array = np.ndarray[Any, Any]


def as_unit(values: list[Array], size: int) -> Array:
    """Columns of equal unsigned type side by side, as one array of `size`-byte units."""
    if len(values) == 1:
        return values[0]
    rows = np.empty((len(values[0]), len(values)), values[0].dtype)
    for column, value in enumerate(values):
        rows[:, column] = value
    return rows.reshape(-1).view(UNITS[size])


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays of units are equal bit by bit (units of 16 bytes are no numbers: NaN)."""
    if a.dtype == np.complex128:
        a, b = a.view(np.uint64), np.ascontiguousarray(b).view(np.uint64)
    return bool((a == b).all())


@dataclasses.dataclass
class Allocation:
    """The bytes [first, last) of the emulated space, and what a thread may do there."""

    name: str
    first: int
    last: int
    bytes: Array  # uint8; starts at the 16-byte boundary below `first`
    layout: tuple[tuple[int, int], ...]  # (stride, count) in bytes of the dimensions with gaps, outermost first
    run: int  # contiguous bytes at the innermost level
    owner: Any = None  # keeps the bytes alive
    written: Array | None = None  # bool per byte from `first & ~15`; None: all of it holds values

    def __post_init__(self) -> None:
        self.origin = self.first & ~15
        self._views: dict[int, Array] = {}

    def view(self, size: int) -> Array:
        """The bytes as units of `size`."""
        if size not in self._views:
            whole = len(self.bytes) // size * size
            self._views[size] = self.bytes[:whole].view(UNITS[size])
        return self._views[size]

    def poison(self) -> None:
        """Nothing is written yet: reads are faults until a kernel stores there."""
        self.written = np.zeros(len(self.bytes), np.bool_)

    def check_gaps(self, addresses: Array, size: int) -> Array | None:
        """Which of the accesses lie in a gap between rows; None if the layout has none."""
        if not self.layout:
            return None
        offset = addresses - self.first
        bad = np.zeros(len(offset), np.bool_)
        for stride, count in self.layout:
            index = offset // stride
            bad |= index >= count
            offset = offset - index * stride
        return bad | (offset + size > self.run)


class GlobalMemory:
    """All allocations of a launch."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self._firsts: list[int] = []
        self._next = FIRST_WINDOW + WINDOW

    def add_tensor(self, tensor: Any, name: str = "") -> Allocation:
        """Maps a CPU torch tensor, in place. Raises ValueError for tensors on other devices."""
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the emulator serves CPU tensors")
        item, base = tensor.element_size(), tensor.untyped_storage().data_ptr()
        dims = sorted(
            ((s * item, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and s), reverse=True
        )
        extent = sum(stride * (count - 1) for stride, count in dims) + item if tensor.numel() else 0
        return self._add(name, tensor.data_ptr(), (tensor.data_ptr() - (base & ~15)) % PAGE, extent, dims, item, tensor)

    def add_array(self, array: Array, name: str = "") -> Allocation:
        """Maps a numpy array, in place."""
        dims = sorted(((s, n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1 and s), reverse=True)
        extent = sum(stride * (count - 1) for stride, count in dims) + array.itemsize if array.size else 0
        place = array.ctypes.data
        return self._add(name, place, place % 16, extent, dims, array.itemsize, array)

    def _add(
        self, name: str, place: int, low: int, extent: int, dims: Sequence[tuple[int, int]], item: int, owner: Any
    ) -> Allocation:
        first, start = self._next + low, place & ~15
        length = -(-(place - start + extent) // 16) * 16  # whole 16-byte units; bounds are checked before any access
        raw = (ctypes.c_uint8 * length).from_address(start) if extent else bytearray(16)
        layout, run = _gaps(dims, item)
        allocation = Allocation(name, first, first + extent, np.frombuffer(raw, np.uint8), layout, run, owner)
        self.allocations.append(allocation)
        self._firsts.append(self._next - WINDOW // 2)
        self._next += -(-(extent + WINDOW) // WINDOW) * WINDOW
        return allocation

    def groups(self, addresses: Array, size: int, what: str) -> list[tuple[Allocation, Array | None]]:
        """Allocations and which of the accesses each serves (None: all). Faults name the instruction `what`."""
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            raise Misaligned(f"address no multiple of {size} in `{what}`")
        lowest, highest = int(addresses.min()), int(addresses.max())
        position = bisect.bisect_right(self._firsts, lowest) - 1
        if position >= 0:
            allocation = self.allocations[position]
            if lowest >= allocation.first and highest + size <= allocation.last and not allocation.layout:
                return [(allocation, None)]
        owners = np.searchsorted(np.array(self._firsts), addresses, "right") - 1
        result = []
        for index in np.unique(owners):
            chosen = owners == index
            if index < 0:
                raise OutOfBounds(f"{int(chosen.sum())} threads at {lowest:#x}, no global address, in `{what}`")
            self._check(self.allocations[index], addresses[chosen], size, what)
            result.append((self.allocations[index], None if chosen.all() else chosen))
        return result

    @staticmethod
    def _check(allocation: Allocation, addresses: Array, size: int, what: str) -> None:
        outside = (addresses < allocation.first) | (addresses + size > allocation.last)
        where, gaps = "outside", allocation.check_gaps(addresses, size)
        if gaps is not None and not outside.any():
            where, outside = "in a gap between rows of", gaps
        if outside.any():
            offset = int(addresses[outside][0]) - allocation.first
            extent = allocation.last - allocation.first
            raise OutOfBounds(
                f"{int(outside.sum())} threads {where} {allocation.name or 'a buffer'} ({extent} bytes), "
                f"the first at byte {offset}, in `{what}`"
            )

    def load(self, addresses: Array, size: int, what: str) -> Array:
        """`size` bytes at each address, as units."""
        groups = self.groups(addresses, size, what)
        if len(groups) == 1:
            return self._read(groups[0][0], addresses, size, what)
        values = np.empty(len(addresses), UNITS[size])
        for allocation, chosen in groups:
            values[chosen] = self._read(allocation, addresses[chosen], size, what)
        return values

    @staticmethod
    def _read(allocation: Allocation, addresses: Array, size: int, what: str) -> Array:
        index = (addresses - allocation.origin) // size if size > 1 else addresses - allocation.origin
        if allocation.written is not None and not allocation.written.reshape(-1, size)[index].all():
            raise Uninitialised(f"read of {allocation.name or 'a buffer'} where nothing was written, in `{what}`")
        values: Array = allocation.view(size).take(index)
        return values

    def store(self, addresses: Array, values: Array, size: int, what: str) -> None:
        """Writes one unit at each address."""
        for allocation, chosen in self.groups(addresses, size, what):
            index = (addresses - allocation.origin) // size
            if chosen is not None:
                index = index[chosen]
            mine = values if chosen is None else values[chosen]
            view = allocation.view(size)
            view[index] = mine
            if not same_bits(view.take(index), mine):
                raise WriteConflict(f"two threads write different values to one place in `{what}`")
            if allocation.written is not None:
                allocation.written.reshape(-1, size)[index] = True

    def units(self, addresses: Array, size: int, what: str, *, read: bool) -> tuple[Array, Array]:
        """For atomics: the view of `size`-byte units and the index of each access into it."""
        groups = self.groups(addresses, size, what)
        if len(groups) != 1:
            raise Fault(f"one atomic instruction on several allocations: `{what}`")
        allocation = groups[0][0]
        index = (addresses - allocation.origin) // size
        if allocation.written is not None:
            rows = allocation.written.reshape(-1, size)
            if read and not rows[index].all():
                raise Uninitialised(f"atomic on {allocation.name or 'a buffer'} where nothing was written, in `{what}`")
            rows[index] = True
        return allocation.view(size), index


def _gaps(dims: Sequence[tuple[int, int]], item: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Dimensions that leave gaps, outermost first, and the contiguous bytes inside them."""
    run, remaining = item, list(dims)
    while remaining and remaining[-1][0] == run:
        run *= remaining.pop()[1]
    inside = [stride * count for stride, count in remaining[1:]] + [run]
    if any(stride < extent for (stride, _), extent in zip(remaining, inside, strict=False)):
        return (), run  # overlapping rows: no gaps that one could tell
    return tuple(remaining), run
