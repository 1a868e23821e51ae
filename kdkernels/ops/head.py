"""Rows whose logits are a head's product: chunk by chunk, for teachers of every form.

Each chunk: GEMM to the student's logits (and the teacher's, if it has a head), the row function with its gradient in
place over the student's logits, GEMMs to the input and weight gradients. Memory is the chunk (`chunking`) plus the
outputs, whatever N is.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import memory
from kdkernels.chunking import spans
from kdkernels.ops import gemm
from kdkernels.ops.library import LIBRARY, anchors, once_differentiable, scale_by_incoming, summed
from kdkernels.ops.rows import STATS, RowSpec, Side, accumulation_dtype, divergence_rows_
from kdkernels.ops.sparse import SparseRows, sparse_rows_
from kdkernels.weights import RowWeights

ROUNDED_CHUNKS = 2
"""Up to so many chunks a head's gradient is summed in its own dtype; more are summed in float32.

The second product is added before it is rounded (``addmm``), so two chunks round twice where a float32 sum of products
rounds three times: each product, as no CPU GEMM takes bfloat16 operands to a float32 result, and the sum. Relative
error of a bfloat16 head's gradient (norms; N = 256, V = 4096, H = 64): one chunk 3.1e-3, two 3.3e-3, 64 3.3e-3; most
is the rounding of the logits' gradient, a correctly rounded result has 1.7e-3.

The float32 buffer (twice the gradient's bytes) can also be avoided by slicing the vocabulary, after a first pass for
the normalisers; both sides' logits are then computed twice. At 2048 x 32000 in bfloat16 (H 1024 and 2048, EPYC 9005,
two cores) the products take 363 + 205 (logits), 212 (input) and 209 ms (head): slicing would make 989 ms 1557; the
buffer costs 13 ms a chunk of 512 rows. So the buffer stays.
"""


class Source(NamedTuple):
    """One side: hidden states ``[N, H]`` with a head ``[V, H]``, or (weight None) logits ``[N, >= vocab]``."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: float
    softcap: float

    def chunk_shape(self, rows: int, vocab: int) -> tuple[int, int] | None:
        """Of the logits that have to be made for ``rows`` rows; none for logits that exist already."""
        return None if self.weight is None else (rows, vocab)

    def chunk(self, inputs: Tensor, vocab: int, buffer: Tensor | None) -> Side:
        """Logits of the rows ``inputs``, in ``buffer`` if they have to be made."""
        bias = None if self.bias is None else self.bias[:vocab].to(accumulation_dtype(inputs.dtype)).contiguous()
        x = inputs
        if self.weight is not None and buffer is not None:
            x = buffer[: inputs.shape[0]]
            gemm.logits_(inputs, self.weight[:vocab], x)
        return Side(x, bias, self.scale, self.softcap)


class Wanted(NamedTuple):
    """Which gradients of the student are wanted."""

    input: bool
    weight: bool
    bias: bool


def _gradient_shapes(student: Tensor, weight: Tensor | None, wanted: Wanted) -> tuple[tuple[int, ...], ...]:
    """Shapes of the three gradients, ``(0,)`` where not wanted."""
    head = (0, 0) if weight is None else weight.shape
    return (
        tuple(student.shape) if wanted.input else (0,),
        tuple(head) if wanted.weight else (0,),
        (head[0],) if wanted.bias else (0,),
    )


