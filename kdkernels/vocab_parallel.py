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

from kdkernels import arguments, backends, divergences, native
from kdkernels._checks import fail
from kdkernels.calls import _check_in_place, _needed, _rows, _source
from kdkernels.chunking import chunk_rows
from kdkernels.collectives import Ranks
from kdkernels.logits import LinearLogits
from kdkernels.ops.dense import InPlace
from kdkernels.ops.head import Plan, Source
from kdkernels.ops.rows import RowSpec, accumulation_dtype
from kdkernels.ops.shard_chunks import Shard
from kdkernels.ops.shard_parts import kept_width
from kdkernels.ops.shards import ShardPlan, fill
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
    teacher: Tensor | LinearLogits
    kernel: divergences.Kernel
    backend: str
    options: Options

    @property
    def columns(self) -> tuple[int, int]:
        """This rank's columns of student and teacher."""
        return self.student.shape[-1], self.teacher.shape[-1]

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


def _form(side: Tensor | LinearLogits) -> str:
    if isinstance(side, Tensor):
        return "logits"
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
    if isinstance(teacher, SparseLogits):
        remedy = "pass the teacher as shards of logits or of its head: sparse teachers over shards are not written yet"
        fail(ValueError, "teacher", "SparseLogits with vocabulary shards", "logits or kd.LinearLogits", remedy)
    arguments.check_scalars(
        asked.temperature, asked.temperature_scaling, asked.kd_weight, asked.ce_weight, asked.chunk_bytes,
        asked.vocab_size, asked.ignore_index,
    )  # fmt: skip
    arguments.check_reduction(asked.reduction, asked.num_items)
    arguments.check_switches(shift=asked.shift, inplace=asked.inplace, return_stats=asked.return_stats)
    student, teacher = (arguments.under_autocast(localize(x)) for x in (student, teacher))
    arguments.check_not_transformed(student)
    arguments.check_pair(_with_columns(student), _with_columns(teacher), 1)
    leading, device = student.shape[:-1], student.device
    arguments.check_tokens(leading, device, asked.labels, asked.token_weights, asked.shift, asked.ce_weight)
    kernel = divergences.get(divergence).kernel()
    serving = serving_backend(asked.backend, device, student.dtype, kernel.name)
    local = Local(student, teacher, kernel, serving, asked)
    if _overwrites(local):
        _check_in_place(student, _rows(student))
    return local


def _with_columns(side: Any) -> Any:
    """A stand-in with one column for an empty shard, which is no error here."""
    if isinstance(side, LinearLogits) and side.weight.shape[0] == 0:
        bias = None if side.bias is None else side.bias.new_empty(1)
        return LinearLogits(side.hidden, side.weight.new_empty((1, side.weight.shape[1])), bias)
    if isinstance(side, Tensor) and side.dim() and side.shape[-1] == 0:
        return side.new_empty((*side.shape[:-1], 1)).requires_grad_(side.requires_grad)
    return side


def serving_backend(requested: str, device: torch.device, dtype: torch.dtype, kernel: str) -> str:
    """The backend that computes the parts of a row in shards: that of whole rows, or "eager" where it has no parts."""
    name = backends.choose(requested, device, dtype, kernel)
    why = ""
    if kernel == "adaptive_kl":
        why = "adaptive KL over vocabulary shards is plain torch"
    elif name == "cpp":
        why = native.why_not_shards(dtype)
    if not why or name == "eager":
        return name
    if requested != "auto" or os.environ.get("KDKERNELS_BACKEND", "auto") not in ("", "auto"):
        fail(ValueError, "backend", repr(name), "a backend that can serve this call", f"{why}; use backend='auto'")
    return "eager"


def _attempt(make: Callable[[], Local]) -> tuple[Local | None, Exception | None]:
    try:
        return make(), None
    except (TypeError, ValueError) as error:
        return None, error


@dataclass(frozen=True)
class Columns:
    """Which columns of the whole vocabulary are this rank's."""

    offset: int
    local: int
    whole: int
    widest: int


