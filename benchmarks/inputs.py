"""Tensors of a case, and how a contestant is run on them: one forward, one backward.

Dense logits arrive as a model's output does: a tensor with a history, not a leaf, whose gradient flows on. `Produce`
stands for the model; it hands out the logits without a copy and keeps the gradient that comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLUSH_BYTES = 96 * 2**20
"""Read between samples so that none starts with its inputs in the last cache (32 MiB on the machine in README)."""


class Produce(torch.autograd.Function):
    """Hands out a buffer as the output of a differentiable function; its backward keeps the gradient."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, buffer: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        ctx.keep = keep
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.keep(gradient)
        return None, None, None


class DenseInputs:
    """Student and teacher logits ``[N, V]``.

    Args:
        case: sizes and dtype.
        seed: of the random numbers.
        pristine: keep a copy of the student's logits, for contestants that overwrite them.
    """

    def __init__(self, case: Case, seed: int = 0, pristine: bool = True) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[case.dtype]
        self.teacher = torch.empty(case.N, case.V, dtype=dtype).normal_(0, 2, generator=generator)
        self.buffer = torch.empty(case.N, case.V, dtype=dtype).normal_(0, 1, generator=generator)
        for row, noise in zip(self.teacher, self.buffer, strict=True):  # correlated, as a distilled student is
            noise.add_(row)
        self._start(pristine)

    @classmethod
    def of(cls, case: Case, student: Tensor, teacher: Tensor) -> DenseInputs:
        """Inputs with these logits ``[N, V]`` instead of random ones; the student's may be overwritten."""
        self = cls.__new__(cls)
        self.case, self.buffer, self.teacher = case, student, teacher
        self._start(pristine=False)
        return self

    def _start(self, pristine: bool) -> None:
        self._pristine = self.buffer.clone() if pristine else None
        self._gradients: list[Tensor | None] = []
        self.dirty = False
        """Whether the student's logits have been overwritten since `reset`."""
        self._handle = torch.zeros((), requires_grad=True)

    def student(self, chunks: int = 1) -> list[Tensor]:
        """The student's logits as a model puts them out: whole, or as `chunks` tensors of consecutive rows."""
        self._gradients = [None] * chunks
        out = []
        for index, rows in enumerate(self.buffer.chunk(chunks)):

            def keep(gradient: Tensor, index: int = index) -> None:
                self._gradients[index] = gradient

            out.append(Produce.apply(self._handle, rows, keep))
        return out

    def reset(self) -> None:
        """Forget gradients; restore the student's logits if they were overwritten."""
        self._gradients = []
        if self.dirty and self._pristine is not None:
            self.buffer.copy_(self._pristine)
        self.dirty = False

    def gradients(self) -> dict[str, Tensor]:
        """The gradient with respect to the student's logits."""
        got = [g for g in self._gradients if g is not None]
        return {"dlogits": got[0] if len(got) == 1 else torch.cat(got)} if got else {}


class LinearInputs:
    """Hidden states and heads of both sides; the student's are leaves that require grad.

    Logits have a standard deviation of about 2, the teacher's and the student's independent.
    """

    def __init__(self, case: Case, seed: int = 0, pristine: bool = True) -> None:
        self.case = case
        self.dirty = False
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int, std: float) -> Tensor:
            return torch.empty(rows, columns, dtype=DTYPES[case.dtype]).normal_(0, std, generator=generator)

        self.hidden = normal(case.N, case.H, 1.0).requires_grad_()
        self.weight = normal(case.V, case.H, 2 * case.H**-0.5).requires_grad_()
        self.teacher_hidden = normal(case.N, case.Ht, 1.0)
        self.teacher_weight = normal(case.V, case.Ht, 2 * case.Ht**-0.5)

    def reset(self) -> None:
        """Forget gradients."""
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the student's hidden states and head."""
        found = {"dhidden": self.hidden.grad, "dweight": self.weight.grad}
        return {name: g for name, g in found.items() if g is not None}


Inputs = DenseInputs | LinearInputs


def make(case: Case, seed: int = 0, pristine: bool = True) -> Inputs:
    """Inputs of a case."""
    return (DenseInputs if case.op == "dense" else LinearInputs)(case, seed, pristine)
