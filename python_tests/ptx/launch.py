"""Launches a parsed kernel on arguments: tensors, arrays, numbers."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from .approximate import Approximation
from .executor import MOST_LANES, execute
from .lanes import Launch
from .memory import GlobalMemory
from .parser import Kernel, Parameter, parse
from .report import Report


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the emulator runs kernels."""

    seed: int = 0  # of the approximate functions' errors
    noise: float = 1.0  # share of the error that the ISA permits them
    check_races: bool = True
    most_lanes: int = MOST_LANES


@dataclasses.dataclass(frozen=True)
class Unwritten:
    """Marks an argument whose memory holds nothing yet: reading it before writing is a fault."""

    value: Any


def run(
    source: str | Kernel,
    grid: Sequence[int],
    block: Sequence[int] | int,
    arguments: Sequence[Any],
    *,
    name: str | None = None,
    shared: int = 0,
    cluster: int = 0,
    settings: Settings | None = None,
    memory: GlobalMemory | None = None,
) -> Report:
    """Executes a kernel, writing into the tensors and arrays given, and returns its counts.

    `arguments` in the kernel's order: CPU torch tensors and numpy arrays (mapped in place), `Unwritten(...)` of one, or
    numbers (None and missing trailing ones count as 0). `shared`: bytes of dynamic shared memory. `cluster`: CTAs of a
    cluster as an attribute of the launch, for kernels that do not say it themselves. Raises PTXError.
    """
    settings = settings or Settings()
    kernel = parse(source, name) if isinstance(source, str) else source
    if cluster:
        kernel = dataclasses.replace(kernel, cluster=(cluster, 1, 1))
    memory = memory or GlobalMemory()
    values = [*arguments, *[0] * (len(kernel.parameters) - len(arguments))]
    if len(values) != len(kernel.parameters):
        raise ValueError(f"{len(arguments)} arguments for the {len(kernel.parameters)} parameters of {kernel.name}")
    buffer = bytearray(kernel.parameter_bytes)
    for parameter, value in zip(kernel.parameters.values(), values, strict=True):
        raw = _pack(parameter, _place(memory, parameter.name, value))
        buffer[parameter.offset : parameter.offset + parameter.size] = raw
    constants = {}
    for symbol, data in kernel.constants.items():
        constants[symbol] = memory.add_array(np.frombuffer(bytearray(data), np.uint8), symbol).first
    launch = Launch(
        kernel,
        _triple(grid),
        _triple((block,) if isinstance(block, int) else block),
        bytes(buffer),
        memory,
        dynamic_shared=shared,
        approximation=Approximation(settings.seed, settings.noise),
        check_races=settings.check_races,
        constants=constants,
    )
    if not math.prod(launch.grid):
        raise ValueError(f"grid {launch.grid} has no CTA; CUDA refuses such a launch")
    return execute(launch, most_lanes=settings.most_lanes)


def _triple(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(size) for size in sizes), 1, 1, 1)[:3]
    return x, y, z


def _place(memory: GlobalMemory, name: str, value: Any) -> Any:
    """Maps memory; the address, or the number itself."""
    unwritten = isinstance(value, Unwritten)
    value = value.value if unwritten else value
    if hasattr(value, "data_ptr"):
        allocation = memory.add_tensor(value, name)
    elif isinstance(value, np.ndarray):
        allocation = memory.add_array(value, name)
    else:
        return value
    if unwritten:
        allocation.poison()
    return allocation.first


def _pack(parameter: Parameter, value: Any) -> bytes:
    value = 0 if value is None else value
    if isinstance(value, bytes):
        raw = value
    elif parameter.type == "f32":
        raw = struct.pack("<f", float(np.float32(value)))
    elif parameter.type == "f64":
        raw = struct.pack("<d", float(value))
    else:
        raw = (int(value) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
    if len(raw) != parameter.size:
        raise ValueError(f"{len(raw)} bytes for parameter {parameter.name} of {parameter.size}")
    return raw