def columns_of(pages: list[dict[str, Any]], rank: int, vocab_size: int | None) -> Columns:
    """This rank's columns, from every rank's sizes; an error, on all, where the two sides are not sharded alike."""
    student, teacher = ([told["columns"][side] for told in pages] for side in (0, 1))
    if vocab_size is None and sum(student) != sum(teacher):
        remedy = "for a difference in padding pass vocab_size=; different tokenizers cannot be compared"
        fail(ValueError, "vocabularies", f"student {sum(student)}, teacher {sum(teacher)}", "of one size", remedy)
    whole = sum(student) if vocab_size is None else vocab_size
    if whole > min(sum(student), sum(teacher)) or whole == 0:
        allowed = (
            f"at most the smaller vocabulary, all shards together (student {sum(student)}, teacher {sum(teacher)})"
        )
        remedy = "pass the number of tokens that the tokenizer has; a shard is missing where that is right"
        fail(ValueError, "vocab_size", whole, allowed, remedy)
    spans = [_spans(sizes, whole) for sizes in (student, teacher)]
    if spans[0] != spans[1]:
        given = f"student {student}, teacher {teacher} columns by rank"
        fail(ValueError, "shards", given, "cut at the same columns up to vocab_size", "shard both sides alike")
    offset, local = spans[0][rank]
    return Columns(offset, local, whole, max(size for _, size in spans[0]))


def _spans(sizes: list[int], whole: int) -> list[tuple[int, int]]:
    """(first column, number) of each rank up to ``whole``; empty shards stand at no place of their own."""
    spans, begin = [], 0
    for size in sizes:
        held = max(0, min(size, whole - begin))
        spans.append((begin if held else 0, held))
        begin += size
    return spans


@torch.compiler.disable
def loss_of(group: object | None, student: Any, teacher: Any, divergence: Any, asked: Options) -> Outcome:
    """`kdkernels.distillation_loss` over vocabulary shards. Under torch.compile it is left to eager torch."""
    ranks = Ranks(resolve(group, student, teacher))
    local, error = _attempt(lambda: prepare(student, teacher, divergence, asked))
    pages, stamp = agree(ranks, local, error)
    assert local is not None
    columns = columns_of(pages, ranks.rank, asked.vocab_size)
    leading, dtype = local.student.shape[:-1], local.student.dtype
    tokens = TokenOptions(
        asked.labels, asked.token_weights, asked.shift, asked.ignore_index, asked.kd_weight, asked.ce_weight,
        asked.reduction, asked.num_items, asked.temperature**2 if asked.temperature_scaling == "t2" else 1.0,
        dtype == torch.float16,
    )  # fmt: skip
    acc = accumulation_dtype(dtype)
    weights, counted, divisor = row_weights(tokens, leading, local.student.device, acc, columns.whole)
    loss, stats = _run(local, Shard(ranks, columns.offset, columns.whole, stamp), columns, weights)
    return Outcome(loss, stats, counted, divisor, leading)


def _run(local: Local, shard: Shard, columns: Columns, weights: RowWeights) -> tuple[Tensor, Tensor]:
    spec = RowSpec(*local.kernel, float(local.options.temperature), columns.local)
    student, teacher = _source(local.student), _source(local.teacher, detach=True)
    chunk = _chunk(local, columns)
    per_row = local.options.reduction == "none"
    needed = _needed(student)
    if _overwrites(local):
        assert isinstance(local.student, Tensor)
        rows = _rows(local.student)
        plan = Plan(Source(*_constant(student)), Source(*teacher), weights, spec, local.backend, chunk)
        filler = partial(_fill, ShardPlan(plan, shard))
        loss, stats = InPlace.apply(rows, filler, local.backend, per_row, local.options.return_stats)  # type: ignore[no-untyped-call]
        return loss, stats
    loss, _, _, _, stats, _ = torch.ops.kdkernels.shards(
        *student, *teacher, *weights, *spec[:-1], columns.offset, columns.whole, shard.ranks.name, shard.stamp, chunk,
        local.backend, per_row, *needed, local.options.return_stats,
    )  # fmt: skip
    return loss, stats


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
    row_bytes = 2 * widest * local.student.dtype.itemsize
    if _is_logits(local):
        if local.student.device.type != "cpu":
            return max(1, rows)
        kept = kept_width(local.backend, RowSpec(*local.kernel, 1.0, widest), itemsize=1)
        return chunk_rows(rows, row_bytes + (kept or 0), CHUNK_BYTES)
    return chunk_rows(rows, 2 * row_bytes, local.options.chunk_bytes)  # two chunks are at work at a time


def _is_logits(local: Local) -> bool:
    return isinstance(local.student, Tensor) and isinstance(local.teacher, Tensor)


def _overwrites(local: Local) -> bool:
    """Whether the student's logits will hold the gradient."""
    return local.options.inplace and _is_logits(local) and _needed(_source(local.student))[0]
