"""Blocks of sparse distributions as bytes and back: `encode`, `decode`, `inspect`. Numpy only, no torch.

A block holds N rows of up to K kept entries each, as `kdkernels.SparseLogits` has them, and further columns of one
float32 number a row. Any row is decoded without the others. `kdkernels.compression.format` says what the bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdkernels._checks import fail

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
BITS = (*range(4, 13), 16, 32)


class CodecError(ValueError):
    """The bytes are not a block, or not one that this version reads, or they were damaged."""


@dataclass(frozen=True)
class Decoded:
    """Rows of a block.

    Args:
        ids: token ids ``[n, K]``, int32, ascending in each row; -1 after the last kept entry.
        log_probs: float32 ``[n, K]``; -inf where ``ids`` is -1.
        log_tail: float32 ``[n]``.
        columns: the further columns, by name, float32 ``[n]`` each.
    """

    ids: Int32
    log_probs: Float32
    log_tail: Float32
    columns: dict[str, Float32]


@dataclass(frozen=True)
class BlockInfo:
    """What a block says of itself.

    Args:
        rows: N.
        width: K, the columns of ``ids``.
        vocab_size: V.
        bits: 4 to 12 (quantised), 16 (float16) or 32 (float32) a log-probability.
        nbytes: bytes of the whole block.
        max_error: largest ``|decoded - encoded|`` log-probability of the block, nats; 0 at 32 bits.
        columns: names of the further columns.
    """

    rows: int
    width: int
    vocab_size: int
    bits: int
    nbytes: int
    max_error: float
    columns: tuple[str, ...]


def _array(name: str, value: Any, dtype: type[Any], dims: int) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        fail(TypeError, name, type(value).__name__, "a numpy array", "use np.asarray (of a tensor: x.numpy())")
    if value.dtype != dtype:
        fail(TypeError, f"{name} dtype", value.dtype, np.dtype(dtype).name, f"use .astype(np.{np.dtype(dtype).name})")
    if value.ndim != dims:
        fail(ValueError, f"{name} shape", list(value.shape), "[N, K]" if dims == 2 else "[N]")
    return np.ascontiguousarray(value)


_MAGIC = b"KDtmp000"


def encode(
    ids: Int32,
    log_probs: Float32,
    log_tail: Float32,
    *,
    vocab_size: int,
    bits: int = 8,
    columns: Mapping[str, Float32] | None = None,
) -> bytes:
    """Rows as one block of bytes."""
    import io

    ids, log_probs = _array("ids", ids, np.int32, 2), _array("log_probs", log_probs, np.float32, 2)
    log_tail = _array("log_tail", log_tail, np.float32, 1)
    extra = {f"c_{k}": _array(f"columns[{k!r}]", v, np.float32, 1) for k, v in (columns or {}).items()}
    out = io.BytesIO()
    np.savez(out, i=ids, p=log_probs, t=log_tail, m=np.array([vocab_size, bits]), **extra)  # type: ignore[arg-type]
    return _MAGIC + out.getvalue()


def _load(block: bytes | memoryview | NDArray[np.uint8]) -> Any:
    import io
    import zipfile

    raw = bytes(block)
    if raw[:8] != _MAGIC:
        raise CodecError("block: not a block of kdkernels")
    try:
        return dict(np.load(io.BytesIO(raw[8:]), allow_pickle=False))
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError) as error:
        raise CodecError(f"block: damaged ({error})") from None


def decode(block: bytes | memoryview | NDArray[np.uint8], rows: slice | None = None) -> Decoded:
    """Rows of a block."""
    x, at = _load(block), rows or slice(None)
    columns = {k[2:]: v[at] for k, v in x.items() if k.startswith("c_")}
    return Decoded(x["i"][at], np.where(x["i"] >= 0, x["p"], -np.inf)[at].astype(np.float32), x["t"][at], columns)


def inspect(block: bytes | memoryview | NDArray[np.uint8]) -> BlockInfo:
    """What a block says of itself."""
    x = _load(block)
    names = tuple(k[2:] for k in x if k.startswith("c_"))
    vocab, bits = (int(v) for v in x["m"])
    return BlockInfo(*x["i"].shape, vocab, bits, len(block), 0.0, names)
