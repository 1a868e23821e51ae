"""Peak memory of one call beyond its inputs, MiB; a program, so that each figure comes from a fresh process.

    python peak.py BACKEND CASE...        one "CASE MiB" line each

Large blocks are mapped one by one (MALLOC_MMAP_THRESHOLD_ in the environment) and given back when freed, so that no
case finds memory that an earlier one has left resident.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd

MIB = 2**20


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(call: Callable[[], Any]) -> float:
    """MiB that ``call`` holds at most beyond what is resident before."""
    kd.memory.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = resident("VmRSS")
    kept = call()
    peak = resident("VmHWM")
    del kept
    return (peak - before) / MIB


def logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Touched memory: [2, rows / 2, vocab]."""
    return torch.empty(2, rows // 2, vocab, dtype=dtype).normal_()


def dense(
    backend: str, dtype: torch.dtype, rows: int = 256, vocab: int = 40000, factor: float = 1.0, **options: Any
) -> Callable[[], Any]:
    """Logits that are a leaf, or (inplace) the result of a computation."""
    student, teacher = logits(rows, vocab, dtype).requires_grad_(), logits(rows, vocab, dtype)
    per_row = torch.linspace(0.5, 1, rows // 2) if options.get("reduction") == "none" else torch.ones(())
    given = student * 1 if options.get("inplace") else student

    def call() -> Any:
        loss = kd.distillation_loss(given, teacher, "jsd", backend=backend, **options)
        value = loss.loss if isinstance(loss, kd.DistillationOutput) else loss
        if not torch.is_grad_enabled():
            return loss
        if given is not student:  # what the computation before it receives
            return torch.autograd.grad(factor * value.sum(), given)
        (factor * value * per_row.to(value.dtype)).sum().backward()
        return given.grad

    return call


def without_gradient(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
    call = dense(backend, dtype)

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def linear(
    backend: str, dtype: torch.dtype, rows: int, chunk_bytes: int, vocab: int = 16000, **options: Any
) -> Callable[[], Any]:
    """Hidden states of 128 and 192, gradients of hidden states and head."""
    hidden, weight = torch.randn(rows, 128, dtype=dtype), torch.randn(vocab, 128, dtype=dtype)
    other = kd.LinearLogits(torch.randn(rows, 192, dtype=dtype), torch.randn(vocab, 192, dtype=dtype))
    student = kd.LinearLogits(hidden.requires_grad_(), weight.requires_grad_())

    def call() -> Any:
        loss = kd.distillation_loss(student, other, "jsd", backend=backend, chunk_bytes=chunk_bytes, **options)
        (0.5 * loss.sum()).backward()
        return hidden.grad, weight.grad

    return call


def compress(backend: str, dtype: torch.dtype, chunk_bytes: int, **options: Any) -> Callable[[], Any]:
    """128 rows, of which the eager backend would hold 350 MiB at once."""
    x = logits(128, 40000, dtype)
    return lambda: kd.compress(x, 16, backend=backend, chunk_bytes=chunk_bytes, **options)


F, B, HALF = torch.float32, torch.bfloat16, torch.float16
CASES: dict[str, Callable[[str], Callable[[], Any]]] = {
    "inplace": lambda b: dense(b, F, inplace=True),
    "inplace-scaled": lambda b: dense(b, F, factor=0.25, inplace=True),
    "inplace-bf16": lambda b: dense(b, B, factor=0.25, inplace=True),
    "inplace-stats": lambda b: dense(b, F, inplace=True, return_stats=True),
    "leaf": lambda b: dense(b, F),
    "leaf-scaled": lambda b: dense(b, F, factor=0.25),
    "leaf-bf16": lambda b: dense(b, B, factor=0.25),
    "leaf-none": lambda b: dense(b, F, factor=0.25, reduction="none"),
    "leaf-none-bf16": lambda b: dense(b, B, reduction="none"),
    "leaf-shift": lambda b: dense(b, F, factor=0.25, shift=True),
    "no-grad": lambda b: without_gradient(b, F),
    "linear-512": lambda b: linear(b, F, 512, 16 * MIB),
    "linear-1536": lambda b: linear(b, F, 1536, 16 * MIB),
    "linear-bf16-512": lambda b: linear(b, B, 512, 16 * MIB),
    "linear-bf16-1536": lambda b: linear(b, B, 1536, 16 * MIB),
    "linear-none-512": lambda b: linear(b, F, 512, 16 * MIB, reduction="none"),
    "linear-none-1536": lambda b: linear(b, F, 1536, 16 * MIB, reduction="none"),
    "draws": lambda b: compress(b, F, 16 * MIB, samples=20),
    "draws-bf16": lambda b: compress(b, B, 16 * MIB, samples=20),
    "draws-small": lambda b: compress(b, B, 8 * MIB, samples=20),
    "topk": lambda b: compress(b, B, 16 * MIB, entropy=True, other_temperatures=[2.0]),
}


def main(backend: str, names: list[str]) -> None:
    """Small calls first: libraries, thread pools and oneDNN's kernels are no part of the figures."""
    torch.set_num_threads(2)
    for dtype in (F, B):
        for factor in (1.0, 0.5):
            dense(backend, dtype, 4, 64, factor)()
        linear(backend, dtype, 8, 1000, vocab=64)()
        linear(backend, dtype, 64, MIB)()
        linear(backend, dtype, 8, 1000, vocab=64, reduction="none")()
        for options in ({"samples": 20}, {"entropy": True, "other_temperatures": [2.0]}):
            kd.compress(logits(8, 64, dtype), 16, backend=backend, **options)
    for name in names:
        call = CASES[name](backend)
        print(name, round(peak_of(call), 2), flush=True)
        del call


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
