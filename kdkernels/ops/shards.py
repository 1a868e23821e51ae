"""``kdkernels::shards`` and ``kdkernels::shards_sparse``: the divergence of N rows whose vocabulary lies in shards over
a process group, from teachers that lie in the same shards or of which K entries a row are known to every rank.

Rows go chunk by chunk through the parts of `kdkernels.eager_shards` (or another backend's), two chunks at a time: while
one chunk's numbers travel, the other is computed. Bytes sent per row and rank, float32 (float64: twice as many):

- one all-gather of the normalisers, 16; of forward and reverse KL with backend "cpp" also their online sum, 20;
- one all-reduce of the sums of term and grad, 8, where there is no online sum;
- backend "cpp": one all-reduce of the terms, 4, of those rows whose divergence is below 1e-3 nats or that hold masked
  entries, which are summed again with more care;
- sparse teachers: one all-gather of the normalisers of kept entries and tail, 16; one all-reduce of the sums of term
  and grad over the kept entries, 8;
- in the all-gather, with labels 4 more (8 where T != 1), with statistics 16 more (sparse teachers: 8);
- adaptive KL: see `kdkernels.ops.shards_adaptive`.

That is at most 24 for forward and reverse KL and for sparse teachers, 28 for others. Gradients of logits, head weight
and bias stay on their rank. The gradient of hidden states, which every rank holds alike, is summed over ranks here,
once: one all-reduce of ``[C, H]`` a chunk in the dtype of the hidden states. No collective runs in the backward but for
``per_row`` with a head, whose backward computes logits again and sums the hidden states' gradient there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import memory
from kdkernels.collectives import Pending, Ranks
from kdkernels.eager_shards import Rows
from kdkernels.eager_sparse_shards import SparseNumbers
from kdkernels.ops.head import Gradients, Plan, Source, Wanted, _gradient_shapes, _without_autocast
from kdkernels.ops.library import EVERY_DEVICE, LIBRARY, anchors, once_differentiable, scale_by_incoming, summed
from kdkernels.ops.rows import STATS, RowSpec, accumulation_dtype
from kdkernels.ops.shard_chunks import Chunk, DenseChunk, Shard, SparseChunk, in_turn
from kdkernels.ops.shard_parts import Parts, kept_width, parts_of
from kdkernels.ops.sparse import SparseRows
from kdkernels.weights import RowWeights

IN_FLIGHT = 2
"""Chunks at work at a time."""

_STUDENT = "Tensor student, Tensor? student_weight, Tensor? student_bias, float student_scale, float student_softcap, "
_WEIGHTS = "Tensor w_kd, Tensor? w_ce, Tensor? labels, str kernel, float a, float b, float temperature, SymInt vocab, "
_REST = (
    "SymInt offset, SymInt whole, str group, int stamp, SymInt chunk_rows, str backend, bool per_row, bool need_input, "
    "bool need_weight, bool need_bias, bool need_stats) "
    "-> (Tensor loss, Tensor d_student, Tensor d_weight, Tensor d_bias, Tensor stats, Tensor numbers)"
)
LIBRARY.define(
    f"shards({_STUDENT}Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, "
    f"float teacher_softcap, {_WEIGHTS}{_REST}"
)
LIBRARY.define(f"shards_sparse({_STUDENT}Tensor ids, Tensor log_probs, Tensor log_tail, {_WEIGHTS}str mode, {_REST}")


@dataclass(frozen=True)
class ShardPlan:
    """One call: `head.Plan` with the columns of one rank."""

    plan: Plan
    shard: Shard

    @property
    def headless(self) -> bool:
        """No side is a head: no row is left out, as none costs a GEMM."""
        teacher = self.plan.teacher
        return self.plan.student.weight is None and (isinstance(teacher, SparseRows) or teacher.weight is None)

    def _parts(self) -> tuple[Sequence[Tensor | slice], bool]:
        if not self.headless:
            return self.plan.parts()
        n, size = self.plan.student.input.shape[0], self.plan.chunk_rows
        return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)], True

    def run(
        self, wanted: Wanted, need_stats: bool, numbers: Tensor | None = None, into: Tensor | None = None
    ) -> tuple[Tensor, Gradients, Tensor, Tensor]:
        """Losses ``[N]``, gradients, statistics ``[N, 6]`` (or ``[0]``), ``numbers`` of each row.

        With ``numbers`` of an earlier call only the gradients are computed.
        ``into``: where the gradient of logits goes.
        """
        parts, all_rows = self._parts()
        student, like = self.plan.student, self.plan.student.input
        n, vocab, most = like.shape[0], self.plan.spec.vocab, min(like.shape[0], self.plan.chunk_rows)
        acc = accumulation_dtype(like.dtype)
        loss = like.new_zeros((n,), dtype=acc)
        stats = like.new_zeros((n, STATS) if need_stats else (0,), dtype=acc)
        kept = (
            like.new_zeros((n, _columns(type(self.plan.teacher))), dtype=torch.float64) if numbers is None else numbers
        )
        gradients = Gradients(student, len(parts), all_rows, vocab, wanted)
        if into is not None:
            gradients.input, gradients.wanted = into, Wanted(True, False, False)
        slots = min(IN_FLIGHT, len(parts))
        keeps = self.headless and (wanted.input or into is not None)
        shapes = [student.chunk_shape(most, vocab), *self._rooms(most, keeps, like.dtype.itemsize)] * slots
        sums: list[Pending] = []
        with memory.workspace(shapes, like.dtype, like.device) as buffers:
            free = [(parts_of(self.plan.backend, buffers[i + 2]), buffers[i : i + 2]) for i in range(0, 3 * slots, 3)]

            def job(first: bool, rows: Tensor | slice) -> Iterator[None]:
                worker, room = free.pop()
                inputs, chunk = self._chunk(rows, worker, room)
                dlogits = gradients.target(rows, chunk.student.x)
                if numbers is None:
                    yield from chunk.steps(dlogits, need_stats, first)
                    loss[rows], kept[rows] = chunk.loss, torch.stack(chunk.rows, -1)
                    if need_stats:
                        stats[rows] = chunk.stats
                elif dlogits is not None:
                    chunk.gradient(numbers[rows], dlogits)
                if dlogits is not None:
                    gradients.add(rows, inputs, dlogits)
                    if self._sums_input(gradients) and isinstance(rows, slice):
                        sums.append(self.shard.ranks.add_(gradients.input[rows]))
                free.append((worker, room))

            in_turn((job(i == 0, rows) for i, rows in enumerate(parts)), slots)
        if self._sums_input(gradients) and not all_rows:
            sums.append(self.shard.ranks.add_(gradients.input))
        for pending in sums:
            pending.wait()
        return loss, gradients, stats, kept

    def _rooms(self, rows: int, keeps: bool, itemsize: int) -> list[tuple[int, int] | None]:
        """Shapes of a chunk's room for the teacher's logits and for grads that are kept."""
        teacher, spec = self.plan.teacher, self.plan.spec
        if isinstance(teacher, SparseRows):
            return [None, None]
        width = kept_width(self.plan.backend, spec, itemsize) if keeps else None
        return [teacher.chunk_shape(rows, spec.vocab), None if width is None else (rows, width)]

    def _sums_input(self, gradients: Gradients) -> bool:
        """Hidden states are the same on every rank, logits are not."""
        return gradients.wanted.input and self.plan.student.weight is not None

    def _chunk(self, rows: Tensor | slice, worker: Parts, room: list[Tensor | None]) -> tuple[Tensor, Chunk]:
        vocab = self.plan.spec.vocab
        inputs = self.plan._student_rows(rows)
        student = self.plan.student.chunk(inputs, vocab, room[0])
        weights = RowWeights(*(None if w is None else w[rows] for w in self.plan.weights))  # type: ignore[arg-type]
        teacher, spec = self.plan.teacher, self.plan.spec
        if isinstance(teacher, SparseRows):
            some = SparseRows(*(x[rows] for x in teacher))
            return inputs, SparseChunk(student, some, weights, spec, self.shard)
        side = teacher.chunk(teacher.input[rows], vocab, room[1])
        return inputs, DenseChunk(student, side, weights, spec, self.shard, worker)


def _columns(teacher: type) -> int:
    """Numbers of a row that a backward needs which computes the gradient anew."""
    return len((SparseNumbers if teacher is SparseRows else Rows)._fields)


def fill(plan: ShardPlan, loss: Tensor, dlogits: Tensor | None, stats: Tensor | None) -> None:
    """All rows of logits, the gradient into ``dlogits``, which may be the student's own."""
    made, _, columns, _ = plan.run(Wanted(False, False, False), stats is not None, into=dlogits)
    loss.copy_(made)
    if stats is not None:
        stats.copy_(columns)


