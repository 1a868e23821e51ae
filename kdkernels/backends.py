"""Which implementation serves a call, and why.

The choice: the ``backend`` argument, then the environment variable ``KDKERNELS_BACKEND``, then the first backend of
the table that can. An explicit choice that cannot serve is an error with the reason, never a silent substitute.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from kdkernels import native, onchip, triton
from kdkernels._checks import fail, require_choice

BACKENDS = ("eager", "cpp", "triton", "cuda")
_TABLE = {"cpu": ("cpp", "eager"), "cuda": ("cuda", "triton", "eager")}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


SELECTION, DRAWS = "topk", "draw"
"""What `kdkernels.compress` asks for in place of an element function."""
GATE = "gate"
"""What `kdkernels.switch_gate` asks for."""


class Verdict(NamedTuple):
    """Whether a backend can serve, and the reason."""

    backend: str
    serves: bool
    reason: str


def judge(backend: str, device: torch.device, dtype: torch.dtype, kernel: str, sparse: bool = False) -> Verdict:
    """Whether ``backend`` computes the element function ``kernel`` for logits of this device and dtype.

    ``sparse``: against a sparse teacher.
    """
    if backend == "eager":
        return Verdict(backend, True, "plain torch, any device")
    if kernel == GATE:
        return _judge_gate(backend, device, dtype)
    if kernel in (SELECTION, DRAWS):
        return _judge_selection(backend, device, dtype, kernel)
    if backend == "triton":
        why = triton.obstacle(device, dtype)
        return Verdict(backend, not why, why or f"Triton kernels, {triton.version()}")
    if backend == "cuda" and sparse:
        return Verdict(backend, False, "the CUDA kernels of the losses take no sparse teachers")
    if backend == "cuda":
        why = onchip.obstacle(device, dtype, kernel)
        return Verdict(backend, not why, why or "CUDA kernels for rows that no cache keeps, Triton kernels for others")
    if device.type != "cpu":
        return Verdict(backend, False, f"serves CPU tensors, these are on {device}")
    if dtype not in _DTYPES:
        return Verdict(backend, False, f"serves float32, bfloat16, float16 and float64, not {dtype}")
    if not native.available():
        return Verdict(backend, False, native.reason())
    if native.kernel_id(kernel) is None:
        return Verdict(backend, False, native.why_not(kernel))
    if sparse and native.why_not_sparse():
        return Verdict(backend, False, native.why_not_sparse())
    return Verdict(backend, True, f"native kernels, {native.isa()}")


def _judge_selection(backend: str, device: torch.device, dtype: torch.dtype, kernel: str) -> Verdict:
    """Whether ``backend`` selects the largest entries of rows, or draws from them."""
    if backend == "cuda" and kernel == SELECTION:
        why = _why_not_cuda("topk_", device, dtype)
        return Verdict(backend, not why, why or "CUDA kernels of selection")
    return _judge_cpu(backend, device, dtype, kernel, native.why_not_topk)


def _judge_gate(backend: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Whether ``backend`` decides who speaks, for logits of this device and dtype."""
    if backend == "triton":
        why = triton.obstacle(device, dtype)
        return Verdict(backend, not why, why or f"Triton kernels, {triton.version()}")
    if backend == "cuda":
        why = _why_not_cuda("gate_", device, dtype)
        return Verdict(backend, not why, why or "CUDA kernels of the gate")
    return _judge_cpu(backend, device, dtype, GATE, native.why_not_gate)


def _judge_cpu(
    backend: str, device: torch.device, dtype: torch.dtype, kernel: str, why_not: Callable[[], str]
) -> Verdict:
    """Whether ``backend`` is the native CPU one and its kernels serve; ``why_not`` says what this build lacks."""
    if backend != "cpp":
        return Verdict(backend, False, f"the {backend} kernels do not include {kernel!r}")
    if device.type != "cpu":
        return Verdict(backend, False, f"serves CPU tensors, these are on {device}")
    why = why_not()
    if not why and dtype not in _DTYPES:
        why = f"serves float32, bfloat16, float16 and float64, not {dtype}"
    return Verdict(backend, not why, why or f"native kernels, {native.isa()}")


def _why_not_cuda(leaf: str, device: torch.device, dtype: torch.dtype) -> str:
    """Empty where a leaf's CUDA C++ kernels serve logits of this device and dtype."""
    if device.type != "cuda":
        return f"serves CUDA tensors, these are on {device}"
    if dtype not in _DTYPES[:3]:
        return f"serves float32, bfloat16 and float16, not {dtype}"
    if not native.available():
        return native.reason()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels_C::{leaf}", "CUDA"):
        return "kdkernels was built without CUDA kernels: install the CUDA toolkit (nvcc) and rebuild"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found < triton.CAPABILITY:
        return f"needs compute capability 8.0, this GPU has {found[0]}.{found[1]}"
    return native.why_not_on_gpu(found, triton.CAPABILITY)


def survey(device: torch.device, dtype: torch.dtype, kernel: str, sparse: bool = False) -> list[Verdict]:
    """The verdict on every backend, in the order in which ``auto`` tries them on this device."""
    order = _TABLE.get(device.type, ("eager",))
    return [judge(name, device, dtype, kernel, sparse) for name in (*order, *(b for b in BACKENDS if b not in order))]


def choose(requested: str, device: torch.device, dtype: torch.dtype, kernel: str, sparse: bool = False) -> str:
    """The backend that serves, or an error that says why the requested one cannot."""
    name = requested
    if name == "auto":
        name = os.environ.get("KDKERNELS_BACKEND", "auto") or "auto"
    require_choice("backend", name, ("auto", *BACKENDS))
    if name == "auto":
        order = _TABLE.get(device.type, ("eager",))
        return next(name for name in order if judge(name, device, dtype, kernel, sparse).serves)
    verdict = judge(name, device, dtype, kernel, sparse)
    if not verdict.serves:
        fail(
            ValueError,
            "backend",
            repr(name),
            "a backend that can serve this call",
            f"{verdict.reason}; use backend='auto'",
        )
    return name
