"""Losses over vocabulary shards: who holds which columns, and whether all ranks ask for the same.

``group`` names the ranks, in whose order the shards make up the vocabulary: a ProcessGroup, a one-dimensional
DeviceMesh (``mesh["tensor"]``), or nothing where logits or heads are DTensors, sharded over one dimension of their
mesh (logits ``Shard(-1)``, weight and bias ``Shard(0)``, any sizes, empty ones too); other dimensions of the mesh are
not looked at. Hidden states, labels and weights of tokens are the same on every rank, and so is the loss; the gradient
of hidden states is that of the whole loss, summed over ranks once, those of logits and heads are this rank's columns.

Before the first collective of rows, ranks exchange a page of 2 KiB with their options and shapes (one
all-gather): what differs, or what one of them finds wrong, is an error on every rank. On a GPU, where that would
cost a synchronisation, they do so when this rank's shapes are new, and later calls carry a digest of the page in
their first collective: a difference makes the loss NaN, and the next call that can tell raises. Collectives of rows
and their sizes are listed in `kdkernels.ops.shards`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import arguments, arguments_sparse, backends, divergences, native
from kdkernels._checks import fail
from kdkernels.calls import _check_in_place, _needed, _rows, _source, _sparse_rows
from kdkernels.chunking import chunk_rows
from kdkernels.collectives import Ranks
from kdkernels.logits import LinearLogits
from kdkernels.ops.dense import InPlace
from kdkernels.ops.head import Plan, Source
from kdkernels.ops.rows import RowSpec, accumulation_dtype
from kdkernels.ops.shard_chunks import Shard
from kdkernels.ops.shard_parts import kept_width
from kdkernels.ops.shards import ShardPlan, fill
from kdkernels.ops.sparse import SparseRows
from kdkernels.shard_columns import Columns, columns_of
from kdkernels.shard_groups import localize, resolve
from kdkernels.shard_pages import agree
from kdkernels.sparse_logits import SparseLogits
from kdkernels.weights import RowWeights, TokenOptions, row_weights

CHUNK_BYTES = 128 * 2**20
"""Logits of both sides of a chunk, where they exist already, and what is kept beside them. Python and gloo take a
millisecond a chunk and rank, as long as 2^20 entries do on one core of an EPYC 9005: reading a chunk from memory again
costs less than many small ones."""


class Options(NamedTuple):
    """Options of `kdkernels.distillation_loss`; see there."""

    temperature: float
    temperature_scaling: str
    labels: Tensor | None
    ce_weight: float
    kd_weight: float
    ignore_index: int
    token_weights: Tensor | None
    shift: bool
    reduction: str
    num_items: int | float | Tensor | None
    vocab_size: int | None
    chunk_bytes: int | None
    backend: str
    inplace: bool
    return_stats: bool
    sparse_mode: str


class Outcome(NamedTuple):
    """Losses (``[N]`` or their sum), statistics (``[N, 6]`` or ``[0]``), and what `row_weights` says."""

    loss: Tensor
    stats: Tensor
    counted: Tensor
    divisor: Tensor | None
    leading: torch.Size


@dataclass
class Local:
    """This rank's view of a call: what can be known before any other rank is heard."""

    student: Tensor | LinearLogits
    teacher: Tensor | LinearLogits | SparseLogits
    kernel: divergences.Kernel
    backend: str
    options: Options

    @property
    def columns(self) -> tuple[int, int]:
        """This rank's columns of student and teacher; a sparse teacher has all."""
        return self.student.shape[-1], self.teacher.shape[-1]

    @property
    def sparse(self) -> bool:
        """Whether every rank has the whole teacher."""
        return isinstance(self.teacher, SparseLogits)

    def page(self) -> dict[str, Any]:
        """What all ranks must have alike."""
        student, teacher = self.student, self.teacher
        told = {
            "leading shape": list(student.shape[:-1]),
            "dtype": str(student.dtype),
            "device": student.device.type,
            "divergence": list(self.kernel),
            "backend": self.backend,
            "student": _form(student),
            "teacher": _form(teacher),
            "gradients": [torch.is_grad_enabled() and x is not None and x.requires_grad for x in _source(student)[:3]],
        }
        for name, value in self.options._asdict().items():
            told.setdefault(name, _digest(value) if isinstance(value, Tensor) else value)
        return told


