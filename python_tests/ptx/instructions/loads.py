"""ld and st of parameters, global, shared, local and constant memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import traffic
from ..errors import Misaligned, OutOfBounds, Unsupported
from ..lanes import Lanes, Mask, Step, fit, implements
from ..memory import FIRST_WINDOW, LOCAL_WINDOW, SHARED_WINDOW, as_unit
from ..parser import Instruction, address, members
from ..report import Counts
from ..scalars import BITS, UNSIGNED

Array = np.ndarray[Any, Any]
Assigner = Callable[[Array, Mask], None]

# Hints and orders that change no result here: memory is sequentially consistent and has no caches.
HINTS = (
    "ca cg cs lu cv wb wt nc volatile relaxed acquire release weak cta cluster gpu sys mmio unified "
    "L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate "
    "L2::evict_normal L2::evict_first L2::evict_last L2::cache_hint L2::64B L2::128B L2::256B"
)
SPACES = "global shared shared::cta shared::cluster local const param param::entry"


def space_of(instruction: Instruction) -> str:
    """The state space of a memory instruction."""
    for name in instruction.modifiers:
        if name.split("::")[0] in {"global", "shared", "local", "const", "param"}:
            return name.split("::")[0]
    return "generic"


def active(lanes: Lanes, mask: Mask) -> Array:
    """Numbers of the executing threads."""
    return np.arange(lanes.count) if mask is None else np.flatnonzero(mask)


def resolve(space: str, addresses: Array, what: str) -> tuple[str, Array]:
    """The state space of generic addresses, and addresses in it; all threads must mean the same space."""
    if space not in {"generic", "const"}:
        return space, addresses
    if int(addresses.min()) >= FIRST_WINDOW:
        return "global", addresses
    for name, first, last in (("local", LOCAL_WINDOW, FIRST_WINDOW), ("shared", SHARED_WINDOW, LOCAL_WINDOW)):
        if ((addresses >= first) & (addresses < last)).all():
            return name, addresses - first
    raise OutOfBounds(f"generic address {int(addresses.min()):#x} of no state space, or of several, in `{what}`")


def local_offsets(lanes: Lanes, addresses: Array, threads: Array, size: int, what: str) -> Array:
    """Byte offsets into the batch's local memory."""
    if (addresses & (size - 1)).any():
        raise Misaligned(f"local address no multiple of {size} in `{what}`")
    if int(addresses.min()) < 0 or int(addresses.max()) + size > lanes.kernel.local_bytes:
        raise OutOfBounds(f"local memory of {lanes.kernel.local_bytes} bytes in `{what}`")
    return addresses + threads * lanes.local_pitch


def count_global(lanes: Lanes, counts: Counts, addresses: Array, threads: Array, size: int) -> None:
    """Books a global access."""
    requests, sectors = traffic.sectors(addresses, threads >> 5)
    counts.requests += requests
    counts.sectors += sectors
    counts.bytes += len(addresses) * size


def count_shared(counts: Counts, addresses: Array, threads: Array, size: int) -> None:
    """Books a shared access."""
    passes, least = traffic.bank_passes(addresses, threads >> 5, threads, size)
    counts.passes += passes
    counts.least_passes += least
    counts.bytes += len(addresses) * size


