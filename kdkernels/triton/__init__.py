"""Triton: jit code and its launches. Importing this package does not import triton; its modules do."""

from __future__ import annotations

import functools
import importlib.metadata
import re

import torch

OLDEST = (3, 5)
"""Triton below lacks tuples of values in device code and reductions of several tensors as used here."""
CAPABILITY = (8, 0)
"""NVIDIA GPUs below have no packed conversion to bfloat16."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require() -> None:
    """Raises ImportError, with the remedy, where triton cannot be imported."""
    try:
        import triton  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        message = f"kdkernels.triton needs triton, which does not import here ({error}); pip install triton, or"
        raise ImportError(f'{message} use backend="cpp" or "eager"') from error


@functools.cache
def version() -> str:
    """Of the installed triton, as text; empty without one."""
    for package in ("triton", "pytorch-triton", "triton-nightly"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot serve logits of this device and dtype; empty where they can."""
    if device.type != "cuda":
        return f"serves CUDA tensors, these are on {device}"
    if dtype not in _DTYPES:
        return f"serves float32, bfloat16 and float16, not {dtype}: float64 has no fast path on a GPU, use eager"
    return _of_triton() or _of_gpu(device)


def _of_triton() -> str:
    installed = version()
    if not installed:
        return "triton is not installed: pip install 'kdkernels[triton]'"
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed)[:2])
    if numbers < OLDEST:
        return f"triton {installed} is too old: pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'"
    try:
        require()
    except ImportError as error:
        return str(error)
    return ""


def _of_gpu(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs, this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no GPU (torch.cuda.is_available() is False)"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {found[0]}.{found[1]}, {CAPABILITY[0]}.{CAPABILITY[1]} is needed"
    return ""