def _form(side: Tensor | LinearLogits | SparseLogits) -> str:
    if isinstance(side, Tensor):
        return "logits"
    if isinstance(side, SparseLogits):
        parts = ", ".join(_digest(x) for x in (side.ids, side.log_probs, side.log_tail))
        return f"SparseLogits({side.vocab_size}, {side.temperature}, {side.kind}, {parts})"
    return f"LinearLogits(H={side.hidden.shape[-1]}, bias={side.bias is not None}, {side.softcap}, {side.scale})"


def _digest(x: Tensor) -> str:
    """Shape and dtype, and of values on a CPU a checksum."""
    text = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if x.device.type != "cpu":
        return text
    flat = x.detach().reshape(-1).contiguous()
    return f"{text} with checksum {zlib.crc32(flat.view(torch.uint8).numpy().data):08x}"


def prepare(student: Any, teacher: Any, divergence: Any, asked: Options) -> Local:
    """Checks of everything that needs no other rank."""
    arguments.check_scalars(
        asked.temperature, asked.temperature_scaling, asked.kd_weight, asked.ce_weight, asked.chunk_bytes,
        asked.vocab_size, asked.ignore_index,
    )  # fmt: skip
    arguments.check_reduction(asked.reduction, asked.num_items)
    arguments.check_switches(shift=asked.shift, inplace=asked.inplace, return_stats=asked.return_stats)
    student, teacher = (arguments.under_autocast(localize(x)) for x in (student, teacher))
    arguments.check_not_transformed(student)
    arguments.check_pair(with_columns(student), with_columns(teacher), 1)
    leading, device = student.shape[:-1], student.device
    arguments.check_tokens(leading, device, asked.labels, asked.token_weights, asked.shift, asked.ce_weight)
    kernel = divergences.get(divergence).kernel()
    arguments_sparse.check_mode(teacher, asked.sparse_mode, asked.temperature, kernel.name)
    serving = serving_backend(asked.backend, device, student.dtype, kernel.name, isinstance(teacher, SparseLogits))
    local = Local(student, teacher, kernel, serving, asked)
    if _overwrites(local):
        _check_in_place(student, _rows(student))
    return local


def with_columns(side: Any) -> Any:
    """A stand-in with one column for an empty shard, which is no error here."""
    if isinstance(side, LinearLogits) and side.weight.shape[0] == 0:
        bias = None if side.bias is None else side.bias.new_empty(1)
        return LinearLogits(side.hidden, side.weight.new_empty((1, side.weight.shape[1])), bias)
    if isinstance(side, Tensor) and side.dim() and side.shape[-1] == 0:
        return side.new_empty((*side.shape[:-1], 1)).requires_grad_(side.requires_grad)
    return side


def serving_backend(requested: str, device: torch.device, dtype: torch.dtype, kernel: str, sparse: bool = False) -> str:
    """The backend that computes the parts of a row in shards; an explicit choice that cannot is an error."""
    name = backends.choose(requested, device, dtype, kernel, sparse)
    why = _why_no_parts(name, dtype, kernel, sparse)
    if not why:
        return name
    if requested != "auto" or os.environ.get("KDKERNELS_BACKEND", "auto") not in ("", "auto"):
        fail(ValueError, "backend", repr(name), "a backend that can serve this call", f"{why}; use backend='auto'")
    return next(verdict.backend for verdict in survey(device, dtype, kernel, sparse) if verdict.serves)


def survey(device: torch.device, dtype: torch.dtype, kernel: str, sparse: bool = False) -> list[backends.Verdict]:
    """`backends.survey` for rows in shards."""
    found = []
    for verdict in backends.survey(device, dtype, kernel, sparse):
        why = _why_no_parts(verdict.backend, dtype, kernel, sparse) if verdict.serves else verdict.reason
        found.append(
            backends.Verdict(verdict.backend, not why, why or f"{verdict.reason}, the parts of a row in shards")
        )
    return found


def _why_no_parts(name: str, dtype: torch.dtype, kernel: str, sparse: bool) -> str:
    """Why a backend that serves whole rows has no parts of rows in shards; "" where it has."""
    if name == "eager":
        return ""
    if kernel == "adaptive_kl":
        return "adaptive KL over vocabulary shards is plain torch"
    if sparse:
        return "a sparse teacher over vocabulary shards is plain torch"
    return native.why_not_shards(dtype) if name == "cpp" else ""