class Access:
    """What ld and st have in common: the space, the width, the operands."""

    def __init__(self, lanes: Lanes, instruction: Instruction, place: str, values: str) -> None:
        self.lanes, self.what = lanes, instruction.text
        self.counts = lanes.counts[instruction.index]
        self.space = space_of(instruction)
        self.kind, self.parts = instruction.type, members(values)
        if self.kind == "b128":
            raise Unsupported("128-bit registers")
        self.each = BITS[self.kind] // 8
        self.size = self.each * len(self.parts)
        if self.size > 16:
            raise Unsupported("accesses of more than 16 bytes")
        self.addresses: Callable[[], Array] = lanes.addresses(place)

    def load(self, threads: Array, addresses: Array) -> Array:
        """Units at the addresses of the executing threads."""
        lanes, what, size = self.lanes, self.what, self.size
        space, addresses = resolve(self.space, addresses, what)
        if space == "global":
            values = lanes.memory.load(addresses, size, what)
            count_global(lanes, self.counts, addresses, threads, size)
            return values
        if space == "shared":
            ctas = lanes.cta[threads]
            offsets = lanes.shared.locate(addresses, ctas, size, what)
            lanes.shared.read(offsets, size, lanes.cluster_warp[threads], ctas, what)
            count_shared(self.counts, offsets, threads, size)
            return lanes.shared.views[size][offsets // size]
        offsets = local_offsets(lanes, addresses, threads, size, what)
        rows = lanes.local.reshape(-1, size)[offsets // size]
        return np.ascontiguousarray(rows).view(UNSIGNED[8 * min(size, 8)]).reshape(len(threads), -1)

    def store(self, threads: Array, addresses: Array, values: Array) -> None:
        """Writes units at the addresses of the executing threads."""
        lanes, what, size = self.lanes, self.what, self.size
        space, addresses = resolve(self.space, addresses, what)
        if space == "global":
            lanes.memory.store(addresses, values, size, what)
            count_global(lanes, self.counts, addresses, threads, size)
        elif space == "shared":
            ctas = lanes.cta[threads]
            offsets = lanes.shared.locate(addresses, ctas, size, what)
            lanes.shared.store(offsets, size, lanes.cluster_warp[threads], ctas, what, values)
            count_shared(self.counts, offsets, threads, size)
        else:
            offsets = local_offsets(lanes, addresses, threads, size, what)
            lanes.local.reshape(-1, size)[offsets // size] = (
                np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
            )


@implements("ld", "ldu", allow=f"{HINTS} {SPACES} v2 v4 v8")
def load(lanes: Lanes, instruction: Instruction) -> Step:
    """Reads one to four values per thread."""
    if space_of(instruction) == "param":
        return _load_parameter(lanes, instruction)
    access = Access(lanes, instruction, instruction.operands[1], instruction.operands[0])
    registers = [lanes.target(part) for part in access.parts]
    dtype, signed = UNSIGNED[8 * access.each], access.kind[0] == "s"

    def step(mask: Mask) -> None:
        addresses = access.addresses()
        threads = active(lanes, mask)
        units = access.load(threads, addresses if mask is None else addresses[threads])
        table = np.ascontiguousarray(units).view(dtype).reshape(len(threads), len(registers))
        for column, register in enumerate(registers):
            if register is None:
                continue
            value = table[:, column]
            if value.dtype != register.dtype:
                value = fit(np.ascontiguousarray(value), register[: len(value)], signed)
            if mask is None:
                register[...] = value
            else:
                register[threads] = value

    return step


def _load_parameter(lanes: Lanes, instruction: Instruction) -> Step:
    name, extra = address(instruction.operands[1])
    width = BITS[instruction.type] // 8
    assigners = [lanes.assigner(part, instruction.type) for part in members(instruction.operands[0])]
    if name in lanes.registers:
        return _load_parameter_at(lanes, instruction, width, assigners)
    if name not in lanes.kernel.parameters:
        raise Unsupported("parameters of called functions")
    start = lanes.kernel.parameters[name].offset + extra
    data = np.frombuffer(lanes.launch.parameters, np.uint8)[start : start + width * len(assigners)]
    values = data.copy().view(UNSIGNED[8 * width])

    def step(mask: Mask) -> None:
        for assign, value in zip(assigners, values, strict=True):
            assign(np.full(lanes.count, value), mask)

    return step


def _load_parameter_at(lanes: Lanes, instruction: Instruction, width: int, assigners: Sequence[Assigner]) -> Step:
    """A parameter by its address, which `mov` has taken."""
    addresses, count = lanes.addresses(instruction.operands[1]), len(assigners)
    data = np.frombuffer(lanes.launch.parameters, np.uint8)

    def step(mask: Mask) -> None:
        threads = active(lanes, mask)
        start = addresses()[threads]
        if (start % (width * count)).any():
            raise Misaligned(f"parameter address no multiple of {width * count} in `{instruction.text}`")
        if int(start.min()) < 0 or int(start.max()) + width * count > len(data):
            raise OutOfBounds(f"parameters of {len(data)} bytes in `{instruction.text}`")
        for position, assign in enumerate(assigners):
            bytes_ = data[start[:, None] + np.arange(position * width, (position + 1) * width)]
            values = np.zeros(lanes.count, UNSIGNED[8 * width])
            values[threads] = bytes_.reshape(-1).view(UNSIGNED[8 * width])
            assign(values, mask)

    return step


@implements("st", allow=f"{HINTS} {SPACES} v2 v4 v8 async mbarrier::complete_tx::bytes")
def store(lanes: Lanes, instruction: Instruction) -> Step:
    """Writes one to four values per thread."""
    if space_of(instruction) == "param":
        from .moves import trap

        return trap(lanes, instruction)
    if instruction.has("async"):
        from .bulk import store_async

        return store_async(lanes, instruction)
    access = Access(lanes, instruction, instruction.operands[0], instruction.operands[1])
    sources = [lanes.widened(part, f"b{8 * access.each}") for part in access.parts]

    def step(mask: Mask) -> None:
        addresses = access.addresses()
        threads = active(lanes, mask)
        columns = [np.broadcast_to(source, lanes.count) for source in sources]
        if mask is not None:
            addresses, columns = addresses[threads], [column[threads] for column in columns]
        access.store(threads, addresses, as_unit(columns, access.size))

    return step
