"""Blocks of sparse distributions as bytes and back: `encode`, `decode`, `inspect`. Numpy only, no torch.

A block holds N rows of up to K kept entries each, as `kdkernels.SparseLogits` has them, and further columns of one
float32 number a row. Any row is decoded without the others. `kdkernels.compression.format` says what the bytes are.

Ids take about 1.02 times log2 C(V, k) bits if they are spread at random over the vocabulary, and less if they crowd
together, as a teacher's do. Of log-probabilities, ``bits`` says what is kept:

| bits | kept | largest error of a row, nats |
|---|---|---|
| 4 to 12 | 2**bits - 1 even steps over the row's own range, and -inf | range / (2**bits - 2), plus 1 % |
| 16 | float16 | 2**-11 of the number, at most; below -65504: what is missing to -65504 |
| 32 | float32 | 0 |

Frequencies of draws, log(count / n), take 32 bits unless others are asked for: steps would turn an unbiased estimate
into a biased one. ``round(n * exp(log_prob))`` still gives back every count of up to n = 64 draws at 8 bits, and of up
to 2700 at 16.

Steps are even in the log-probability: on real teachers finer steps for the probable entries lower the mean divergence
by a tenth at the most, and double the largest error. Codes are placed such that the row's kept mass stays what it was
(to 3e-7): the decoded distribution needs no renormalising, and what it loses is second order in the error. A row that
spans more than 512 nats (a finite mask value was kept) is stored exactly.

The work is done by `kdkernels._codec`, with the interpreter lock released; there is no slower stand-in, since a cache
that can be read only a hundred times slower would look like a hang.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kdkernels._checks import fail

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]
BITS = (*range(4, 13), 16, 32)
USUAL_BITS = {"topk": 8, "sampled": 32}
"""By kind of `kdkernels.SparseLogits`: likely entries quantised, frequencies exact."""
_NO_COLUMNS: Mapping[str, Float32] = MappingProxyType({})


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
        max_error: largest ``|decoded - encoded|`` log-probability of the block, nats, as measured by the encoder;
            0 at 32 bits.
        columns: names of the further columns.
        id_bits: bits that the ids take, of ``8 * nbytes``.
    """

    rows: int
    width: int
    vocab_size: int
    bits: int
    nbytes: int
    max_error: float
    columns: tuple[str, ...]
    id_bits: int


def _native() -> ModuleType:
    try:
        from kdkernels import _codec
    except ImportError as error:
        raise RuntimeError(
            f"kdkernels: no native codec ({error}): kdkernels was installed without native code (KD_BUILD=none, or a "
            "platform other than Linux), or this source tree was never built. "
            "To build it: pip install . (in a source tree: pip install -e . --no-build-isolation)"
        ) from None
    return _codec


def _array(name: str, value: Any, dtype: type[Any], dims: int) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        fail(TypeError, name, type(value).__name__, "a numpy array", "use np.asarray (of a tensor: x.numpy())")
    if value.dtype != dtype:
        wanted = np.dtype(dtype).name
        fail(TypeError, f"{name} dtype", value.dtype, wanted, f"use .astype(np.{wanted})")
    if value.ndim != dims:
        fail(ValueError, f"{name} shape", list(value.shape), "[N, K]" if dims == 2 else "[N]")
    return np.ascontiguousarray(value)


def _column(name: str, value: Any, rows: int) -> Float32:
    column = _array(name, value, np.float32, 1)
    if len(column) != rows:
        fail(ValueError, f"{name} shape", list(column.shape), f"[{rows}], one number a row of ids")
    return column


def _int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        fail(TypeError, name, repr(value), "an int")
    number = operator.index(value)
    if not 0 <= number < 2**31:
        fail(ValueError, name, number, "at least 0 and less than 2^31")
    return number


def encode(
    ids: Int32,
    log_probs: Float32,
    log_tail: Float32,
    *,
    vocab_size: int,
    bits: int = 8,
    columns: Mapping[str, Float32] = _NO_COLUMNS,
) -> bytes:
    """Rows as one block of bytes.

    Args:
        ids: token ids ``[N, K]``, int32, ascending in each row, -1 after the last kept entry of a shorter row.
        log_probs: their log-probabilities ``[N, K]``, float32; -inf is allowed, and kept; what stands beside -1 is not
            looked at.
        log_tail: log of the mass not kept ``[N]``, float32, -inf if there is none. Kept exactly.
        vocab_size: V.
        bits: of a log-probability: 4 to 12, 16 or 32; see the module.
        columns: further float32 numbers ``[N]`` by name. Kept exactly, NaN included.

    Raises:
        TypeError, ValueError: naming the argument (with row and column), its value, what is allowed and what to do.
        RuntimeError: no native code here.
    """
    native = _native()
    ids = _array("ids", ids, np.int32, 2)
    log_probs = _array("log_probs", log_probs, np.float32, 2)
    if log_probs.shape != ids.shape:
        fail(ValueError, "log_probs shape", list(log_probs.shape), f"that of ids, {list(ids.shape)}")
    log_tail = _column("log_tail", log_tail, len(ids))
    for name in columns:
        if not isinstance(name, str):
            fail(TypeError, "columns", repr(name), "named by str")
    further = {name: _column(f"columns[{name!r}]", values, len(ids)) for name, values in columns.items()}
    block: bytes = native.encode(ids, log_probs, log_tail, _int("vocab_size", vocab_size), _int("bits", bits), further)
    return block


def _view(block: Buffer) -> memoryview:
    try:
        view = memoryview(cast("bytes", block))
    except TypeError:
        fail(TypeError, "block", type(block).__name__, "bytes, a memoryview or a numpy array of uint8")
    if not view.c_contiguous or view.ndim != 1 or view.itemsize != 1:
        fail(ValueError, "block", f"{view.ndim}-dimensional {view.format!r}", "contiguous bytes", "use .tobytes()")
    return view


def decode(block: Buffer, rows: slice | None = None, *, verify: bool = True) -> Decoded:
    """Rows of a block; of others only the place is looked at.

    Args:
        block: what `encode` gave.
        rows: any slice of the rows; None for all.
        verify: compare the checksum over the whole block first (some 10 GB/s). Without it a damaged block may give
            wrong numbers, though never a crash: for many small reads of a block that was verified once.

    Raises:
        CodecError: the bytes are no block, are damaged, or were written by a newer version.
        TypeError, ValueError: ``block`` is no bytes, ``rows`` no slice.
        RuntimeError: no native code here.
    """
    native = _native()
    if rows is not None and not isinstance(rows, slice):
        fail(TypeError, "rows", repr(rows), "a slice or None", "for row i: slice(i, i + 1)")
    try:
        return Decoded(*native.decode(_view(block), slice(None) if rows is None else rows, verify))
    except native.CodecError as error:
        raise CodecError(str(error)) from None


def inspect(block: Buffer, *, verify: bool = True) -> BlockInfo:
    """What a block says of itself; arguments and errors as those of `decode`."""
    native = _native()
    try:
        return BlockInfo(**native.inspect(_view(block), verify))
    except native.CodecError as error:
        raise CodecError(str(error)) from None