class Gradients:
    """The student's gradients, filled chunk by chunk."""

    def __init__(self, student: Source, chunks: int, all_rows: bool, vocab: int, wanted: Wanted) -> None:
        self.student, self.vocab, self.wanted, self.first = student, vocab, wanted, True
        dtype, device = student.input.dtype, student.input.device
        acc = accumulation_dtype(dtype)
        x, weight, bias = _gradient_shapes(student.input, student.weight, wanted)
        self.input = memory.empty(x, dtype, device)
        if wanted.input and not all_rows:
            self.input.zero_()
        rounded = ROUNDED_CHUNKS if device.type == "cpu" else 1  # a GPU's GEMM adds bfloat16 products to float32
        self.weight = memory.empty(weight, dtype if chunks <= rounded else acc, device)
        self.bias = torch.zeros(bias, dtype=acc, device=device)

    def target(self, rows: Tensor | slice, x: Tensor) -> Tensor | None:
        """Where the row function shall write the gradient of the logits ``x [C, vocab]``."""
        if not any(self.wanted):
            return None
        if self.student.weight is not None:
            return x
        return self.input[rows] if isinstance(rows, slice) else torch.empty_like(x)

    def add(self, rows: Tensor | slice, inputs: Tensor, dlogits: Tensor) -> None:
        """Take in one chunk from the gradient of its logits."""
        weight = self.student.weight
        if weight is None:
            if not isinstance(rows, slice):
                self.input[rows] = dlogits
            return
        if self.wanted.input:
            part = self.input[rows] if isinstance(rows, slice) else torch.empty_like(inputs)
            gemm.input_gradient_(dlogits, weight[: self.vocab], part)
            if not isinstance(rows, slice):
                self.input[rows] = part
        if self.wanted.weight:
            gemm.add_weight_gradient_(dlogits, inputs, self.weight[: self.vocab], self.first)
        if self.wanted.bias:
            self.bias[: self.vocab] += dlogits.sum(0, dtype=self.bias.dtype)
        self.first = False

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros where no chunk wrote (padding rows of the head, no rows at all), accumulators rounded once."""
        if self.wanted.weight:
            self.weight[0 if self.first else self.vocab :].zero_()
        dtype = self.student.input.dtype
        weight = self.weight
        if weight.dtype != dtype:
            weight = memory.empty(tuple(weight.shape), dtype, weight.device).copy_(weight)
        return self.input, weight, self.bias.to(dtype)


@dataclass(frozen=True)
class Plan:
    """One call: the sides, the weights, and how rows become chunks."""

    student: Source
    teacher: Source | SparseRows
    weights: RowWeights
    spec: RowSpec
    backend: str
    chunk_rows: int

    def parts(self) -> tuple[list[Tensor] | list[slice], bool]:
        """Rows of each chunk, and whether that is all of them.

        Rows that do not count (prompts, padding) cost no GEMM: they are left out, except on a GPU, where knowing
        them would cost a host synchronisation.
        """
        kd, ce, _ = self.weights
        n = kd.shape[0]
        if kd.device.type == "cpu":
            counts = kd != 0 if ce is None else (kd != 0) | (ce != 0)
            if not bool(counts.all()):
                rows = counts.nonzero()[:, 0]
                return [rows[begin:end] for begin, end in spans(len(rows), self.chunk_rows)], False
        return [slice(begin, end) for begin, end in spans(n, self.chunk_rows)], True

    def run(self, wanted: Wanted, need_stats: bool) -> tuple[Tensor, Gradients, Tensor]:
        """Losses ``[N]``, gradients, statistics ``[N, 6]`` (or ``[0]``)."""
        parts, all_rows = self.parts()
        n, vocab, like = self.student.input.shape[0], self.spec.vocab, self.student.input
        acc = accumulation_dtype(like.dtype)
        loss = like.new_zeros((n,), dtype=acc)
        stats = like.new_zeros((n, STATS) if need_stats else (0,), dtype=acc)
        gradients = Gradients(self.student, len(parts), all_rows, vocab, wanted)
        most = min(n, self.chunk_rows)
        teacher = None if isinstance(self.teacher, SparseRows) else self.teacher.chunk_shape(most, vocab)
        shapes = [self.student.chunk_shape(most, vocab), teacher]
        with memory.workspace(shapes, like.dtype, like.device) as buffers:
            for rows in parts:
                loss[rows], part_stats = self._chunk(rows, buffers, gradients, need_stats)
                if part_stats is not None:
                    stats[rows] = part_stats
        return loss, gradients, stats

    def _student_rows(self, rows: Tensor | slice) -> Tensor:
        """The student's input. Hidden states of rows that do not count may be NaN, and 0 * NaN would reach the head's
        gradient: on a CPU such rows are not among ``rows``, on a GPU they become 0 here."""
        inputs = self.student.input[rows]
        kd, ce, _ = self.weights
        if kd.device.type == "cpu" or self.student.weight is None:
            return inputs
        counts = kd[rows] != 0 if ce is None else (kd[rows] != 0) | (ce[rows] != 0)
        return torch.where(counts[:, None], inputs, 0)

    def _chunk(
        self, rows: Tensor | slice, buffers: list[Tensor | None], gradients: Gradients, need_stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses and statistics of some rows, whose share of the gradients is taken in."""
        inputs = self._student_rows(rows)
        student = self.student.chunk(inputs, self.spec.vocab, buffers[0])
        weights = RowWeights(*(None if w is None else w[rows] for w in self.weights))  # type: ignore[arg-type]
        dlogits = gradients.target(rows, student.x)
        loss = weights.kd.new_empty(inputs.shape[0])
        stats = loss.new_empty((inputs.shape[0], STATS)) if need_stats else None
        outputs = (loss, dlogits, stats)
        if isinstance(self.teacher, SparseRows):
            sparse = SparseRows(*(x[rows] for x in self.teacher))
            sparse_rows_(self.backend, student, sparse, weights, self.spec, *outputs)
        else:
            teacher = self.teacher.chunk(self.teacher.input[rows], self.spec.vocab, buffers[1])
            divergence_rows_(self.backend, student, teacher, weights, self.spec, *outputs)
        if dlogits is not None:
            gradients.add(rows, inputs, dlogits)
        return loss, stats


