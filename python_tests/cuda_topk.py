"""Top-k on a GPU as tests call it: the launches that the native library plans, executed by the emulator, or the GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ptx import Settings, compile_cuda, parse, run
from ptx.compile import nvcc
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
    launches: list[Launch] = []

    @_VISIT
    def visit(kernel: bytes, x: int, y: int, threads: int, shared: int, arguments: int, size: int) -> None:
        launches.append(Launch(kernel.decode(), (x, y, 1), threads, shared, ctypes.string_at(arguments, size)))

    _library().kdkernels_topk_plan(ctypes.byref(call), ctypes.c_void_p(scratch), multiprocessors, visit)
    return launches


@functools.cache
def ptx(target: int) -> str:
    """Of all kernels. Compiled once for all test processes, as it takes seconds: build/ptx keeps it."""
    sources = [*sorted(SOURCES.glob("cuda/*topk*")), SOURCES / "cuda/numbers.cuh", *SOURCES.glob("*.h")]
    stamp = hashlib.sha256(b"\0".join([str(nvcc()).encode(), *(path.read_bytes() for path in sources)]))
    kept = SOURCES.parent / "build/ptx" / f"topk-{target}-{stamp.hexdigest()[:16]}.ptx"
    if not kept.is_file():
        text = compile_cuda(SOURCES / "cuda/topk.cu", target, FLAGS)
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.replace(kept)
    return kept.read_text()


def kernel_text(target: int, name: str) -> str:
    """The module with that kernel alone."""
    text = ptx(target)
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


def select(logits: Tensor, k: int, head: Head | None = None) -> dict[str, Tensor]:
    """The definition, in float64: stable sort, log-softmax over the row, tails summed from their own entries.

    Entries are compared before the soft cap, which leaves their order alone, in float32 as the leaf does.
    """
    head = head or Head()
    shift = torch.zeros(()) if head.bias is None else head.bias[: logits.shape[1]]
    compared = head.scale * (logits.float() + shift) + 0.0  # -0 is 0
    z = compared.double()
    if head.softcap:  # it makes finite numbers of infinite ones
        compared = compared.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
        z = head.softcap * torch.tanh(z / head.softcap)
    order = compared.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bad = compared.isnan().any(-1) | (compared == torch.inf).any(-1) | (compared == -torch.inf).all(-1)
    chosen = torch.zeros(z.shape, dtype=torch.bool).scatter_(1, order, True) & (compared > -torch.inf)
    ids = torch.where(chosen.gather(1, order), order, torch.iinfo(torch.int64).max).sort(-1).values
    there = ids < z.shape[1]
    ids = torch.where(there & ~bad[:, None], ids, -1)

    def log_p(temperature: float) -> Tensor:
        return torch.log_softmax(z / temperature, -1)

    def tail(temperature: float) -> Tensor:
        return torch.logsumexp(log_p(temperature).masked_fill(chosen, -torch.inf), -1)

    lp = log_p(head.temperature)
    kept = torch.where(there, lp.gather(1, ids.clamp(0)), -torch.inf)
    result = {
        "ids": ids,
        "log_probs": torch.where(bad[:, None], torch.nan, kept),
        "log_tail": torch.where(bad, torch.nan, tail(head.temperature)),
        "entropy": -(lp.exp() * lp).nan_to_num(nan=0.0).sum(-1).masked_fill(bad, torch.nan),
    }
    if head.others:
        columns = [torch.where(bad, torch.nan, tail(t)) for t in head.others]
        result["other_tails"] = torch.stack(columns, -1)
    return result


def assert_right(kept: Kept, logits: Tensor, k: int, head: Head | None = None, tolerance: float = 2e-6) -> None:
    """Ids as defined; every other number within `tolerance`, relative where it exceeds 1 in size. With a soft cap come
    4 units in the last place of the largest logit, as tanh is within 2."""
    expected, head = select(logits, k, head), head or Head()
    least = min(head.temperature, *head.others) if head.others else head.temperature
    tolerance += 4 * 2.0**-24 * head.softcap / least
    wrong = (kept.ids.long() != expected["ids"]).any(-1).nonzero().flatten().tolist()
    assert not wrong, f"ids of rows {wrong[:5]}: {kept.ids[wrong[:1]]}, not {expected['ids'][wrong[:1]]}"
    for name in ("log_probs", "log_tail", "entropy", "other_tails"):
        found = getattr(kept, name)
        if found is not None:
            close(name, found, expected[name], tolerance)


def close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """NaN and infinities (of float32) in the same places, the rest within the tolerance."""
    infinite = expected.float().isinf()
    a, b = found.double().numpy(), torch.where(infinite, expected.sign() * torch.inf, expected).numpy()
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, np.abs(a - b) / np.maximum(1, np.abs(b)))
    worst = float(np.nan_to_num(error, nan=np.inf).max(initial=0))
    assert worst <= tolerance, f"{name}: off by {worst:.3g}"
