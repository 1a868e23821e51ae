"""`TeacherCache`: a teacher's sparse distributions on disk, written once, read by example id.

    with kd.TeacherCache.create("cache", vocab_size=151936, k=64, teacher="Qwen/Qwen3-8B") as cache:
        for example_id, tokens in enumerate(blocks):                       # tokens [L]
            cache.append(example_id, kd.compress(teacher(tokens), k=64), input_ids=tokens)

    cache = kd.TeacherCache.open("cache")
    teacher = cache.get(17, input_ids=tokens)                              # SparseLogits [L, K]
    loss = kd.distillation_loss(student_logits, teacher, labels=labels, shift=True)

What lies on disk: `shard` and `manifest`. Reading without torch: `reader`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdkernels._checks import fail
from kdkernels.compression import codec
from kdkernels.compression.dataset import CacheDataset
from kdkernels.compression.encoded import ENTROPY, TAIL
from kdkernels.compression.manifest import CacheError, Settings
from kdkernels.compression.merge import merge
from kdkernels.compression.reader import CacheReader, Int64
from kdkernels.compression.writer import SHARD_BYTES, CacheWriter
from kdkernels.sparse_logits import SparseLogits


class TeacherCache:
    """A cache opened by `open` (to read), or by `create` or `resume` (to append as well, one process at a time).

    Example ids are ints from 0 to 2**63 - 1, appended in any order, each once. Wrong input is a `CacheError`
    (a ValueError), an absent example one that is a KeyError as well.
    """

    def __init__(self, reader: CacheReader, writer: CacheWriter | None = None) -> None:
        """Use `open`, `create` or `resume`."""
        self.reader = reader
        self._writer = writer

    @classmethod
    def open(
        cls, path: str | Path, *, vocab_size: int | None = None, tokenizer_hash: str | None = None
    ) -> TeacherCache:
        """A cache to read from: the examples committed by now. What the student brings is compared, where given."""
        cache = cls(CacheReader(path))
        cache.require(vocab_size=vocab_size, tokenizer_hash=tokenizer_hash)
        return cache

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        vocab_size: int,
        k: int,
        temperature: float = 1.0,
        other_temperatures: Sequence[float] = (),
        entropy: bool = False,
        kind: str = "topk",
        bits: int | None = None,
        teacher: str = "",
        tokenizer: str = "",
        tokenizer_hash: str = "",
        metadata: Mapping[str, Any] | None = None,
        resume: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> TeacherCache:
        """A new cache in a folder that is missing or empty, or holds a cache that nothing was ever committed to.

        Args:
            path: the folder.
            vocab_size: V of every example.
            k: the most entries a row may have.
            temperature: of every example.
            other_temperatures: of the tails that every example brings besides (`SparseLogits.other_tails`).
            entropy: keep the rows' entropies.
            kind: "topk" or "sampled", of every example.
            bits: 4 to 12 for quantised log-probabilities, 16 for float16, 32 for float32 (`codec.encode`). None: 8,
                for "sampled" 32, so that counts come back exactly.
            teacher, tokenizer, tokenizer_hash: recorded; `open` compares the hash with the student's.
            metadata: further plain values, recorded.
            resume: where `path` is a cache with these settings already, go on with it.
            shard_bytes: `append` commits by itself when this much is pending.

        Raises:
            CacheError: a value that cannot be, a path that is taken, a cache that another process is writing.
        """
        if isinstance(other_temperatures, (int, float)):
            fail(CacheError, "other_temperatures", other_temperatures, "a sequence of numbers")
        settings = Settings(
            vocab_size, k, temperature, tuple(other_temperatures), bool(entropy), kind,
            codec.USUAL_BITS.get(kind, 8) if bits is None else bits, teacher, tokenizer, tokenizer_hash,
            dict(metadata or {}),
        )  # fmt: skip
        writer = CacheWriter.create(path, settings, resume=resume, shard_bytes=shard_bytes)
        return cls(writer.reader, writer)

    @classmethod
    def resume(cls, path: str | Path, *, shard_bytes: int = SHARD_BYTES) -> TeacherCache:
        """An existing cache to append to: everything that was committed is there, whatever happened since."""
        writer = CacheWriter(path, shard_bytes)
        return cls(writer.reader, writer)

    # --- writing ---

    @property
    def _appending(self) -> CacheWriter:
        if self._writer is None:
            raise CacheError(
                f"cache {str(self.path)!r} was opened for reading; append with TeacherCache.resume or create"
            )
        return self._writer

    def append(self, example_id: int, sparse: SparseLogits, input_ids: npt.ArrayLike | Tensor | None = None) -> None:
        """Add one example [L, K]; the next `commit` acknowledges it (or this call, when `shard_bytes` are pending).

        input_ids [L]: the tokens that the teacher read; their hash is kept, so that `get` can compare.
        """
        writer = self._appending
        self._check(sparse)
        columns = {f"{TAIL}{float(t)!r}": _array(sparse.other_tails[t]) for t in self.settings.others}
        if self.settings.entropy:
            assert sparse.entropy is not None
            columns[ENTROPY] = _array(sparse.entropy)
        ids = sparse.ids.detach().cpu().contiguous().numpy()
        tokens = None if input_ids is None else _tokens(input_ids)
        writer.append(example_id, ids, _array(sparse.log_probs), _array(sparse.log_tail), columns, tokens)

    def _check(self, sparse: SparseLogits) -> None:
        if not isinstance(sparse, SparseLogits):
            fail(CacheError, "sparse", type(sparse).__name__, "a SparseLogits", "use kd.compress")
        for name in ("vocab_size", "temperature", "kind"):
            ours, theirs = getattr(self.settings, name), getattr(sparse, name)
            if ours != theirs:
                fail(CacheError, f"sparse.{name}", repr(theirs), f"the cache's, {ours!r}")
        if absent := [t for t in self.settings.others if t not in sparse.other_tails]:
            remedy = "give kd.compress the other_temperatures that the cache keeps"
            fail(CacheError, "sparse.other_tails", sorted(sparse.other_tails), f"there at {absent}", remedy)
        if self.settings.entropy and sparse.entropy is None:
            fail(CacheError, "sparse.entropy", None, "there, the cache keeps it", "kd.compress(..., entropy=True)")

    def commit(self) -> None:
        """Put what was appended on disk; when this returns, it survives a crash. See `CacheWriter.commit`."""
        self._appending.commit()

    def merge(self, parts: Iterable[str | Path], *, remove: bool = False) -> int:
        """Take in the caches that ranks wrote each for itself; see `kdkernels.compression.merge`."""
        return merge(self._appending, parts, remove=remove)

    def close(self) -> None:
        """Commit, if it was opened for appending, and let others write."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, traceback)

    # --- reading ---

    @property
    def path(self) -> Path:
        """The folder."""
        return self.reader.path

    @property
    def settings(self) -> Settings:
        """What the cache was created with."""
        return self.reader.settings

    def __len__(self) -> int:
        """Committed examples."""
        return len(self.reader)

    def __contains__(self, example_id: Any) -> bool:
        """Appended or committed; False for what can be no id, such as a str."""
        return example_id in (self.reader if self._writer is None else self._writer)

    def __iter__(self) -> Iterator[int]:
        """Ids of the committed examples, ascending."""
        return iter(self.ids().tolist())

    def __getitem__(self, example_id: int) -> SparseLogits:
        return self.get(example_id)

    def get(self, example_id: int, input_ids: npt.ArrayLike | Tensor | None = None) -> SparseLogits:
        """One committed example [L, K], on the CPU.

        input_ids [L]: what the student reads; `CacheError` unless the teacher read the same.
        """
        decoded = self.reader.read(example_id, None if input_ids is None else _tokens(input_ids))
        return self._sparse(decoded)

    def _sparse(self, decoded: codec.Decoded) -> SparseLogits:
        ours, columns = self.settings, decoded.columns
        entropy = torch.from_numpy(columns[ENTROPY]) if ENTROPY in columns else None
        tails = {t: torch.from_numpy(columns[f"{TAIL}{float(t)!r}"]) for t in ours.others}
        return SparseLogits(
            torch.from_numpy(decoded.ids), torch.from_numpy(decoded.log_probs), torch.from_numpy(decoded.log_tail),
            ours.vocab_size, float(ours.temperature), ours.kind, entropy, tails,
        )  # fmt: skip

    def ids(self) -> Int64:
        """Ids of the committed examples, ascending, int64."""
        return self.reader.ids()

    def dataset(self, ids: Sequence[int] | None = None) -> CacheDataset:
        """The committed examples (or these) as a torch Dataset."""
        return CacheDataset(TeacherCache(CacheReader(self.path)), ids)

    def require(self, *, vocab_size: int | None = None, tokenizer_hash: str | None = None) -> None:
        """Raise `CacheError` unless a student of this vocabulary and tokeniser can learn from the cache."""
        self.reader.require(vocab_size=vocab_size, tokenizer_hash=tokenizer_hash)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Every checksum, every block decoded: what is wrong, a line each; see `CacheReader.verify`."""
        return self.reader.verify(progress)

    def stat(self) -> dict[str, Any]:
        """Counts, bytes and settings."""
        return self.reader.stat()

    def __repr__(self) -> str:
        """Where, how much, what."""
        ours = self.settings
        return f"TeacherCache({str(self.path)!r}, examples={len(self)}, k={ours.k}, vocab_size={ours.vocab_size})"


def _array(x: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = x.detach().float().cpu().contiguous().numpy()
    return array


def _tokens(input_ids: npt.ArrayLike | Tensor) -> npt.ArrayLike:
    tokens: npt.ArrayLike = input_ids.detach().cpu().numpy() if isinstance(input_ids, Tensor) else input_ids
    return tokens
