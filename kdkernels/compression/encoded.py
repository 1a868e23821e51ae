"""`EncodedLogits`: a `SparseLogits` packed into few bytes, for users of PyTorch.

The work is that of the operators ``kdkernels::encode_topk`` and ``decode_topk`` (`kdkernels.ops.codec`): on the CPU,
tensors on a GPU are copied there first. CPU tensors reach the codec as numpy views, without a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels._checks import fail
from kdkernels.compression import codec
from kdkernels.ops import codec as _operators  # noqa: F401  registers them

if TYPE_CHECKING:
    from kdkernels.sparse_logits import SparseLogits

ENTROPY = "entropy"
TAIL = "log_tail@"  # and the temperature


@dataclass(frozen=True, eq=False)
class EncodedLogits:
    """What `SparseLogits.encode` gives: the rows as one block of `kdkernels.compression.codec`.

    Args:
        data: the block, uint8 ``[nbytes]``; a tensor, so that it can be saved and sent like any other.
        shape: leading shape of the rows.
        temperature, kind: of the `SparseLogits`.
    """

    data: Tensor
    shape: tuple[int, ...]
    temperature: float = 1.0
    kind: str = "topk"

    def __post_init__(self) -> None:
        if not isinstance(self.data, Tensor) or self.data.dtype != torch.uint8 or self.data.dim() != 1:
            given = (
                f"{list(self.data.shape)} of {self.data.dtype}" if isinstance(self.data, Tensor) else type(self.data)
            )
            fail(TypeError, "data", given, "a uint8 tensor [nbytes]", "use SparseLogits.encode")

    def __repr__(self) -> str:
        """Sizes and settings, not bytes."""
        settings = f"temperature={self.temperature}, kind={self.kind!r}"
        return f"EncodedLogits(nbytes={self.nbytes}, shape={list(self.shape)}, {settings})"

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return self.data.numel()

    def info(self) -> codec.BlockInfo:
        """What the block says of itself, the largest error of a log-probability included."""
        return codec.inspect(self.data.cpu().numpy())

    def decode(self, device: torch.device | str = "cpu") -> SparseLogits:
        """The rows again, float32: ids, tails and entropy exactly, log-probabilities to within ``info().max_error``.

        Raises:
            CodecError: the block was damaged.
        """
        from kdkernels.sparse_logits import SparseLogits

        facts = codec.inspect(self.data.cpu().numpy(), verify=False)
        if facts.rows != math.prod(self.shape):
            fail(ValueError, "shape", list(self.shape), f"that of the block's {facts.rows} rows")
        ids, log_probs, log_tail, further = torch.ops.kdkernels.decode_topk(self.data)

        def shaped(x: Tensor) -> Tensor:
            return x.reshape((*self.shape, *x.shape[1:])).to(device)

        columns = {name: shaped(x) for name, x in zip(facts.columns, further, strict=True)}
        tails = {float(name[len(TAIL) :]): x for name, x in columns.items() if name.startswith(TAIL)}
        return SparseLogits(
            shaped(ids), shaped(log_probs), shaped(log_tail),
            facts.vocab_size, self.temperature, self.kind, columns.get(ENTROPY), tails,
        )  # fmt: skip


def columns_of(sparse: SparseLogits) -> dict[str, Tensor]:
    """Entropy and tails at other temperatures by the names under which a block keeps them."""
    tails = {f"{TAIL}{float(temperature)!r}": x for temperature, x in sparse.other_tails.items()}
    return tails if sparse.entropy is None else {ENTROPY: sparse.entropy, **tails}


def encode(sparse: SparseLogits, bits: int | None = None) -> EncodedLogits:
    """What `SparseLogits.encode` does: docstring there."""
    width, rows = sparse.ids.shape[-1], sparse.log_tail.numel()
    columns = columns_of(sparse)
    data = torch.ops.kdkernels.encode_topk(
        sparse.ids.reshape(rows, width), sparse.log_probs.reshape(rows, width), sparse.log_tail.reshape(rows),
        [x.reshape(rows) for x in columns.values()], list(columns), sparse.vocab_size,
        codec.USUAL_BITS[sparse.kind] if bits is None else bits,
    )  # fmt: skip
    return EncodedLogits(data, tuple(sparse.ids.shape[:-1]), sparse.temperature, sparse.kind)