def run(plan: Plan, per_row: bool, wanted: Wanted, need_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an operator returns: ``loss``, ``d_input``, ``d_weight``, ``d_bias``, ``stats``, empty where not wanted now.

    ``per_row``: ``loss`` is ``[N]`` and the gradients are left to the backward, which computes the logits again with
    the gradient that arrives there; otherwise ``loss`` is the sum ``[]`` and the gradients come with it.
    """
    with _without_autocast(plan.student.input.device.type):
        loss, gradients, stats = plan.run(Wanted(False, False, False) if per_row else wanted, need_stats)
    return loss if per_row else summed(loss), *gradients.finish(), stats


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def register(name: str, inputs: int, w_kd: int) -> None:
    """Fake and autograd of the operator ``kdkernels::<name>``.

    It takes the student's input, weight and bias first, ``w_kd`` and ``w_ce`` at positions ``w_kd`` and one on, and
    ends with ``backend, per_row, need_input, need_weight, need_bias, need_stats``; ``inputs`` arguments in all.
    """

    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * 3
        if d_loss is not None and ctx.per_row:
            gradients = _recompute(ctx, d_loss, getattr(torch.ops.kdkernels, name), w_kd)
        elif d_loss is not None:
            scaled = iter(scale_by_incoming(list(ctx.saved_tensors), d_loss, ctx.backend))
            gradients = [next(scaled) if wanted else None for wanted in ctx.wanted]
        return (*once_differentiable(gradients, ctx.anchors, d_loss), *[None] * (inputs - 3))

    torch.library.register_fake(f"kdkernels::{name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"kdkernels::{name}", backward, setup_context=_setup, lib=LIBRARY)


def _fake(student: Tensor, student_weight: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    per_row, *wanted, need_stats = args[-5:]
    n, acc = student.shape[0], accumulation_dtype(student.dtype)
    shapes = _gradient_shapes(student, student_weight, Wanted(False, False, False) if per_row else Wanted(*wanted))
    loss = student.new_empty((n,) if per_row else (), dtype=acc)
    return (
        loss,
        *(student.new_empty(shape) for shape in shapes),
        student.new_empty((n, STATS) if need_stats else (0,), dtype=acc),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.per_row, ctx.anchors = inputs[-5], anchors(*inputs[:3])
    if ctx.per_row:
        # a teacher's inference tensors cannot be saved for backward, nor change before it
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and not x.is_inference()]
        ctx.options = [None if i in ctx.tensors else x for i, x in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
    else:
        ctx.wanted, ctx.backend = Wanted(*inputs[-4:-1]), inputs[-6]
        ctx.save_for_backward(*(g for g, wanted in zip(output[1:4], ctx.wanted, strict=True) if wanted))


def _recompute(ctx: Any, d_loss: Tensor, operator: Any, w_kd: int) -> list[Tensor | None]:
    """Logits again, with the gradient that reached each row's loss folded into the row's weights."""
    inputs = list(ctx.options)
    for i, x in zip(ctx.tensors, ctx.saved_tensors, strict=True):
        inputs[i] = x
    for i in (w_kd, w_kd + 1):
        if inputs[i] is not None:  # a row that does not count stays at 0 whatever arrives
            inputs[i] = torch.where(inputs[i] == 0, 0.0, inputs[i] * d_loss)
    wanted = Wanted(*(ctx.needs_input_grad[:3]))
    inputs[-5:] = [False, *wanted, False]
    with torch.no_grad():
        output = operator(*inputs)
    return [g if w else None for g, w in zip(output[1:4], wanted, strict=True)]