def _attempt(make: Callable[[], Local]) -> tuple[Local | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        return None, error


@torch.compiler.disable
def loss_of(group: object | None, student: Any, teacher: Any, divergence: Any, asked: Options) -> Outcome:
    """`kdkernels.distillation_loss` over vocabulary shards. Under torch.compile it is left to eager torch."""
    ranks = Ranks(resolve(group, student, teacher))
    local, error = _attempt(lambda: prepare(student, teacher, divergence, asked))
    pages, stamp = agree(ranks, local, error, ranks.device_of(student))
    assert local is not None
    columns = columns_of(pages, ranks.rank, asked.vocab_size, local.sparse)
    leading, dtype = local.student.shape[:-1], local.student.dtype
    tokens = TokenOptions(
        asked.labels, asked.token_weights, asked.shift, asked.ignore_index, asked.kd_weight, asked.ce_weight,
        asked.reduction, asked.num_items, asked.temperature**2 if asked.temperature_scaling == "t2" else 1.0,
        dtype == torch.float16,
    )  # fmt: skip
    acc = accumulation_dtype(dtype)
    weights, counted, divisor = row_weights(tokens, leading, local.student.device, acc, columns.whole)
    loss, stats = _run(local, Shard(ranks, columns.offset, columns.whole, stamp), columns, weights)
    if isinstance(local.teacher, SparseLogits):
        arguments_sparse.check_ids(loss, local.teacher, counted, columns.whole)
    return Outcome(loss, stats, counted, divisor, leading)


def _run(local: Local, shard: Shard, columns: Columns, weights: RowWeights) -> tuple[Tensor, Tensor]:
    options, student = local.options, _source(local.student)
    mode = options.sparse_mode if local.sparse else ""
    spec = RowSpec(*local.kernel, float(options.temperature), columns.local, mode)
    teacher = _teacher_arguments(local)
    chunk = _chunk(local, columns)
    per_row = options.reduction == "none"
    if _overwrites(local):
        assert isinstance(local.student, Tensor)
        held = SparseRows(*teacher) if local.sparse else Source(*teacher)
        plan = Plan(Source(*_constant(student)), held, weights, spec, local.backend, chunk)
        filler = partial(_fill, ShardPlan(plan, shard))
        rows = _rows(local.student)
        loss, stats = InPlace.apply(rows, filler, local.backend, per_row, options.return_stats)  # type: ignore[no-untyped-call]
        return loss, stats
    operator = torch.ops.kdkernels.shards_sparse if local.sparse else torch.ops.kdkernels.shards
    loss, _, _, _, stats, _ = operator(
        *student, *teacher, *weights, *(spec if local.sparse else spec[:-1]), columns.offset, columns.whole,
        shard.ranks.name, shard.stamp, chunk, local.backend, per_row, *_needed(student), options.return_stats,
    )  # fmt: skip
    return loss, stats


def _teacher_arguments(local: Local) -> tuple[Any, ...]:
    """What the operators take of the teacher."""
    if isinstance(local.teacher, SparseLogits):
        return _sparse_rows(local.teacher, accumulation_dtype(local.student.dtype))
    return _source(local.teacher, detach=True)


def _constant(source: tuple[Tensor, Any, Any, float, float]) -> tuple[Tensor, Any, Any, float, float]:
    return (source[0].detach(), *source[1:])


def _fill(plan: ShardPlan, side: Any, loss: Tensor, dlogits: Tensor | None, stats: Tensor | None) -> None:
    fill(plan, loss, dlogits, stats)


def _chunk(local: Local, columns: Columns) -> int:
    """Rows of a chunk, the same on every rank."""
    rows = 1
    for size in local.student.shape[:-1]:
        rows *= size
    widest = max(1, columns.widest)
    row_bytes = (1 if local.sparse else 2) * widest * local.student.dtype.itemsize
    if _is_logits(local):
        if local.student.device.type != "cpu":
            return max(1, rows)
        spec = RowSpec(*local.kernel, 1.0, widest)
        kept = None if local.sparse else kept_width(local.backend, spec, itemsize=1)
        return chunk_rows(rows, row_bytes + (kept or 0), CHUNK_BYTES)
    return chunk_rows(rows, 2 * row_bytes, local.options.chunk_bytes)  # two chunks are at work at a time


def _is_logits(local: Local) -> bool:
    return isinstance(local.student, Tensor) and not isinstance(local.teacher, LinearLogits)


def _overwrites(local: Local) -> bool:
    """Whether the student's logits will hold the gradient."""
    return local.options.inplace and _is_logits(local) and _needed(_source(local.student))[0]
