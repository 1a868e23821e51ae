"""Rows of a dataset with axolotl's or DistillKit's columns as top-k examples.

axolotl: `target_token_ids` and `target_logprobs` [L][K], perhaps `target_mask` [L][K] (0: no entry), `input_ids`.
DistillKit: `token_ids` and `top_values` [L][K]; or, packed, `bytepacked_indices` and `compressed_logprobs` [L][bytes],
for which the compression settings are needed, and of which the lossless kind is read (exact_k = k, no polynomial, no
residual bins): ids are big-endian bit strings of ceil(log2 d) bits, values little-endian numbers of `exact_dtype`,
most likely first, with `delta_encoding` as differences. What its lossy kinds kept is for DistillKit to unpack.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdkernels._checks import fail
from kdkernels.compression.importers import TopK
from kdkernels.compression.manifest import CacheError

Array = npt.NDArray[Any]
_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}


class Columns:
    """A dataset's rows, numbered in their order.

    k: the most entries a row has; None looks through all of them, one at a time, before the import begins.
    """

    def __init__(
        self,
        form: str,
        source: str | Path | Sequence[Mapping[str, Any]],
        vocab: int,
        packed: Mapping[str, Any] | None,
        k: int | None = None,
    ) -> None:
        self.form, self.vocab = form, vocab
        self.where = str(source) if isinstance(source, (str, Path)) else type(source).__name__
        self.rows = _open(Path(source)) if isinstance(source, (str, Path)) else source
        if not len(self.rows):
            fail(CacheError, "source", repr(self.where), "a dataset with at least one row")
        self.packing = None if packed is None else _Packing.read(packed, vocab)
        first = self._example(0, self.rows[0])  # columns that are not there are told at once
        self.k = self._widest(first.ids.shape[-1]) if k is None else k

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TopK]:
        for number in range(len(self.rows)):
            yield self._example(number, self.rows[number])

    def _widest(self, first: int) -> int:
        name = "target_token_ids" if self.form == "axolotl" else "token_ids"
        if name not in self.rows[0]:
            return first  # packed: every row is of one width
        select = getattr(self.rows, "select_columns", None)  # of a Dataset, which then reads no other column
        rows = self.rows if select is None else select([name])
        matrices = (_matrix(rows[i], name, f"{self.where}[{i}]", np.int64) for i in range(len(rows)))
        return max(int(matrix.shape[-1]) for matrix in matrices)

    def _example(self, number: int, row: Mapping[str, Any]) -> TopK:
        where = f"{self.where}[{number}]"
        if self.form == "axolotl":
            ids, log_probs = _axolotl(row, where)
        else:
            ids, log_probs = self._distillkit(row, where)
        tokens = None if row.get("input_ids") is None else np.asarray(row["input_ids"], np.int64)
        return TopK(number, ids, log_probs, None, tokens, where)

    def _distillkit(self, row: Mapping[str, Any], where: str) -> tuple[Array, Array]:
        if "top_values" in row and "token_ids" in row:
            return _matrix(row, "token_ids", where, np.int64), _matrix(row, "top_values", where, np.float32)
        if "bytepacked_indices" in row and "compressed_logprobs" in row:
            if self.packing is None:
                remedy = "give DistillKit's settings (d, k, exact_k, exact_dtype, delta_encoding) as JSON"
                fail(CacheError, "compression", None, "there for packed columns", remedy)
            return self.packing.unpack(
                _matrix(row, "bytepacked_indices", where, np.uint8),
                _matrix(row, "compressed_logprobs", where, np.uint8), where,
            )  # fmt: skip
        allowed = "columns token_ids and top_values, or bytepacked_indices and compressed_logprobs"
        return fail(
            CacheError, f"{where}: columns", sorted(row), allowed, "legacy columns are for DistillKit to unpack"
        )


def _axolotl(row: Mapping[str, Any], where: str) -> tuple[Array, Array]:
    if not {"target_token_ids", "target_logprobs"} <= set(row):
        fail(CacheError, f"{where}: columns", sorted(row), "target_token_ids, target_logprobs, perhaps target_mask")
    ids = _matrix(row, "target_token_ids", where, np.int64)
    log_probs = _matrix(row, "target_logprobs", where, np.float32)
    if row.get("target_mask") is not None:
        mask = _matrix(row, "target_mask", where, np.int64)
        if mask.shape != ids.shape:
            fail(CacheError, f"{where}: target_mask", list(mask.shape), f"of the ids' shape, {list(ids.shape)}")
        ids = np.where(mask != 0, ids, -1)
    return ids, log_probs


def _matrix(row: Mapping[str, Any], name: str, where: str, dtype: Any) -> Array:
    try:
        array = np.asarray(row[name])
        if array.ndim == 2 and array.dtype.kind in "iuf":
            return array.astype(dtype)
    except ValueError:  # rows of different lengths
        pass
    return fail(CacheError, f"{where}: {name}", type(row[name]).__name__, "numbers [L][K], every row of one length")


class _Packing:
    """DistillKit's settings of a lossless compression."""

    def __init__(self, bits: int, k: int, dtype: str, delta: bool) -> None:
        self.bits, self.k, self.dtype, self.delta = bits, k, dtype, delta

    @classmethod
    def read(cls, given: Mapping[str, Any], vocab: int) -> _Packing:
        if missing := {"d", "k", "exact_k", "delta_encoding"} - set(given):
            fail(CacheError, "compression", sorted(given), f"to have {sorted(missing)} as well")
        lossy = given.get("polynomial_terms") or given.get("residual_bins") or given["exact_k"] != given["k"]
        if lossy:
            remedy = "unpack the rest with DistillKit, and import token_ids and top_values"
            fail(
                CacheError, "compression", dict(given), "lossless: exact_k = k, no polynomial, no residual bins", remedy
            )
        dtype = given.get("exact_dtype", "float32")
        if dtype not in _DTYPES:
            fail(CacheError, "compression exact_dtype", repr(dtype), "one of " + ", ".join(_DTYPES))
        d, k = given["d"], given["k"]
        if not (isinstance(d, int) and isinstance(k, int) and 1 <= k <= d == vocab):
            fail(CacheError, "compression d, k", f"{d}, {k}", f"vocab_size ({vocab}) and at most that")
        return cls(max(1, (d - 1).bit_length()), k, dtype, bool(given["delta_encoding"]))

    def unpack(self, indices: Array, values: Array, where: str) -> tuple[Array, Array]:
        """ids and log-probabilities [L, k] from bytes [L, ...]."""
        dtype = np.dtype(_DTYPES[self.dtype])
        sizes = (-(-self.k * self.bits // 8), self.k * dtype.itemsize)
        if (indices.shape[1], values.shape[1]) != sizes or len(indices) != len(values):
            fail(
                CacheError, f"{where}: packed columns", f"{indices.shape}, {values.shape} bytes",
                f"[L, {sizes[0]}], [L, {sizes[1]}] by the compression settings", "give those they were packed with",
            )  # fmt: skip
        bits = np.unpackbits(indices, axis=-1)[:, : self.k * self.bits].reshape(len(indices), self.k, self.bits)
        ids = bits.astype(np.int64) @ (1 << np.arange(self.bits - 1, -1, -1, dtype=np.int64))
        numbers = np.ascontiguousarray(values).view(dtype)
        if self.dtype == "bfloat16":
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        logs = numbers.astype(np.float32)
        return ids, np.cumsum(logs, axis=-1, dtype=np.float32) if self.delta else logs


def _open(path: Path) -> Sequence[Mapping[str, Any]]:
    """A dataset saved by `datasets`, a .parquet file, or a folder of them."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if not path.exists() or (path.is_file() and not files):
        fail(CacheError, "source", repr(str(path)), "a dataset's folder or .parquet files, and to exist")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise CacheError(
            "importing a dataset needs datasets, which is not installed: pip install 'kdkernels[datasets]'"
        ) from error
    try:
        if files:
            loaded = datasets.Dataset.from_parquet([str(file) for file in files], keep_in_memory=False)
        else:
            loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise CacheError(f"source {str(path)!r} cannot be read as a dataset ({str(error).splitlines()[0]})") from error
    if isinstance(loaded, Mapping):
        fail(CacheError, "source", repr(str(path)), f"one split: {', '.join(map(str, loaded))}", "give its subfolder")
    rows: Sequence[Mapping[str, Any]] = loaded
    return rows
