"""Top-k on a GPU as tests call it: the launches that the native library plans, executed by the emulator, or the GPU."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ptx import Settings, parse, run
from ptx.compile import kept_ptx, nvcc
from ptx.harness import GPU, on_gpu
from ptx.memory import GlobalMemory
from ptx.parser import Kernel
from ptx.report import Report
from torch import Tensor

from kdkernels import native

SOURCES = Path(__file__).parents[1] / "csrc"
FLAGS = (f"-I{SOURCES}",)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAMES = ("f32", "f16", "bf16")
MULTIPROCESSORS = 132
"""Of the GPU that the launches are planned for: an H100's."""
UNTOUCHED = 77.0
"""What outputs hold before."""


def obstacle() -> str:
    """Why the launches cannot be had here; empty if they can."""
    if nvcc() is None:
        return "no nvcc here"
    if not native.available():
        return native.reason()
    return "" if native.facts()["nvcc"] else "kdkernels was built without nvcc"


class _Side(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


class _Call(ctypes.Structure):
    """`kd_topk` in csrc/topk.h."""

    _fields_ = (
        ("logits", _Side),
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("other_temperatures", ctypes.POINTER(ctypes.c_double)),
        ("others", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("log_probs", ctypes.c_void_p),
        ("log_tail", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("other_tails", ctypes.c_void_p),
    )


_VISIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Launch:
    """One kernel of the plan."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: bytes


@functools.cache
def _library() -> ctypes.CDLL:
    why = obstacle()
    if why:
        raise RuntimeError(why)
    library = ctypes.CDLL(str(native.LIBRARY))
    library.kdkernels_topk_scratch_bytes.restype = ctypes.c_size_t
    return library


def plan(call: _Call, scratch: int, multiprocessors: int) -> list[Launch]:
    """The launches of the native launcher for that call, with scratch at that address."""
    return planned(_library().kdkernels_topk_plan, ctypes.byref(call), ctypes.c_void_p(scratch), multiprocessors)


def planned(planner: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """The launches that a planner of the native library visits."""
    launches: list[Launch] = []

    @_VISIT
    def visit(kernel: bytes, x: int, y: int, threads: int, shared: int, arguments: int, size: int) -> None:
        launches.append(Launch(kernel.decode(), (x, y, 1), threads, shared, ctypes.string_at(arguments, size)))

    planner(*arguments, visit)
    return launches


@functools.cache
def ptx(target: int, family: str = "topk") -> str:
    """Of all kernels."""
    sources = [*sorted(SOURCES.glob(f"cuda/*{family}*")), SOURCES / "cuda/numbers.cuh", *SOURCES.glob("*.h")]
    return kept_ptx(SOURCES / f"cuda/{family}.cu", target, FLAGS, sources, SOURCES.parent / "build/ptx")


def kernel_text(target: int, name: str) -> str:
    """The module with that kernel alone; kd_<family>_..."""
    text = ptx(target, name.split("_")[1])
    parts = re.split(r"(?m)^(?=\t?\.visible \.entry |\.entry )", text)
    (own,) = [part for part in parts[1:] if re.match(rf"\s*(?:\.visible )?\.entry {name}\(", part)]
    return parts[0] + own


@functools.cache
def kernel(target: int, name: str) -> Kernel:
    """Parsed once."""
    return parse(kernel_text(target, name))


@dataclass
class Head:
    """How stored numbers become logits, and at which temperatures."""

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    others: tuple[float, ...] = ()
    entropy: bool = False


@dataclass
class Kept:
    """What a call writes; and, from the emulator, what it cost."""

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    entropy: Tensor | None
    other_tails: Tensor | None
    reports: list[Report] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int, k: int, head: Head) -> Kept:
        def numbers(*shape: int) -> Tensor:
            return torch.full(shape, UNTOUCHED)

        return cls(
            torch.full((rows, k), int(UNTOUCHED), dtype=torch.int32),
            numbers(rows, k),
            numbers(rows),
            numbers(rows) if head.entropy else None,
            numbers(rows, len(head.others)) if head.others else None,
        )

    def tensors(self) -> list[Tensor | None]:
        """In the order of the schema."""
        return [self.ids, self.log_probs, self.log_tail, self.entropy, self.other_tails]


def topk(
    place: int | str,
    logits: Tensor,
    k: int,
    head: Head | None = None,
    *,
    vocab: int | None = None,
    multiprocessors: int = MULTIPROCESSORS,
    settings: Settings | None = None,
    mutate: Callable[[str], Kernel] | None = None,
) -> Kept:
    """Top-k of CPU logits ``[N, >= vocab]`` on an emulated target (80, 90, 100) or "gpu".

    Args:
        multiprocessors: for how large a GPU the emulated launches are planned: 1 gives each row to one block.
        mutate: name of a kernel -> the kernel to run in its place.
    """
    head, vocab = head or Head(), vocab or logits.shape[1]
    kept = Kept.empty(len(logits), k, head)
    if place == GPU:
        _on_gpu(logits, k, head, vocab, kept)
    else:
        kept.reports = _emulated(int(place), logits, k, head, vocab, kept, multiprocessors, settings, mutate)
    return kept


def _on_gpu(logits: Tensor, k: int, head: Head, vocab: int, kept: Kept) -> None:
    there = [None if x is None else x.cuda() for x in kept.tensors()]
    torch.ops.kdkernels_C.topk_.default(
        on_gpu(logits), None if head.bias is None else head.bias.cuda(),
        head.scale, head.softcap, head.temperature, vocab, k, list(head.others), *there,
    )  # fmt: skip
    for mine, other in zip(kept.tensors(), there, strict=True):
        if mine is not None:
            mine.copy_(other)


def _emulated(
    target: int,
    logits: Tensor,
    k: int,
    head: Head,
    vocab: int,
    kept: Kept,
    multiprocessors: int,
    settings: Settings | None,
    mutate: Callable[[str], Kernel] | None,
) -> list[Report]:
    memory = GlobalMemory()

    def place(name: str, tensor: Tensor | None, unwritten: bool = True) -> int | None:
        if tensor is None:
            return None
        allocation = memory.add_tensor(tensor, name)
        if unwritten:
            allocation.poison()
        return allocation.first

    names = ("ids", "log_probs", "log_tail", "entropy", "other_tails")
    side = _Side(
        place("logits", logits, False),
        logits.stride(0),
        place("bias", head.bias, False),
        head.scale,
        head.softcap,
    )
    others = (ctypes.c_double * max(1, len(head.others)))(*head.others)
    outputs = [place(name, tensor) for name, tensor in zip(names, kept.tensors(), strict=True)]
    call = _Call(
        side, DTYPES[logits.dtype], len(logits), vocab, k, head.temperature, others, len(head.others), *outputs
    )
    size = _library().kdkernels_topk_scratch_bytes(ctypes.byref(call), multiprocessors)
    scratch = place("scratch", torch.empty(max(size, 1), dtype=torch.uint8))
    assert scratch is not None
    reports = []
    for launch in plan(call, scratch, multiprocessors):
        chosen = mutate(launch.kernel) if mutate else kernel(target, launch.kernel)
        arguments: Sequence[Any] = [launch.arguments]
        reports.append(
            run(chosen, launch.grid, launch.threads, arguments, shared=launch.shared, memory=memory, settings=settings)
        )
    return reports


def load_ratio(reports: Iterable[Report], logits: Tensor, vocab: int) -> float:
    """Bytes of loaded sectors relative to the rows' own."""
    loaded = sum(report.load_sectors + report.atomic_sectors for report in reports) * 32
    return loaded / (len(logits) * vocab * logits.element_size())
