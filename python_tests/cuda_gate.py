"""The gate on a GPU as tests call it: the launches that the native library plans, executed by the emulator or a GPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable

import cuda_topk
import torch
from cuda_topk import DTYPES, Launch, _Side, obstacle, planned
from gate_oracle import Call, Decision
from ptx import Settings, run
from ptx.harness import GPU, on_gpu
from ptx.memory import GlobalMemory
from ptx.parser import Kernel
from ptx.report import Report
from torch import Tensor

from kdkernels import native
from kdkernels.ops.rows import Side

__all__ = ["GPU", "H100", "Machine", "gate", "load_ratio", "obstacle", "plan"]


class Machine(ctypes.Structure):
    """`kd_gate_machine` in csrc/cuda/gate_plan.h."""

    _fields_ = (("multiprocessors", ctypes.c_int32), ("cache", ctypes.c_int64))


H100 = Machine(132, 50 * 2**20)
ONE_BLOCK = Machine(0, 50 * 2**20)
"""Not even one block wanted: each row gets as few as can be."""


class _Call(ctypes.Structure):
    """`kd_gate` in csrc/gate.h."""

    _fields_ = (
        ("student", _Side),
        ("teacher", _Side),
        ("student_dtype", ctypes.c_int),
        ("teacher_dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("threshold", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("token", ctypes.c_void_p),
        ("from_teacher", ctypes.c_void_p),
        ("jsd", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    why = obstacle()
    if why:
        raise RuntimeError(why)
    library = ctypes.CDLL(str(native.LIBRARY))
    library.kdkernels_gate_scratch_bytes.restype = ctypes.c_size_t
    return library


def plan(call: _Call, scratch: int, machine: Machine) -> list[Launch]:
    """The launches of the native launcher for that call, with scratch at that address."""
    arguments = ctypes.byref(call), ctypes.c_void_p(scratch), ctypes.byref(machine)
    return planned(_library().kdkernels_gate_plan, *arguments)


def gate(
    place: int | str,
    call: Call,
    machine: Machine = H100,
    settings: Settings | None = None,
    mutate: Callable[[str], Kernel] | None = None,
) -> Decision:
    """The gate on an emulated target (80, 90, 100) or "gpu".

    Args:
        machine: the GPU that emulated launches are planned for.
        mutate: name of a kernel -> the kernel to run in its place.
    """
    made = Decision.empty(call.rows)
    if place == GPU:
        _on_gpu(call, made)
    else:
        made.reports = _emulated(int(place), call, made, machine, settings, mutate)
    return made


def _on_gpu(call: Call, made: Decision) -> None:
    def there(side: Side) -> tuple[Tensor, Tensor | None, float, float]:
        return on_gpu(side.x), None if side.bias is None else side.bias.cuda(), side.scale, side.softcap

    results = [x.cuda() for x in (made.token, made.from_teacher, made.jsd)]
    torch.ops.kdkernels_C.gate_.default(
        *there(call.student), *there(call.teacher), call.threshold.cuda(),
        None if call.uniforms is None else call.uniforms.cuda(),
        call.temperature, call.top_k, call.top_p, call.vocab, *results,
    )  # fmt: skip
    for mine, other in zip((made.token, made.from_teacher, made.jsd), results, strict=True):
        mine.copy_(other)


def _emulated(
    target: int,
    call: Call,
    made: Decision,
    machine: Machine,
    settings: Settings | None,
    mutate: Callable[[str], Kernel] | None,
) -> list[Report]:
    memory = GlobalMemory()

    def place(name: str, tensor: Tensor | None, unwritten: bool = False) -> int | None:
        if tensor is None:
            return None
        allocation = memory.add_tensor(tensor, name)
        if unwritten:
            allocation.poison()
        return allocation.first

    def side(name: str, given: Side) -> _Side:
        bias = place(f"{name} bias", given.bias)
        return _Side(place(name, given.x), given.x.stride(0), bias, given.scale, given.softcap)

    made_here = {"token": made.token, "from_teacher": made.from_teacher, "jsd": made.jsd}
    given = _Call(
        side("student", call.student), side("teacher", call.teacher),
        DTYPES[call.student.x.dtype], DTYPES[call.teacher.x.dtype], call.rows, call.vocab,
        place("threshold", call.threshold), place("uniforms", call.uniforms),
        call.temperature, call.top_k, call.top_p, *(place(name, x, True) for name, x in made_here.items()),
    )  # fmt: skip
    size = _library().kdkernels_gate_scratch_bytes(ctypes.byref(given), ctypes.byref(machine))
    scratch = place("scratch", torch.empty(size, dtype=torch.uint8), True)
    assert scratch is not None
    reports = []
    for launch in plan(given, scratch, machine):
        chosen = mutate(launch.kernel) if mutate else cuda_topk.kernel(target, launch.kernel)
        reports.append(run(chosen, launch.grid, launch.threads, [launch.arguments], memory=memory, settings=settings))
    return reports


def load_ratio(reports: Iterable[Report], call: Call) -> float:
    """Bytes of loaded sectors relative to both operands once."""
    return sum(report.load_sectors + report.atomic_sectors for report in reports) * 32 / call.least_bytes
