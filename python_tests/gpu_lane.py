"""pytest plugin: the tests of the emulated lane, their bodies unchanged, on a real GPU.

    python -m pytest -p python_tests.gpu_lane -m gpu python_tests

In the place of the emulator stands `OnDevice`: it copies the CPU tensors of a launch to the GPU, storage by storage and
so with the same strides, offsets and overlaps, lets Triton launch the kernel there, and copies back. What only an
emulator knows (sectors, instructions) is skipped by name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FILES = "test_triton_"
LEFT_OUT = ("test_triton_budgets",)
"""Files that are about counts throughout."""


class Launch:
    """Stands for the emulator's report of a launch; there is nothing in it."""

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"{name}: only the emulator counts")


class OnDevice:
    """Serves launches on CPU tensors by a device.

    Args:
        device: where the kernels run.
        launch: ``(kernel, grid, arguments, options)``, started there.
    """

    def __init__(self, device: str, launch: Callable[..., None]) -> None:
        self.device, self.launch = torch.device(device), launch
        self.reports: list[Launch] = []

    @property
    def compiled(self) -> Any:
        pytest.skip("compiled: Triton keeps that to itself")

    def poison(self) -> contextlib.AbstractContextManager[None]:
        """Unwritten memory is the emulator's and compute-sanitizer's to find."""
        return contextlib.nullcontext()

    def start(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """A launch as `kdkernels.triton.launch.start` makes one; tensors may share storage."""
        storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        given = {}
        for name, value in arguments.items():
            given[name] = self._moved(value, storages) if isinstance(value, torch.Tensor) else value
        self.launch(kernel, grid, given, options)
        for here, there in storages.values():
            here.copy_(there)  # waits for the kernel
        self.reports.append(Launch())

    def _moved(self, tensor: torch.Tensor, storages: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
            storages[key] = here, here.to(self.device, copy=True)
        there = torch.empty(0, dtype=tensor.dtype, device=self.device)
        moved = storages[key][1].untyped_storage()
        return there.set_(moved, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[arg-type]


def _on_gpu(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
    kernel[grid](**arguments, **options)


def serve(patch: pytest.MonkeyPatch, target: int = 90, settings: Any = None) -> OnDevice:
    """`emulated.serve` on the GPU that there is, whatever the target."""
    import emulated

    import kdkernels.triton
    from kdkernels.triton import launch

    server = OnDevice("cuda", _on_gpu)
    patch.setattr(kdkernels.triton, "obstacle", emulated._float64_only)
    patch.setattr(launch, "architecture", lambda device: torch.cuda.get_device_capability()[0])
    patch.setattr(launch, "start", server.start)
    return server


def pytest_configure(config: pytest.Config) -> None:
    """The tests' own ``from emulated import serve`` finds the one above."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("python_tests.gpu_lane: torch sees no GPU")
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import emulated

    emulated.serve = serve  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The emulated lane's tests are tests of the GPU."""
    for item in items:
        name = item.path.stem
        if name.startswith(FILES) and name not in LEFT_OUT:
            item.add_marker("gpu")
