"""Counts of one loss, forward and backward, from the kernels as they are compiled for a GPU.

The contestant's own host code runs on CPU tensors; each of its Triton launches goes to the emulator
(`python_tests.ptx`), which compiles the kernel for the target and executes the PTX. What torch does between the
launches cannot be executed here, as its CUDA kernels are not at hand: an operation on logits ``[rows, vocabulary]``
counts with the bytes it cannot do without, every operand read once and every result written once, and with no
instructions. Matrix products are not counted, on any side.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

SECTOR = 32
"""Bytes."""
ROWS = 2
"""Rows that are counted. Rows are alike: R of them cost R times as much. (One row would be a constant to Triton.)"""
WIDTH = 1024
"""A tensor ``[ROWS, >= WIDTH]`` is one of logits."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"}
OVERWRITES = {"aten::copy_", "aten::zero_", "aten::fill_"}
ALLOCATES = ("aten::empty", "aten::new_empty")


@dataclass(frozen=True)
class Step:
    """Launches of one kernel, or calls of one torch operation; figures per (student, teacher) pair.

    Attributes:
        name: of the kernel or operation.
        source: "compiled" (counted by executing the compiled kernel) or "torch" (least bytes).
        calls: launches or calls that were counted.
        load_sectors, store_sectors: of 32 bytes, as requested by warps.
        first_sectors: of the loaded ones, those that no earlier load of the launch can have brought into a cache.
        thread_instructions, warp_instructions: PTX instructions; 0 for torch.
        special: operations of the special-function units, by threads; 0 for torch.
    """

    name: str
    source: str
    calls: int
    load_sectors: float
    store_sectors: float
    first_sectors: float
    thread_instructions: float = 0.0
    warp_instructions: float = 0.0
    special: float = 0.0

    def __add__(self, other: Step) -> Step:
        """More calls of the same."""
        return Step(self.name, self.source, *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[2:]))


class Recorder(TorchDispatchMode):
    """Serves Triton launches by an emulator; notes them, and torch operations on logits, as steps.

    Custom operators are looked at from outside only: of `kdkernels`' their launches are counted, and there is nothing
    else on logits in them.

    Args:
        target: compute capability times ten.
        pairs: (student, teacher) pairs of logits in the call.
    """

    def __init__(self, target: int, pairs: int) -> None:
        super().__init__()
        shim = importlib.import_module("python_tests.ptx.triton_shim")
        self.emulator = shim.Emulator(target, shim.Settings(check_races=False))
        self.pairs, self.quiet = pairs, False
        self.steps: dict[str, Step] = {}

    def start(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """A launch, as `kdkernels.triton.launch.start` makes one; one that gets no logits is not noted."""
        with _disable_current_modes():
            self.emulator.start(kernel, grid, arguments, options)
        self.note(kernel.__name__, self.emulator.reports[-1], [x for x in arguments.values() if isinstance(x, Tensor)])

    def note(self, name: str, found: Any, given: list[Tensor]) -> None:
        """Adds the report of a kernel that was given these tensors."""
        loads = found.load_sectors + found.atomic_sectors
        operands = {x.data_ptr(): logits_bytes(x) for x in given}
        if not any(operands.values()):
            return
        counts = (
            loads,
            found.store_sectors + found.atomic_sectors,
            min(loads, sum(operands.values()) // SECTOR),
            found.thread_instructions,
            found.warp_instructions,
            found.special,
        )
        self._add(Step(name, "compiled", 1, *(count / self.pairs for count in counts)))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Torch operations in here are none that a GPU would do."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        skipped = self.quiet or not name.startswith("aten::") or name in PRODUCTS or name.startswith(ALLOCATES)
        if not skipped and not _is_view(func._schema):
            read, written = moved_bytes(func._schema, args, kwargs, result)
            if read or written:
                each = 1.0 / (SECTOR * self.pairs)
                self._add(Step(name.removeprefix("aten::"), "torch", 1, read * each, written * each, read * each))
        return result

    def _add(self, step: Step) -> None:
        known = self.steps.get(step.name)
        self.steps[step.name] = step if known is None else known + step


def _is_view(schema: Any) -> bool:
    """Returns its argument's memory without writing to it."""
    returned = [r.alias_info for r in schema.returns]
    return any(info is not None and not info.is_write for info in returned)


def moved_bytes(schema: Any, args: Any, kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """Least bytes of logits that a torch operation reads and writes; what is overwritten unread is not read."""
    read = written = 0
    shape_only = schema.name.endswith("_like") or schema.name.startswith("aten::new_")
    given = [*zip(schema.arguments, args, strict=False)]
    given += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
    for argument, value in given:
        size = logits_bytes(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += size
            read += 0 if argument.is_out or schema.name in OVERWRITES else size
        elif not shape_only:
            read += size
    outputs = result if isinstance(result, tuple | list) else [result]
    new = [x for x, returned in zip(outputs, schema.returns, strict=False) if returned.alias_info is None]
    return read, written + sum(logits_bytes(x) for x in new)


def logits_bytes(value: Any) -> int:
    """Bytes of a tensor (or of those in a list) that is as large as logits, else 0; a broadcast one has few."""
    if isinstance(value, list | tuple):
        return sum(logits_bytes(x) for x in value)
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != ROWS or value.shape[1] < WIDTH:
        return 0
    return 0 if 0 in value.stride() else value.numel() * value.element_size()


class Launched:
    """Stands in for a `triton.JITFunction` in a rival's module: its launches go to a recorder."""

    def __init__(self, kernel: Any, recorder: Recorder) -> None:
        self.kernel, self.recorder = kernel, recorder
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in [*kwargs] if name not in self.signature.parameters}
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            options.setdefault("enable_fp_fusion", True)  # Triton's default up to 3.9, which 3.9 announces as such
            self.recorder.start(self.kernel, tuple(grid), dict(bound.arguments), options)

        return launch
