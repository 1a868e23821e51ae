"""Shards: one file with the blocks of many examples, a valid safetensors file with five small arrays before them.

    8 bytes       length of the header, little-endian
    header        JSON: `__metadata__` (the cache's settings) and the place of every array, padded with blanks
    ids           I64 [n]     example ids, ascending
    offsets       I64 [n + 1] where each example's block begins in `blocks`; the last is their total
    input_hashes  U64 [n]     `input_hash` of the example's tokens; 0 where none was given
    rows          I32 [n]     tokens of the example
    checksums     U32 [n]     CRC-32 (zlib's) of the example's block. Not CRC-32C, which a block ends with: over a
                          message and its own CRC every CRC is one constant, so that any block would do
    blocks        U8 [total]  one codec block an example (`kdkernels.compression.format`)

Everything before `blocks` is the head; the manifest holds its SHA-256. The head binds ids to checksums and offsets, so
blocks that trade places are noticed, and no byte of the file is outside some checksum.
Blocks are fetched with `pread`: a truncated file or a failing disk is then an exception, where a memory map would end
the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdkernels._checks import fail
from kdkernels.compression.manifest import FORMAT, VERSION, CacheError, Settings, ShardEntry, shard_name
from kdkernels.durable import replace_file

LARGEST_HEADER = 1 << 20
_ARRAYS = (
    ("ids", "I64", "<i8"),
    ("offsets", "I64", "<i8"),
    ("input_hashes", "U64", "<u8"),
    ("rows", "I32", "<i4"),
    ("checksums", "U32", "<u4"),
)


@dataclass(frozen=True)
class Example:
    """One example as it is stored: a codec block, its tokens, and the hash of what the teacher read."""

    id: int
    rows: int
    input_hash: int
    block: bytes


def input_hash(input_ids: npt.ArrayLike) -> int:
    """64-bit hash of token ids [L] (any integer dtype), never 0: BLAKE2b of them as little-endian int64."""
    tokens = np.asarray(input_ids)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"{tokens.dtype} of shape {list(tokens.shape)}"
        fail(CacheError, "input_ids", found, "integer token ids [L]", "pass one example's tokens")
    tokens = np.ascontiguousarray(tokens, dtype="<i8")
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little") or 1


def stamp(settings: Settings) -> dict[str, str]:
    """What a shard says of its cache."""
    return {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(settings.to_dict(), sort_keys=True)}


def write_shard(folder: Path, examples: Sequence[Example], settings: Settings) -> ShardEntry:
    """Write `examples` (ids ascending) as one shard: temporary file, fsync, rename. Raises OSError."""
    sizes = [len(example.block) for example in examples]
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": np.array([example.id for example in examples], "<i8"),
        "offsets": np.concatenate([[0], np.cumsum(sizes)]).astype("<i8"),
        "input_hashes": np.array([example.input_hash for example in examples], "<u8"),
        "rows": np.array([example.rows for example in examples], "<i4"),
        "checksums": np.array([zlib.crc32(example.block) for example in examples], "<u4"),
    }
    header: dict[str, Any] = {"__metadata__": stamp(settings)}
    at = 0
    for name, kind, _ in _ARRAYS:
        header[name] = {"dtype": kind, "shape": [len(arrays[name])], "data_offsets": [at, at + arrays[name].nbytes]}
        at += arrays[name].nbytes
    header["blocks"] = {"dtype": "U8", "shape": [sum(sizes)], "data_offsets": [at, at + sum(sizes)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values())
    first, last = examples[0].id, examples[-1].id
    name = shard_name(first, last)
    replace_file(folder / name, lambda file: file.writelines((head, *(example.block for example in examples))))
    rows = sum(example.rows for example in examples)
    return ShardEntry(
        name, first, last, len(examples), rows, len(head) + sum(sizes), hashlib.sha256(head).hexdigest()
    )  # fmt: skip


class Shard:
    """An open shard: its head in memory and checked, its blocks fetched one by one. Safe to share and to fork."""

    def __init__(self, path: Path, entry: ShardEntry | None = None) -> None:
        """Open `path`; with `entry`, it must be what the manifest says."""
        self.path = path
        self._file = -1
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
            size = os.fstat(self._file).st_size
            if entry is not None and size != entry.nbytes:
                raise self._damaged(f"it has {size} bytes, not {entry.nbytes}")
            self._read_head(size, entry)
        except FileNotFoundError:
            raise CacheError(f"shard {str(path)!r} is missing; restore it from a copy") from None
        except OSError as error:
            raise CacheError(f"shard {str(path)!r} cannot be read ({error.strerror})") from error

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._file >= 0:
            close(self._file)

    def _damaged(self, why: str) -> CacheError:
        return CacheError(f"shard {str(self.path)!r} is damaged: {why}; restore it from a copy, or build it again")

    def _read(self, size: int, at: int) -> bytes:
        data = os.pread(self._file, size, at)
        if len(data) != size:
            raise self._damaged(f"it ends before byte {at + size}")
        return data

    def _read_head(self, size: int, entry: ShardEntry | None) -> None:
        length = int.from_bytes(self._read(8, 0), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise self._damaged(f"its header cannot have {length} bytes")
        text = self._read(length, 8)
        places = self._places(text, size - 8 - length)
        self._blocks = 8 + length + places["blocks"][0]
        head = self._read(self._blocks, 0)
        digest = hashlib.sha256(head).hexdigest()
        if entry is not None and digest != entry.head:
            raise self._damaged("the checksum of its head is wrong")
        arrays = {
            name: np.frombuffer(head, dtype, (places[name][1] - places[name][0]) // np.dtype(dtype).itemsize,
                                8 + length + places[name][0])
            for name, _, dtype in _ARRAYS
        }  # fmt: skip
        self.ids, self.offsets, self.rows = arrays["ids"], arrays["offsets"], arrays["rows"]
        self.input_hashes, self.checksums = arrays["input_hashes"], arrays["checksums"]
        self._check_arrays(places["blocks"][1] - places["blocks"][0])
        first, last = int(self.ids[0]), int(self.ids[-1])
        self._contiguous = last - first + 1 == len(self.ids)
        rows = int(self.rows.sum(dtype=np.int64))
        self.entry = ShardEntry(shard_name(first, last), first, last, len(self.ids), rows, size, digest)
        if entry is not None and entry != self.entry:
            raise self._damaged("it is not the one that the manifest lists")

    def _places(self, text: bytes, data: int) -> dict[str, tuple[int, int]]:
        """Begin and end of every array after the header, which must lie end to end and fill `data` bytes."""
        try:
            header = json.loads(text)
            self.stamp = dict(header.pop("__metadata__"))
            n = header["ids"]["shape"][0]
            if type(n) is not int or not 1 <= n <= data // 32:
                raise ValueError("a wrong number of examples")
            at, places = 0, {}
            for name, kind, dtype in _ARRAYS:
                count = n + (name == "offsets")
                end = at + count * np.dtype(dtype).itemsize
                if header.pop(name) != {"dtype": kind, "shape": [count], "data_offsets": [at, end]}:
                    raise ValueError(f"{name} is not where it belongs")
                places[name], at = (at, end), end
            if header != {"blocks": {"dtype": "U8", "shape": [data - at], "data_offsets": [at, data]}}:
                raise ValueError("blocks are not where they belong")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise self._damaged(f"its header cannot be read ({str(error)[:80]})") from None
        places["blocks"] = (at, data)
        return places

    def _check_arrays(self, total: int) -> None:
        if self.offsets[0] != 0 or self.offsets[-1] != total or (np.diff(self.offsets) < 0).any():
            raise self._damaged("its offsets are wrong")
        if self.ids[0] < 0 or (np.diff(self.ids) <= 0).any() or (self.rows < 0).any():
            raise self._damaged("its ids or rows are wrong")

    def find(self, example_id: int) -> int:
        """Position of an example, or -1."""
        entry = self.entry
        if not entry.first <= example_id <= entry.last:
            return -1
        if self._contiguous:
            return example_id - entry.first
        place = int(self.ids.searchsorted(example_id))
        return place if self.ids[place] == example_id else -1

    def block(self, place: int) -> bytes:
        """The checked block of the example at a position."""
        begin, end = self.offsets[place : place + 2].tolist()
        try:
            block = self._read(end - begin, self._blocks + begin)
        except OSError as error:
            raise CacheError(f"shard {str(self.path)!r} cannot be read ({error.strerror})") from error
        if zlib.crc32(block) != self.checksums[place]:
            raise self._damaged(f"the checksum of example {self.ids[place]} is wrong")
        return block
