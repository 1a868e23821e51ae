"""Runs Triton launches on the emulator: what a test puts in the place of `kdkernels.triton.launch.start`.

The kernel is compiled for the chosen target with the specialisation that Triton's JIT would choose for these very
arguments, and its PTX is executed on the CPU tensors, in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
            with self._watch:
                yield
        finally:
            self._watch = None


class _Memory(GlobalMemory):
    """Global memory whose allocations have the names of the Triton parameters, and know what is unwritten."""

    def __init__(self, watch: _Watch | None, names: tuple[str, ...]) -> None:
        super().__init__()
        self.watch, self.names = watch, iter(names)

    def add_tensor(self, tensor: torch.Tensor, name: str = "") -> Allocation:
        allocation = super().add_tensor(tensor, self._name(name, tensor))
        if self.watch is not None:
            self.watch.apply(tensor, allocation)
        return allocation

    @staticmethod
    def _name(name: str, tensor: torch.Tensor) -> str:
        return f"{name} {tuple(tensor.shape)}"


@dataclasses.dataclass
class _Storage:
    """Which bytes of a watched storage are written."""

    owner: Any
    written: np.ndarray[Any, Any]


_EMPTY = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}


class _Watch(TorchDispatchMode):
    """Notes the storages that torch.empty made and that no operator has written."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, _Storage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.name in _EMPTY:
            storage = result.untyped_storage()
            # A byte more at each end, for the 16-byte units of an allocation.
            self.storages[storage.data_ptr()] = _Storage(storage, np.zeros(storage.nbytes() + 32, np.bool_))
            return result
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._written(value)
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._written(kwargs[argument.name])
        return result

    def _written(self, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else [value]:
            entry = self._find(tensor) if isinstance(tensor, torch.Tensor) else None
            if entry is not None:
                entry.written[:] = True

    def _find(self, tensor: torch.Tensor) -> _Storage | None:
        storage = tensor.untyped_storage()
        entry = self.storages.get(storage.data_ptr())
        return entry if entry is not None and entry.owner.nbytes() == storage.nbytes() else None

    def apply(self, tensor: torch.Tensor, allocation: Allocation) -> None:
        """Lets an allocation share the storage's record."""
        entry = self._find(tensor)
        if entry is None or not tensor.numel():
            return
        start = (tensor.data_ptr() & ~15) - tensor.untyped_storage().data_ptr()
        allocation.written = entry.written[start : start + len(allocation.bytes)]
