"""The threads of the CTAs in flight: registers, special registers, memories. One array element per thread.

Instructions are bound once to the arrays of a batch and then only executed: `bind` looks the opcode up in the registry
that the modules of instructions fill through `implements`.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .approximate import Approximation
from .errors import Unsupported
from .memory import LOCAL_WINDOW, SHARED_WINDOW, GlobalMemory
from .parser import Instruction, Kernel
from .report import Counts
from .scalars import BITS, PACKED, SIGNED, container, element
from .shared import SharedMemory

Array = np.ndarray[Any, Any]
Mask = Array | None  # which threads execute; None: all
Step = Callable[[Mask], None]
Builder = Callable[["Lanes", Instruction], Step]

WARP = 32


@dataclasses.dataclass
class Launch:
    """One kernel launch."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes
    memory: GlobalMemory
    dynamic_shared: int = 0
    approximation: Approximation = dataclasses.field(default_factory=Approximation)
    check_races: bool = True
    constants: dict[str, int] = dataclasses.field(default_factory=dict)  # addresses of module constants

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        x, y, z = self.kernel.cluster
        return x * y * z


class Lanes:
    """State of a batch of CTAs (`ctas`: their linear numbers in the grid, whole clusters side by side)."""

    def __init__(self, launch: Launch, ctas: Array, counts: list[Counts]) -> None:
        kernel = launch.kernel
        self.launch, self.kernel, self.memory, self.counts = launch, kernel, launch.memory, counts
        self.ctas, self.threads = len(ctas), launch.threads
        self.padded = -(-self.threads // WARP) * WARP  # threads of a CTA with the missing lanes of its last warp
        self.count = self.ctas * self.padded
        index = np.arange(self.count, dtype=np.int64)
        self.thread = index % self.padded
        self.present = self.thread < self.threads
        self.lane = index & (WARP - 1)
        self.warp = index // WARP
        self.cta = index // self.padded
        self.cluster_warp = self.cta % launch.cluster * WARP + self.thread // WARP
        self.rank = self.cta % launch.cluster
        self.registers = _register_file(kernel, self.count)
        self._place_shared()
        self.local = np.zeros(self.count * self.local_pitch, np.uint8)
        self._special = self._special_registers(ctas)
        self.asynchronous: list[Any] = []  # cp.async copies on their way
        self.groups = np.zeros(self.count, np.int64)  # cp.async groups committed by each thread
        self.progress: dict[str, Any] = {}  # further state of asynchronous instructions, by their module

    def _place_shared(self) -> None:
        kernel, launch = self.kernel, self.launch
        alignment = kernel.dynamic_alignment
        start = -(-kernel.shared_bytes // alignment) * alignment if kernel.dynamic else kernel.shared_bytes
        size = start + launch.dynamic_shared if kernel.dynamic else start
        parameters = {name: parameter.offset for name, parameter in kernel.parameters.items()}  # within .param
        own = dict(kernel.shared) | dict.fromkeys(kernel.dynamic, start) | dict(kernel.local)
        self.symbols = parameters | own | launch.constants
        granule, ordered = kernel.smallest_shared_access, kernel.has_mbarriers or kernel.copies_in_bulk
        self.shared = SharedMemory(self.ctas, size, granule, launch.cluster, check=launch.check_races, ordered=ordered)
        self.local_pitch = -(-max(kernel.local_bytes, 16) // 16) * 16

    def _special_registers(self, ctas: Array) -> dict[str, Array]:
        (bx, by, _), (gx, gy, _) = self.launch.block, self.launch.grid
        cx, cy, cz = self.kernel.cluster
        cta = np.repeat(ctas, self.padded)
        values: dict[str, Any] = {
            "tid": (self.thread % bx, self.thread // bx % by, self.thread // (bx * by)),
            "ctaid": (cta % gx, cta // gx % gy, cta // (gx * gy)),
            "ntid": self.launch.block,
            "nctaid": self.launch.grid,
            "cluster_ctaid": (self.rank % cx, self.rank // cx % cy, self.rank // (cx * cy)),
            "cluster_nctaid": (cx, cy, cz),
            "clusterid": (cta % gx // cx, cta // gx % gy // cy, cta // (gx * gy) // cz),
            "nclusterid": tuple(g // c for g, c in zip(self.launch.grid, (cx, cy, cz), strict=True)),
        }
        flat = {f"{name}.{axis}": v for name, triple in values.items() for axis, v in zip("xyz", triple, strict=True)}
        below = (1 << self.lane) - 1
        flat |= {"laneid": self.lane, "warpid": self.thread // WARP, "nwarpid": self.padded // WARP}
        flat |= {"lanemask_eq": below + 1, "lanemask_lt": below, "lanemask_le": 2 * below + 1}
        flat |= {"lanemask_ge": 0xFFFFFFFF ^ below, "lanemask_gt": 0xFFFFFFFE ^ (2 * below)}
        flat |= {"cluster_ctarank": self.rank, "cluster_nctarank": self.launch.cluster}
        flat |= {"dynamic_smem_size": self.launch.dynamic_shared, "is_explicit_cluster": int(self.launch.cluster > 1)}
        return {f"%{name}": np.broadcast_to(np.asarray(v, np.int64), self.count) for name, v in flat.items()}

    def source(self, token: str, kind: str) -> Array:
        """An operand as PTX type `kind`: a view of the register, or a scalar array for an immediate or a symbol.

        Packed kinds give two elements per thread. Raises Unsupported for what is no such operand.
        """
        dtype, bits = element(kind), BITS[kind]
        if token in self.registers:
            register = self.registers[token]
            if register.itemsize * 8 == bits or (kind == "pred" and register.dtype == np.bool_):
                return register.view(dtype)
            raise Unsupported(f"{token} of {register.itemsize * 8} bits as .{kind}")
        if token in self._special:
            return self._special[token].astype(container(bits)).view(dtype)
        value = self._constant(token, kind)
        if kind in PACKED:
            return np.full(self.count, value, container(bits)).view(dtype)
        return value.view(dtype) if value.dtype != dtype else value

    def _constant(self, token: str, kind: str) -> Array:
        bits = BITS[kind]
        if token == "WARP_SZ":
            return np.array(WARP, container(bits))
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", token):
            value = np.array(int(match[1], 16), np.uint32)
            return value if bits == 32 else value.view(np.float32).astype(np.float64)
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", token):
            return np.array(int(match[1], 16), np.uint64)
        if re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", token) and bits in (32, 64):
            packed = struct.pack("<f" if bits == 32 else "<d", float(token))
            return np.frombuffer(packed, container(bits))[0:1].reshape(())
        if match := re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", token):
            number = int(token.rstrip("U"), 0) if not re.fullmatch(r"-?0\d+U?", token) else int(token.rstrip("U"), 8)
            return np.array(number != 0 if kind == "pred" else number % (1 << bits), container(bits))
        match = re.fullmatch(r"([\w$]+)(?:\+(\d+))?", token)
        if match and match[1] in self.symbols:
            return np.array(self.symbols[match[1]] + int(match[2] or 0), container(bits))
        raise Unsupported(f"operand {token}")

    def widened(self, token: str, kind: str) -> Array:
        """An operand whose register may be wider than `kind`, as ld, st and cvt allow: its low bits."""
        if token in self.registers and self.registers[token].itemsize * 8 > BITS[kind]:
            dtype = element(kind)
            return self.registers[token].view(dtype)[:: self.registers[token].itemsize // np.dtype(dtype).itemsize]
        return self.source(token, kind)

    def target(self, token: str) -> Array | None:
        """The register to write; None for the sink `_`."""
        if token == "_":
            return None
        if token not in self.registers:
            raise Unsupported(f"destination {token}")
        return self.registers[token]

    def predicate(self, token: str) -> Callable[[], Array]:
        """A predicate operand, possibly `!p`, read anew at each call."""
        if token.startswith("!"):
            positive = self.source(token[1:], "pred")
            return lambda: ~positive
        value = self.source(token, "pred")
        return lambda: value

    def assigner(self, token: str, kind: str | None = None) -> Callable[[Array, Mask], None]:
        """A function that stores a result where the mask says, extended to the register's width as `kind` says."""
        register = self.target(token)
        if register is None:
            return lambda values, mask: None
        signed = kind is not None and kind[0] == "s"

        def assign(values: Array, mask: Mask) -> None:
            raw = fit(values, register, signed)
            if mask is None:
                register[...] = raw
            else:
                register[...] = np.where(mask, raw, register)

        return assign

    def addresses(self, operand: str) -> Callable[[], Array]:
        """int64 addresses of `[base+offset]`; 32-bit bases wrap."""
        from .parser import address

        base, offset = address(operand)
        if base in self.registers:
            register = self.registers[base]
            if register.dtype == np.uint32:
                shift32 = np.uint32(offset % (1 << 32))
                return lambda: (register + shift32).astype(np.int64)
            signed = register.view(np.int64)
            return (lambda: signed + offset) if offset else (lambda: signed)
        value = int(self._constant(base, "b64")) + offset
        return lambda: np.full(self.count, value, np.int64)


def _register_file(kernel: Kernel, count: int) -> dict[str, Array]:
    """One array per register, zeroed (pages that are never used cost nothing)."""
    registers: dict[str, Array] = {}
    for bits in set(kernel.registers.values()) - {128}:
        names = [name for name, width in kernel.registers.items() if width == bits]
        registers.update(zip(names, np.zeros((len(names), count), container(bits)), strict=True))
    return registers


def fit(values: Array, register: Array, signed: bool) -> Array:
    """Values as bits of the register's type, sign- or zero-extended if they are narrower."""
    if values.dtype == register.dtype:
        return values
    if values.size > register.size:  # packed elements, several to a register
        return np.ascontiguousarray(values).view(register.dtype)
    if register.dtype == np.bool_:
        return values != 0
    if values.dtype == np.bool_:
        return values.astype(register.dtype)
    if values.itemsize == register.itemsize:
        return values.view(register.dtype)
    if values.itemsize > register.itemsize:
        if values.dtype.kind == "f":
            raise Unsupported(f"{values.dtype} into a register of {register.itemsize} bytes")
        return values.astype(register.dtype)
    if signed:
        return values.view(SIGNED[values.itemsize * 8]).astype(SIGNED[register.itemsize * 8]).view(register.dtype)
    return values.view(container(values.itemsize * 8)).astype(register.dtype)


_TWO_TYPES = {"cvt", "set", "add", "sub", "fma"}
_REGISTRY: dict[str, tuple[Builder, frozenset[str]]] = {}


def implements(*opcodes: str, allow: str = "") -> Callable[[Builder], Builder]:
    """Registers a builder for opcodes with the modifiers it knows besides types; any other modifier is refused."""

    def register(builder: Builder) -> Builder:
        for opcode in opcodes:
            _REGISTRY[opcode] = builder, frozenset(allow.split())
        return builder

    return register


def check(instruction: Instruction) -> None:
    """Raises Unsupported for an opcode, a modifier or a mixture of types that nothing here knows."""
    if instruction.opcode not in _REGISTRY:
        raise Unsupported(f"opcode {instruction.opcode}: `{instruction.text}`")
    _, allowed = _REGISTRY[instruction.opcode]
    if "*" not in allowed:
        for modifier in instruction.modifiers:
            if modifier not in allowed and modifier not in BITS:
                raise Unsupported(f"modifier .{modifier} of `{instruction.text}`")
        if sum(modifier in BITS for modifier in instruction.modifiers) > (2 if instruction.opcode in _TWO_TYPES else 1):
            raise Unsupported(f"several types in `{instruction.text}`")


def bind(lanes: Lanes, instruction: Instruction) -> Step:
    """The executable form of an instruction on these lanes. Raises Unsupported for operands that it does not know."""
    builder, _ = _REGISTRY[instruction.opcode]
    try:
        return builder(lanes, instruction)
    except (Unsupported, KeyError, IndexError, ValueError) as error:
        raise Unsupported(f"{error} in `{instruction.text}`") from error


GENERIC_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
