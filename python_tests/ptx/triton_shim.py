"""Runs Triton launches on the emulator: what a test puts in the place of `kdkernels.triton.launch.start`.

The kernel is compiled for the chosen target with the specialisation that Triton's JIT would choose for these very
arguments, and its PTX is executed on the CPU tensors, in place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .compile import Compiled, compile_triton
from .launch import Settings, run
from .memory import Allocation, GlobalMemory
from .parser import Kernel, parse
from .report import Report


class Emulator:
    """Serves launches for `target` (80, 90 or 100); one `Report` per launch in `reports`.

    `mutate` changes the PTX text before it is executed. Inside `with emulator.poison():` tensors made by torch.empty
    and its kin count as unwritten until a kernel (or torch) writes them, and reading them is a fault.
    """

    def __init__(
        self, target: int = 90, settings: Settings | None = None, mutate: Callable[[str], str] | None = None
    ) -> None:
        self.target, self.settings, self.mutate = target, settings or Settings(), mutate
        self.reports: list[Report] = []
        self.compiled: list[Compiled] = []
        self._parsed: dict[str, Kernel] = {}
        self._watch: _Watch | None = None

    def start(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """Compiles and executes one launch. Raises PTXError for what the program does wrong or the emulator lacks."""
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                raise ValueError(f"{name} is on {value.device}; the emulator serves CPU tensors")
        compiled = compile_triton(kernel, arguments, options, self.target)
        memory = _Memory(self._watch, compiled.runtime)
        sizes = (*grid, 1, 1)[:3]
        values = [arguments[name] for name in compiled.runtime]
        if compiled.global_scratch:
            ctas = sizes[0] * sizes[1] * sizes[2]
            values.append(np.zeros(compiled.global_scratch * ctas, np.uint8))
        report = run(
            self._kernel(compiled.ptx),
            (sizes[0] * compiled.cluster, *sizes[1:]),
            compiled.threads,
            values,
            shared=compiled.shared,
            settings=self.settings,
            memory=memory,
        )
        report.target = self.target
        self.reports.append(report)
        self.compiled.append(compiled)

    def _kernel(self, text: str) -> Kernel:
        text = self.mutate(text) if self.mutate else text
        if text not in self._parsed:
            self._parsed[text] = parse(text)
        return self._parsed[text]

    @contextmanager
    def poison(self) -> Iterator[None]:
        """Watches torch for tensors that nothing has written."""
        self._watch = _Watch()
        try:
            with self._watch.active():
                yield
        finally:
            self._watch = None


class _Memory(GlobalMemory):
    """Global memory whose allocations have the names of the Triton parameters, and know what is unwritten."""

    def __init__(self, watch: _Watch | None, names: tuple[str, ...]) -> None:
        super().__init__()
        self.watch, self.names = watch, names

    def add_tensor(self, tensor: torch.Tensor, name: str = "") -> Allocation:
        allocation = super().add_tensor(tensor, self._name(name, tensor))
        if self.watch is not None:
            self.watch.apply(tensor, allocation)
        return allocation

    def _name(self, name: str, tensor: torch.Tensor) -> str:
        """`kernel_param_3` is the fourth of the parameters that the compiled kernel takes."""
        number = name.rsplit("_", maxsplit=1)[-1]
        known = number.isdigit() and int(number) < len(self.names)
        return f"{self.names[int(number)] if known else name} {tuple(tensor.shape)}"


@dataclasses.dataclass
class _Storage:
    """Memory that torch.empty made."""

    owner: Any  # keeps the address from being used again
    version: int  # of the tensor when it was made; torch's own in-place operators count it up
    written: np.ndarray[Any, Any]  # bool per byte: what kernels wrote


_MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"))
_METHODS = ("new_empty", "new_empty_strided")


class _Watch:
    """Notes the memory that torch.empty and its kin return: unwritten until a kernel or torch writes it."""

    def __init__(self) -> None:
        self.storages: dict[int, _Storage] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replaces the makers of empty tensors."""
        originals = [(owner, name, getattr(owner, name)) for owner, name in _MAKERS]
        for owner, name, original in originals:
            setattr(owner, name, self._noting(original))
        for name in _METHODS:  # inherited: the replacement hides them
            setattr(torch.Tensor, name, self._noting(getattr(torch.Tensor, name)))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)
            for name in _METHODS:
                delattr(torch.Tensor, name)

    def _noting(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def maker(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor = make(*arguments, **options)
            if tensor.device.type == "cpu" and not tensor.is_inference() and tensor.numel():
                storage = tensor.untyped_storage()
                # Room for the 16-byte units of an allocation at the end.
                written = np.zeros(storage.nbytes() + 32, np.bool_)
                self.storages[storage.data_ptr()] = _Storage(storage, tensor._version, written)
            return tensor

        return maker

    def apply(self, tensor: torch.Tensor, allocation: Allocation) -> None:
        """Lets an allocation share the record of its memory."""
        entry = self.storages.get(tensor.untyped_storage().data_ptr())
        if entry is None or not tensor.numel() or tensor.is_inference():
            return
        if tensor._version != entry.version:
            entry.written[:] = True
            entry.version = tensor._version
        start = (tensor.data_ptr() & ~15) - tensor.untyped_storage().data_ptr()
        allocation.written = entry.written[start : start + len(allocation.bytes)]
