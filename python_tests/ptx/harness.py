"""One test body for the emulator and for a real GPU.

A test takes the fixture's `Harness` and launches through it; results are in the CPU tensors it gave, either way::

    @pytest.fixture(params=places())
    def harness(request):
        return Harness(request.param)

    def test_rows(harness):
        report = harness.triton(kernel, (rows, 1, 1), arguments, options)
        if report is not None:  # counts exist on the emulator only
            assert report.load_sectors == ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .compile import TARGETS, compile_cuda
from .launch import Settings, run
from .report import Report
from .triton_shim import Emulator

GPU = "gpu"


def places(*targets: int) -> list[Any]:
    """Parameters of a fixture: emulated targets (all of them by default) and, marked `gpu`, the GPU of this machine."""
    return [*(targets or TARGETS), pytest.param(GPU, marks=pytest.mark.gpu)]


class Harness:
    """Launches for one place: a target of the emulator (80, 90, 100) or "gpu"."""

    def __init__(self, place: int | str, settings: Settings | None = None) -> None:
        self.place, self.settings = place, settings or Settings()
        self.emulator = None if place == GPU else Emulator(int(place), self.settings)

    def triton(
        self, kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], options: dict[str, Any]
    ) -> Report | None:
        """Launches a `triton.JITFunction` on CPU tensors, in place. The counts; None on a GPU."""
        if self.emulator is not None:
            self.emulator.start(kernel, grid, arguments, options)
            return self.emulator.reports[-1]
        copies = {name: on_gpu(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        kernel[grid](**arguments | copies, **options)
        for name, copy in copies.items():
            arguments[name].copy_(copy)
        return None

    def cuda(
        self,
        source: str | Path,
        name: str,
        grid: Sequence[int],
        block: Sequence[int] | int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        flags: Sequence[str] = (),
    ) -> Report:
        """Compiles CUDA C++ with nvcc for the target and launches the kernel `name` on tensors and numbers, in place.

        `name` as in the PTX: declare kernels `extern "C"`. `shared`: bytes of dynamic shared memory. On a GPU such
        kernels run through the library that they are built into; asking here is an error.
        """
        if self.emulator is None:
            raise RuntimeError("CUDA sources run on a GPU through the package that is built from them")
        text = compile_cuda(source, self.emulator.target, tuple(flags))
        report = run(text, grid, block, arguments, name=name, shared=shared, settings=self.settings)
        report.target = self.emulator.target
        return report


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the GPU with the same strides, gaps and alignment to 16 bytes."""
    extent = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    shift = tensor.data_ptr() % 16 // tensor.element_size()
    storage = torch.empty(extent + shift, dtype=tensor.dtype, device="cuda")
    return storage.as_strided(tensor.shape, tensor.stride(), shift).copy_(tensor)
