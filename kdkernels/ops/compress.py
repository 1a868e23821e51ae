"""``kdkernels::compress`` and ``kdkernels::draw``: the few entries that stand for N rows of logits.

Logits are read from memory once; those of a head exist one chunk of rows at a time (`chunking`). Neither has an
autograd: a teacher is a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import eager_topk, leaves, memory
from kdkernels.chunking import spans
from kdkernels.logits import transform
from kdkernels.ops.head import Source, _without_autocast
from kdkernels.ops.library import EVERY_DEVICE, LIBRARY
from kdkernels.ops.rows import Side, accumulation_dtype

_LOGITS = (
    "Tensor logits, Tensor? weight, Tensor? bias, float scale, float softcap, float temperature, SymInt vocab, "
    "SymInt chunk_rows, str backend"
)
LIBRARY.define(
    f"compress({_LOGITS}, SymInt k, float[] other_temperatures, bool need_entropy, bool need_values) "
    "-> (Tensor ids, Tensor log_probs, Tensor log_tail, Tensor entropy, Tensor other_tails, Tensor values)"
)
LIBRARY.define(f"draw({_LOGITS}, Tensor uniforms) -> Tensor")


class Kept(NamedTuple):
    """What `compress` returns of N rows; "acc" is float32, float64 for float64 logits."""

    ids: Tensor
    """int32 ``[N, k]``, ascending, -1 after the last."""
    log_probs: Tensor
    """acc ``[N, k]``, normalised by the whole row; -inf where ids is -1."""
    log_tail: Tensor
    """acc ``[N]``, log of the mass of the others, summed from them."""
    entropy: Tensor
    """acc ``[N]`` in nats, or ``[0]``."""
    other_tails: Tensor
    """acc ``[N, M]``, ``log_tail`` at the other temperatures."""
    values: Tensor
    """acc ``[N, k]``, the kept logits themselves, -inf where ids is -1; or ``[0]``."""


def topk_rows_(
    backend: str, side: Side, temperature: float, vocab: int, k: int, other_temperatures: Sequence[float],
    ids: Tensor, log_probs: Tensor, log_tail: Tensor, entropy: Tensor | None, other_tails: Tensor | None,
) -> None:  # fmt: skip
    """The k largest logits of each row, of equal ones the lower id first, with one backend.

    Entries of -inf are not kept; a row with NaN or +inf, or nothing but -inf, gets ids -1 and NaN elsewhere.
    """
    rows = eager_topk.topk_rows_ if backend == "eager" else _native_topk
    rows(side, temperature, vocab, k, other_temperatures, ids, log_probs, log_tail, entropy, other_tails)


def _native_topk(side: Side, temperature: float, vocab: int, k: int, others: Sequence[float], *results: Any) -> None:
    leaves.topk_(side.x, side.bias, side.scale, side.softcap, temperature, vocab, k, list(others), *results)


def draw_rows_(backend: str, side: Side, temperature: float, vocab: int, uniforms: Tensor, ids: Tensor) -> None:
    """For each of ``uniforms [C, n]`` (float64) the first entry whose cumulative mass exceeds it, with one backend.

    -1 for a number outside of [0, 1), and in a row with NaN or +inf, or nothing but -inf.
    """
    if backend == "eager":
        eager_topk.draw_rows_(side, temperature, vocab, uniforms, ids)
        return
    leaves.draw_(side.x, side.bias, side.scale, side.softcap, temperature, vocab, uniforms, ids)


def _chunks(source: Source, vocab: int, chunk_rows: int) -> Iterator[tuple[slice, Side]]:
    """So many rows at a time and their logits, which the next chunk overwrites where a head makes them."""
    like, n = source.input, source.input.shape[0]
    size = max(1, chunk_rows)
    with (
        _without_autocast(like.device.type),
        memory.workspace([source.chunk_shape(min(n, size), vocab)], like.dtype, like.device) as buffers,
    ):
        for begin, end in spans(n, size):
            rows = slice(begin, end)
            yield rows, source.chunk(like[rows], vocab, buffers[0])


def _values(side: Side, ids: Tensor) -> Tensor:
    """The logits of kept entries."""
    index = ids.clamp(min=0).long()
    x = side.x.gather(-1, index).to(accumulation_dtype(side.x.dtype))
    z = transform(x, None if side.bias is None else side.bias[index], side.scale, side.softcap)
    return torch.where(ids >= 0, z, -torch.inf)


def _outputs(logits: Tensor, k: int, others: int, need_entropy: bool, need_values: bool) -> Kept:
    n, acc = logits.shape[0], accumulation_dtype(logits.dtype)

    def new(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=acc)

    ids = logits.new_empty((n, k), dtype=torch.int32)
    entropy, values = new(n if need_entropy else 0), new(n, k) if need_values else new(0)
    return Kept(ids, new(n, k), new(n), entropy, new(n, others), values)


def compress(
    logits: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, softcap: float, temperature: float,
    vocab: int, chunk_rows: int, backend: str,
    k: int, other_temperatures: Sequence[float], need_entropy: bool, need_values: bool,
) -> Kept:  # fmt: skip
    """The largest entries of each row.

    Args:
        logits: hidden states ``[N, H]`` or, where ``weight`` is None, logits ``[N, >= vocab]``, unit stride along the
            vocabulary.
        weight, bias, scale, softcap: the head; bias ``[V]``, scale (1: none), softcap (0: none).
        temperature: T > 0.
        vocab: entries that exist; columns beyond are padding.
        chunk_rows: rows at work at a time: with a head those whose logits exist.
        backend: one that serves (see `kdkernels.backends`).
        k: 1 to vocab.
        other_temperatures: M temperatures at which the tail's mass is wanted too.
        need_entropy, need_values: whether those are wanted.

    Returns:
        `Kept`, as a tuple where the dispatcher returns it.
    """
    kept = _outputs(logits, k, len(other_temperatures), need_entropy, need_values)
    for rows, side in _chunks(Source(logits, weight, bias, scale, softcap), vocab, chunk_rows):
        entropy = kept.entropy[rows] if need_entropy else None
        other_tails = kept.other_tails[rows] if other_temperatures else None
        results = (kept.ids[rows], kept.log_probs[rows], kept.log_tail[rows], entropy, other_tails)
        topk_rows_(backend, side, temperature, vocab, k, other_temperatures, *results)
        if need_values:
            kept.values[rows] = _values(side, kept.ids[rows])
    return kept


LIBRARY.impl("compress", compress, EVERY_DEVICE)


@torch.library.register_fake("kdkernels::compress", lib=LIBRARY)
def _fake_compress(logits: Tensor, *args: Any) -> Kept:
    k, others, need_entropy, need_values = args[-4:]
    return _outputs(logits, k, len(others), need_entropy, need_values)


def draw(
    logits: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, softcap: float, temperature: float,
    vocab: int, chunk_rows: int, backend: str, uniforms: Tensor,
) -> Tensor:  # fmt: skip
    """Entries of each row by inversion of its cumulative mass at ``uniforms [N, n]``: int32 ``[N, n]``."""
    ids = uniforms.new_empty(uniforms.shape, dtype=torch.int32)
    for rows, side in _chunks(Source(logits, weight, bias, scale, softcap), vocab, chunk_rows):
        draw_rows_(backend, side, temperature, vocab, uniforms[rows], ids[rows])
    return ids


LIBRARY.impl("draw", draw, EVERY_DEVICE)


@torch.library.register_fake("kdkernels::draw", lib=LIBRARY)
def _fake_draw(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(args[-1].shape, dtype=torch.int32)
