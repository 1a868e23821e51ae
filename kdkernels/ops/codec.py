"""``kdkernels::encode_topk`` and ``decode_topk``: sparse rows as one block of bytes and back, as operators.

The work is that of `kdkernels.compression.codec`, on the CPU: tensors on another device are copied there, and what
comes back is on the CPU. How long a block is, and what it holds, follows from contents: a compiled graph has symbols
for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.compression import codec
from kdkernels.ops.library import EVERY_DEVICE, LIBRARY

LIBRARY.define(
    "encode_topk(Tensor ids, Tensor log_probs, Tensor log_tail, Tensor[] columns, str[] names, int vocab, int bits) "
    "-> Tensor"
)
LIBRARY.define("decode_topk(Tensor data) -> (Tensor ids, Tensor log_probs, Tensor log_tail, Tensor columns)")


def encode_topk(
    ids: Tensor, log_probs: Tensor, log_tail: Tensor, columns: Sequence[Tensor], names: Sequence[str],
    vocab: int, bits: int,
) -> Tensor:  # fmt: skip
    """A block, uint8 ``[nbytes]``, on the CPU.

    Args:
        ids: int32 ``[N, K]``, ascending, -1 after the last.
        log_probs, log_tail: ``[N, K]``, ``[N]``, float32 (float64 is rounded to that).
        columns: further numbers ``[N]``, kept as float32.
        names: of the columns.
        vocab: V.
        bits: see `kdkernels.compression.codec`.
    """
    block = codec.encode(
        ids.cpu().numpy(), _numbers(log_probs), _numbers(log_tail),
        vocab_size=vocab, bits=bits,
        columns={name: _numbers(column) for name, column in zip(names, columns, strict=True)},
    )  # fmt: skip
    return torch.frombuffer(bytearray(block), dtype=torch.uint8)


def _numbers(x: Tensor) -> codec.Float32:
    array: codec.Float32 = x.detach().float().cpu().numpy()
    return array


LIBRARY.impl("encode_topk", encode_topk, EVERY_DEVICE)


@torch.library.register_fake("kdkernels::encode_topk", lib=LIBRARY)
def _fake_encode(
    ids: Tensor, log_probs: Tensor, log_tail: Tensor, columns: Sequence[Tensor], names: Sequence[str],
    vocab: int, bits: int,
) -> Tensor:  # fmt: skip
    nbytes = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(nbytes, dtype=torch.uint8, device="cpu")


def decode_topk(data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a block holds: ids int32 ``[N, K]``; log_probs, log_tail, columns float32 ``[N, K]``, ``[N]``, ``[M, N]``.

    Raises:
        CodecError: the bytes are no block, or were damaged.
    """
    rows = codec.decode(data.cpu().numpy())
    columns = torch.empty(len(rows.columns), len(rows.log_tail))
    for row, column in zip(columns, rows.columns.values(), strict=True):
        row.copy_(torch.from_numpy(column))
    return torch.from_numpy(rows.ids), torch.from_numpy(rows.log_probs), torch.from_numpy(rows.log_tail), columns


LIBRARY.impl("decode_topk", decode_topk, EVERY_DEVICE)


@torch.library.register_fake("kdkernels::decode_topk", lib=LIBRARY)
def _fake_decode(data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width, columns = (torch.library.get_ctx().new_dynamic_size() for _ in range(3))

    def numbers(*shape: int | torch.SymInt, dtype: torch.dtype = torch.float32) -> Tensor:
        return data.new_empty(shape, dtype=dtype, device="cpu")

    return numbers(rows, width, dtype=torch.int32), numbers(rows, width), numbers(rows), numbers(columns, rows)
