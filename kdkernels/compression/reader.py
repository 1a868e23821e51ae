"""Reading a teacher cache with numpy alone: what data workers import, where loading torch would cost seconds.

    from kdkernels.compression.reader import CacheReader
    reader = CacheReader("cache")
    decoded = reader.read(17)            # ids [L, K], log_probs [L, K], log_tail [L], columns

`kdkernels.TeacherCache` gives the same as `SparseLogits`.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdkernels._checks import fail
from kdkernels.compression import codec
from kdkernels.compression.manifest import LAST_ID, AbsentExampleError, CacheError, Manifest, Settings, read_manifest
from kdkernels.compression.shard import Shard, input_hash

OPEN_SHARDS = 128  # files held open: an eighth of the usual limit of a process
Int64 = npt.NDArray[np.int64]


def is_id(example_id: Any) -> bool:
    """Whether an example can have this id: an int (numpy's too, no bool), 0 to 2**63 - 1."""
    try:
        return not isinstance(example_id, bool) and 0 <= operator.index(example_id) <= LAST_ID
    except TypeError:
        return False


def checked_id(example_id: Any) -> int:
    """An example id as an int."""
    if not is_id(example_id):
        fail(CacheError, "example_id", repr(example_id), "an int from 0 to 2**63 - 1")
    return operator.index(example_id)


class CacheReader:
    """Random access to the examples that were committed when it was opened; further ones after `reload`.

    Threads, forked and spawned processes may share one: shards are opened on first use, at most 128 at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._use(read_manifest(self.path))

    def reload(self) -> None:
        """Read the manifest again."""
        self._use(read_manifest(self.path))

    def _use(self, manifest: Manifest) -> None:
        """Take `manifest` for the state of the cache."""
        self.manifest = manifest
        self._firsts = [shard.first for shard in manifest.shards]
        # the largest id of any shard up to here: where it ends a search backwards, ranges of shards may overlap
        self._reach = list(accumulate((shard.last for shard in manifest.shards), max))
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._use(state["manifest"])

    @property
    def settings(self) -> Settings:
        """What the cache was created with."""
        return self.manifest.settings

    def __len__(self) -> int:
        return self.manifest.examples

    def __contains__(self, example_id: Any) -> bool:
        """False for what can be no id: a set of ids would say the same."""
        return is_id(example_id) and self._find(operator.index(example_id)) is not None

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            entry = self.manifest.shards[number]
            shard = self._open[number] = Shard(self.path / entry.file, entry)
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _find(self, example_id: int) -> tuple[Shard, int] | None:
        number = bisect_right(self._firsts, example_id) - 1
        while number >= 0 and self._reach[number] >= example_id:
            shard = self._shard(number)
            place = shard.find(example_id)
            if place >= 0:
                return shard, place
            number -= 1
        return None

    def _place(self, example_id: Any) -> tuple[Shard, int]:
        number = checked_id(example_id)
        found = self._find(number)
        if found is None:
            raise AbsentExampleError(
                f"example_id = {number}: the cache {str(self.path)!r} holds {self._range()}; "
                "build the cache over this example, or leave it out (`id in cache` tells)"
            )
        return found

    def _range(self) -> str:
        if not self.manifest.shards:
            return "no example yet"
        return f"{len(self)} examples from {self._firsts[0]} to {self._reach[-1]}, not this one"

    def block(self, example_id: Any) -> bytes:
        """The codec block of an example, its checksum verified."""
        shard, place = self._place(example_id)
        return shard.block(place)

    def input_hash(self, example_id: Any) -> int:
        """Hash of the tokens that the teacher read; 0 where none was recorded."""
        shard, place = self._place(example_id)
        return int(shard.input_hashes[place])

    def read(self, example_id: Any, input_ids: npt.ArrayLike | None = None) -> codec.Decoded:
        """One example; with `input_ids` [L], `CacheError` unless the teacher read exactly these tokens."""
        shard, place = self._place(example_id)
        if input_ids is not None:
            self.check_input(int(shard.input_hashes[place]), example_id, input_ids)
        block = shard.block(place)
        try:
            decoded = codec.decode(block, verify=False)  # the shard's checksum was compared
        except codec.CodecError as error:
            raise CacheError(f"example {example_id} of {str(shard.path)!r} cannot be decoded: {error}") from error
        if len(decoded.log_tail) != shard.rows[place]:
            raise CacheError(
                f"example {example_id} of {str(shard.path)!r} has {len(decoded.log_tail)} rows, not "
                f"{shard.rows[place]}; build it again"
            )
        return decoded

    def check_input(self, recorded: int, example_id: Any, input_ids: npt.ArrayLike) -> None:
        """Compare tokens with a recorded hash."""
        if recorded == 0:
            raise CacheError(
                f"input_ids: the cache {str(self.path)!r} records no tokens of example {example_id}, so they cannot "
                "be compared; read it without input_ids, or append with input_ids"
            )
        if recorded != input_hash(input_ids):
            raise CacheError(
                f"input_ids: example {example_id} of the cache {str(self.path)!r} was computed from other tokens; "
                "feed the student what the teacher read (same text, tokenizer, packing and seed), or build the cache "
                "again"
            )

    def ids(self) -> Int64:
        """All example ids, ascending, int64."""
        found = [self._shard(number).ids for number in range(len(self._firsts))]
        ids: Int64 = np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
        return ids

    def inputs(self) -> tuple[npt.NDArray[np.uint64], Int64]:
        """(hashes of tokens, ascending; their example ids), of the examples that have one; of equal ones the first."""
        shards = [self._shard(number) for number in range(len(self._firsts))]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(shard.input_hashes for shard in shards)])
        ids = np.concatenate([np.zeros(0, np.int64), *(shard.ids for shard in shards)])
        order = np.lexsort((ids, hashes))
        order = order[hashes[order] != 0]
        return hashes[order].astype(np.uint64), ids[order].astype(np.int64)

    def require(self, *, vocab_size: int | None = None, tokenizer_hash: str | None = None) -> None:
        """Raise `CacheError` unless a student of this vocabulary and tokeniser can learn from the cache."""
        ours = self.settings
        if vocab_size is not None and vocab_size != ours.vocab_size:
            remedy = "use the student's vocabulary when building the cache (--vocab-size cuts padding), or vocab_size="
            fail(CacheError, "vocab_size", vocab_size, f"the cache's, {ours.vocab_size}", remedy)
        if tokenizer_hash is not None and ours.tokenizer_hash and tokenizer_hash != ours.tokenizer_hash:
            made = f"{ours.tokenizer_hash!r} (tokenizer {ours.tokenizer!r}, teacher {ours.teacher!r})"
            remedy = "use that tokenizer, or build a cache with the student's"
            fail(CacheError, "tokenizer_hash", repr(tokenizer_hash), f"the cache's, {made}", remedy)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read and decode everything; what is wrong, one line each. `progress(examples done, of how many)`."""
        return list(self._problems(progress or (lambda done, of: None)))

    def _problems(self, progress: Callable[[int, int], None]) -> Iterator[str]:
        done, seen = 0, [np.zeros(0, np.int64)]
        for number, entry in enumerate(self.manifest.shards):
            try:
                shard = self._shard(number)
            except CacheError as error:
                yield str(error)
                done += entry.examples
                continue
            seen.append(shard.ids)
            for place, example_id in enumerate(shard.ids.tolist()):
                try:
                    self._verify_block(example_id, shard.block(place), int(shard.rows[place]))
                except (CacheError, codec.CodecError) as error:
                    yield str(error)
                done += 1
                progress(done, len(self))
        ids, counts = np.unique(np.concatenate(seen), return_counts=True)
        if (counts > 1).any():
            yield f"{int((counts > 1).sum())} examples are there twice, the first is {ids[counts > 1][0]}"

    def _verify_block(self, example_id: int, block: bytes, rows: int) -> None:
        info = codec.inspect(block)
        ours = self.settings
        codec.decode(block)
        if (info.rows, info.vocab_size, info.bits) != (rows, ours.vocab_size, ours.bits) or info.width > ours.k:
            raise CacheError(f"example {example_id}: its block is not of this cache ({info})")

    def stat(self) -> dict[str, Any]:
        """Counts and settings, plain values."""
        shards = self.manifest.shards
        rows, nbytes = (sum(getattr(shard, name) for shard in shards) for name in ("rows", "nbytes"))
        return {
            "path": str(self.path),
            "examples": len(self),
            "tokens": rows,
            "bytes": nbytes,
            "bytes_per_token": round(nbytes / rows, 2) if rows else 0.0,
            "shards": len(shards),
            "first": min(self._firsts, default=None),
            "last": max(self._reach, default=None),
            **self.settings.to_dict(),
        }