@dataclass(frozen=True)
class _Form:
    """Where an operator's arguments stand: those of the teacher, then those of the row function, then the rest."""

    teacher: type[Source] | type[SparseRows]
    spec: int

    @property
    def w_kd(self) -> int:
        return 5 + len(self.teacher._fields)

    @property
    def rest(self) -> int:
        """Of offset, whole, group, stamp, chunk_rows, backend, per_row, need_input, need_weight, need_bias,
        need_stats."""
        return self.w_kd + 3 + self.spec

    def plan(self, args: Sequence[Any]) -> ShardPlan:
        """The call that the operator's arguments describe."""
        spec = RowSpec(*args[self.w_kd + 3 : self.rest])
        offset, whole, group, stamp, chunk_rows, backend = args[self.rest : self.rest + 6]
        weights = RowWeights(*args[self.w_kd : self.w_kd + 3])
        teacher: Any = self.teacher
        plan = Plan(Source(*args[:5]), teacher(*args[5 : self.w_kd]), weights, spec, backend, chunk_rows)
        return ShardPlan(plan, Shard(Ranks.named(group), offset, whole, stamp))


FORMS = {"shards": _Form(Source, 5), "shards_sparse": _Form(SparseRows, 6)}


def _run(form: _Form, args: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = form.plan(args)
    per_row, *needed, need_stats = args[-5:]
    later = per_row and plan.plan.student.weight is not None
    wanted = Wanted(False, False, False) if later else Wanted(*needed)
    with _without_autocast(args[0].device.type):
        loss, gradients, stats, numbers = plan.run(wanted, need_stats)
    numbers = numbers if later else numbers.new_empty(0)
    return loss if per_row else summed(loss), *gradients.finish(), stats, numbers


def shards(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and statistics of this rank's columns.

    Args, by position:
        0..9: student and teacher as in ``kdkernels::linear``, heads and logits cut to this rank's columns.
        10..17: w_kd, w_ce, labels (in the whole vocabulary), kernel, a, b, temperature, and vocab, this rank's columns.
        18..21: offset, whole, group (a name), stamp: see `Shard`.
        22..28: chunk_rows, backend, per_row, need_input, need_weight, need_bias, need_stats: as in
            ``kdkernels::linear``; gradients of logits come with the loss even if ``per_row``.

    Returns:
        ``loss``, ``d_student``, ``d_weight``, ``d_bias``, ``stats`` as ``kdkernels::linear``; ``numbers`` float64
        ``[N, columns]`` for the backward of ``per_row`` with a head, else empty.
    """
    return _run(FORMS["shards"], args)


def shards_sparse(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`shards` with the teacher of ``kdkernels::sparse``, alike on every rank, at 5..7, and its mode after vocab."""
    return _run(FORMS["shards_sparse"], args)


def _fake(form: _Form, student: Tensor, student_weight: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    per_row, *needed, need_stats = args[-5:]
    n, acc = student.shape[0], accumulation_dtype(student.dtype)
    later = per_row and student_weight is not None
    shapes = _gradient_shapes(student, student_weight, Wanted(False, False, False) if later else Wanted(*needed))
    return (
        student.new_empty((n,) if per_row else (), dtype=acc),
        *(student.new_empty(shape) for shape in shapes),
        student.new_empty((n, STATS) if need_stats else (0,), dtype=acc),
        student.new_empty((n, _columns(form.teacher)) if later else (0,), dtype=torch.float64),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.later, ctx.anchors = inputs[-5] and inputs[1] is not None, anchors(*inputs[:3])
    ctx.wanted, ctx.backend = Wanted(*inputs[-4:-1]), inputs[-6]
    if not ctx.later:
        ctx.save_for_backward(*(g for g, wanted in zip(output[1:4], ctx.wanted, strict=True) if wanted))
        return
    # a teacher's inference tensors cannot be saved for backward, nor change before it
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and not x.is_inference()]
    ctx.options = [None if i in ctx.tensors else x for i, x in enumerate(inputs)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors), output[5])


def _backward(form: _Form, ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 3
    if d_loss is not None and ctx.later:
        gradients = _recompute(form, ctx, d_loss)
    elif d_loss is not None:
        scaled = iter(scale_by_incoming(list(ctx.saved_tensors), d_loss, ctx.backend))
        gradients = [next(scaled) if wanted else None for wanted in ctx.wanted]
    return (*once_differentiable(gradients, ctx.anchors, d_loss), *[None] * (form.rest + 11 - 3))


def _recompute(form: _Form, ctx: Any, d_loss: Tensor) -> list[Tensor | None]:
    """Logits again, with the gradient that reached each row's loss (alike on every rank) folded into its weights."""
    inputs = list(ctx.options)
    *tensors, numbers = ctx.saved_tensors
    for i, x in zip(ctx.tensors, tensors, strict=True):
        inputs[i] = x
    for i in (form.w_kd, form.w_kd + 1):
        if inputs[i] is not None:  # a row that does not count stays at 0 whatever arrives
            inputs[i] = torch.where(inputs[i] == 0, 0.0, inputs[i] * d_loss)
    wanted = Wanted(*ctx.needs_input_grad[:3])
    with torch.no_grad(), _without_autocast(d_loss.device.type):
        _, gradients, _, _ = form.plan(inputs).run(wanted, False, numbers=numbers)
        output = gradients.finish()
    return [g if w else None for g, w in zip(output, wanted, strict=True)]


for _name, _function in (("shards", shards), ("shards_sparse", shards_sparse)):
    LIBRARY.impl(_name, _function, EVERY_DEVICE)
    torch.library.register_fake(f"kdkernels::{_name}", partial(_fake, FORMS[_name]), lib=LIBRARY)
    torch.library.register_autograd(
        f"kdkernels::{_name}", partial(_backward, FORMS[_name]), setup_context=_setup, lib=LIBRARY
    )
