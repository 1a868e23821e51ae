"""The three products of a linear head, each by the fastest GEMM that this machine's torch offers.

On a GPU, and in bfloat16 and float16 on a CPU, that is ``torch.mm``. In float32 on an AMD processor MKL takes a generic
path and oneDNN does not. oneDNN's entry point has no ``out=``, so those products run over tiles of the vocabulary: the
temporary of a tile stays in cache and below the allocator's mmap threshold, so that it costs no page faults.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

_TILE_BYTES = 4 * 2**20  # of one tile's temporary


@functools.cache
def _cpu_is_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            return any("AuthenticAMD" in line for line in lines)
    except OSError:
        return False


def _onednn_float32(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available() and _cpu_is_amd()
    )


def _onednn_mm(a: Tensor, b_transposed: Tensor) -> Tensor:
    """``a [m, k] b_transposed[n, k]^T`` in float32."""
    return torch.ops.mkldnn._linear_pointwise(a, b_transposed, None, "none", [], "")  # type: ignore[no-any-return]


def _tiles(vocab: int, row_bytes: int) -> Iterator[slice]:
    """Ranges of the vocabulary whose temporaries, ``row_bytes`` per entry, fit the tile."""
    size = max(256, _TILE_BYTES // max(1, row_bytes) // 64 * 64)
    return (slice(begin, begin + size) for begin in range(0, vocab, size))


def logits_(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out [C, V] = hidden [C, H] weight[V, H]^T``."""
    if not _onednn_float32(hidden):
        torch.mm(hidden, weight.t(), out=out)
        return
    for tile in _tiles(weight.shape[0], 4 * hidden.shape[0]):
        out[:, tile] = _onednn_mm(hidden, weight[tile])


def input_gradient_(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out [C, H] = dlogits [C, V] weight [V, H]``."""
    if not _onednn_float32(dlogits):
        torch.mm(dlogits, weight, out=out)
        return
    out.zero_()
    for tile in _tiles(weight.shape[0], 4 * dlogits.shape[0]):
        out += _onednn_mm(dlogits[:, tile], weight[tile].t())


def add_weight_gradient_(dlogits: Tensor, hidden: Tensor, out: Tensor, first: bool) -> None:
    """``out [V, H] (+)= dlogits[C, V]^T hidden [C, H]``; ``first``: out holds nothing yet.

    Where ``out`` is float32 and the operands are not, a GPU's GEMM adds to it without rounding; on a CPU, which has no
    GEMM of bfloat16 operands with a float32 result, each product is rounded once to their dtype and the sum over
    chunks is exact to float32.
    """
    if out.is_cuda and out.dtype != dlogits.dtype:
        if first:
            torch.mm(dlogits.t(), hidden, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, dlogits.t(), hidden, out_dtype=out.dtype, out=out)
        return
    onednn = _onednn_float32(dlogits)
    if first and not onednn and out.dtype == dlogits.dtype:
        torch.mm(dlogits.t(), hidden, out=out)
        return
    if not onednn and out.dtype == dlogits.dtype:
        torch.addmm(out, dlogits.t(), hidden, out=out)
        return
    for tile in _tiles(out.shape[0], out.element_size() * hidden.shape[1]):
        left = dlogits[:, tile].t()
        part = _onednn_mm(left.contiguous(), hidden.t()) if onednn else torch.mm(left, hidden)
        if first:
            out[tile] = part
        else:
            out[tile] += part
