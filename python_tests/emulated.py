"""The Triton backend on CPU tensors: its launches go to the PTX emulator, compiled for a chosen GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from ptx import Settings
from ptx.triton_shim import Emulator

import kdkernels.triton
from kdkernels.triton import launch

TARGETS = (80, 90, 100)


@functools.cache
def emulator(target: int, settings: Settings | None = None) -> Emulator:
    """One for all tests, so that each kernel is compiled and parsed once."""
    return Emulator(target, settings)


def _float64_only(device: torch.device, dtype: torch.dtype) -> str:
    return "" if dtype != torch.float64 else "serves float32, bfloat16 and float16"


def serve(patch: pytest.MonkeyPatch, target: int = 90, settings: Settings | None = None) -> Emulator:
    """Until the patch is undone, CPU tensors count as a GPU's of this compute capability; the emulator, emptied."""
    chosen = emulator(target, settings)
    chosen.reports.clear()
    chosen.compiled.clear()
    patch.setattr(kdkernels.triton, "obstacle", _float64_only)
    patch.setattr(launch, "architecture", lambda device: target // 10)
    patch.setattr(launch, "start", chosen.start)
    return chosen
