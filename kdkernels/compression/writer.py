"""Appending to a teacher cache: numpy alone, one writer at a time, nothing acknowledged that a crash could take back.

`commit` writes what was appended as one shard (temporary file, fsync, rename, fsync of the folder) and then the
manifest in the same way: when it returns, the examples are on disk. A kill leaves the state of the last commit, and
perhaps a shard that no manifest lists; the next writer takes it in if it is whole, or deletes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kdkernels._checks import fail
from kdkernels.compression import codec
from kdkernels.compression.manifest import NAME, SHARD_NAME, CacheError, Manifest, Settings, ShardEntry, read_manifest
from kdkernels.compression.reader import CacheReader, checked_id, is_id
from kdkernels.compression.shard import Example, Shard, input_hash, stamp, write_shard
from kdkernels.durable import replace_file, sync_folder

SHARD_BYTES = 64 << 20


class CacheWriter:
    """A cache open for appending. Its `reader` sees what is committed; `pending` holds the rest, encoded.

    shard_bytes: `append` commits by itself when this much is pending.
    """

    def __init__(self, path: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Open an existing cache, with its state after the last commit."""
        self.path = Path(path)
        _check_shard_bytes(shard_bytes)  # complains before anything is touched, as the next line does
        read_manifest(self.path)
        self._start(lock(self.path), shard_bytes)

    @classmethod
    def create(
        cls, path: str | Path, settings: Settings, *, resume: bool = False, shard_bytes: int = SHARD_BYTES
    ) -> CacheWriter:
        """A new cache in a folder that is missing or empty; with `resume` also an existing one of these settings.

        A cache that nothing was ever committed to counts as an empty folder: the next attempt may have other settings.
        """
        self, folder = cls.__new__(cls), Path(path)
        self.path = folder
        _check_shard_bytes(shard_bytes)
        _check_new(folder, resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(CacheError, "path", repr(str(path)), f"a folder that can be made ({error.strerror})", "choose another")
        handle = lock(folder)
        try:
            if (folder / NAME).exists() and (resume or not _unused(folder)):
                _check_same(folder, read_manifest(folder).settings, settings)
            else:
                _write_manifest(folder, Manifest(settings))
                sync_folder(folder)
                sync_folder(folder.parent)
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError):
                raise CacheError(f"cache {str(folder)!r} cannot be written ({error.strerror})") from error
            raise
        self._start(handle, shard_bytes)
        return self

    def _start(self, handle: int, shard_bytes: int) -> None:
        self._lock = handle
        self.shard_bytes = shard_bytes
        self.pending: dict[int, Example] = {}
        self._pending_bytes = 0
        self._synced = True
        self.reader = CacheReader(self.path)
        self.settings = self.reader.settings
        try:
            self._tidy()
        except OSError as error:
            raise CacheError(f"cache {str(self.path)!r} cannot be resumed ({error.strerror}); free space") from error

    def _tidy(self) -> None:
        """Remove what a killed writer left half-written; take in the shard it had finished but not listed."""
        listed = {shard.file for shard in self.reader.manifest.shards}
        for path in sorted(self.path.iterdir()):
            if path.name.startswith(".") and path.name.endswith(".tmp"):
                path.unlink()
            elif SHARD_NAME.fullmatch(path.name) and path.name not in listed:
                entry = self._whole(path)
                if entry is None:
                    path.unlink()
                else:
                    self._list(entry)

    def _whole(self, path: Path) -> ShardEntry | None:
        """The entry of an unlisted shard if it is ours, undamaged, and holds nothing that is there already."""
        try:
            shard = Shard(path)
            if shard.stamp != stamp(self.settings) or shard.entry.file != path.name:
                return None
            for place, example_id in enumerate(shard.ids.tolist()):
                codec.inspect(shard.block(place))
                if example_id in self.reader:
                    return None
        except (CacheError, codec.CodecError):
            return None
        return shard.entry

    def __contains__(self, example_id: Any) -> bool:
        return example_id in self.reader or (is_id(example_id) and checked_id(example_id) in self.pending)

    def append(
        self,
        example_id: int,
        ids: npt.NDArray[np.int32],
        log_probs: npt.NDArray[np.float32],
        log_tail: npt.NDArray[np.float32],
        columns: Mapping[str, npt.NDArray[np.float32]] | None = None,
        input_ids: npt.ArrayLike | None = None,
    ) -> None:
        """Add an example of L rows, as `codec.encode` takes them; acknowledged by the next `commit`."""
        self._check_open()
        number = checked_id(example_id)
        if number in self:
            remedy = "append every example once; `id in cache` tells what is there"
            fail(CacheError, "example_id", number, "one that the cache does not have yet", remedy)
        if ids.ndim != 2 or not len(ids) or ids.shape[1] > self.settings.k:
            allowed = f"[L, K] with L at least 1 and K at most the cache's k ({self.settings.k})"
            fail(CacheError, "ids shape", list(ids.shape), allowed, "append one example at a time")
        key = 0 if input_ids is None else input_hash(input_ids)
        if input_ids is not None and len(np.asarray(input_ids)) != len(ids):
            remedy = "pass the tokens that the teacher read, one for each row"
            fail(CacheError, "input_ids", f"{len(np.asarray(input_ids))} tokens", f"{len(ids)}, one a row", remedy)
        block = codec.encode(
            ids, log_probs, log_tail,
            vocab_size=self.settings.vocab_size, bits=self.settings.bits, columns=columns or {},
        )  # fmt: skip
        self.pending[number] = Example(number, len(ids), key, block)
        self._pending_bytes += len(block)
        if self._pending_bytes >= self.shard_bytes:
            self.commit()

    def commit(self) -> None:
        """Put everything appended on disk; when this returns it survives a crash.

        `CacheError` on a full or failing disk: what was committed before is untouched, and what is pending stays in
        memory, so that commit may be called again once there is room.
        """
        self._check_open()
        try:
            if self.pending:
                entry = write_shard(self.path, [self.pending[i] for i in sorted(self.pending)], self.settings)
                try:
                    self._list(entry)
                finally:
                    if entry in self.reader.manifest.shards:
                        self.pending, self._pending_bytes = {}, 0
            if not self._synced:
                self._sync()
        except OSError as error:
            raise CacheError(
                f"cache {str(self.path)!r}: writing failed ({error.strerror}); the {len(self.reader)} examples "
                f"committed are safe, {len(self.pending)} are pending in memory; free space and commit again, or resume"
            ) from error

    def _list(self, *entries: ShardEntry) -> None:
        """Make shards that are in the folder part of the cache; if the manifest cannot list them they go again."""
        manifest = self.reader.manifest.adding(*entries)
        try:
            sync_folder(self.path)
            _write_manifest(self.path, manifest)
        except BaseException:
            if (self.path / NAME).read_bytes() != manifest.to_bytes():  # else interrupted when it was in place
                for entry in entries:
                    (self.path / entry.file).unlink(missing_ok=True)
                raise
        self._synced = False
        self.reader._use(manifest)
        self._sync()

    def _sync(self) -> None:
        sync_folder(self.path)
        self._synced = True

    def _check_open(self) -> None:
        if self._lock < 0:
            raise CacheError(f"cache {str(self.path)!r} was closed; open it for appending again with resume")

    def close(self) -> None:
        """Commit, and let others write."""
        if self._lock >= 0:
            self.commit()
            self.release()

    def release(self) -> None:
        """Let others write, without committing: what is pending is lost."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            self.pending, self._pending_bytes = {}, 0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commit, also what was appended before an exception, and let others write.

        `CacheError` where that fails: it says what is on disk, what is lost and how to go on. Another exception of the
        block is not hidden by it.
        """
        try:
            self.close()
        except CacheError as failure:
            if error is None or (isinstance(error, CacheError) and isinstance(error.__cause__, OSError)):
                raise CacheError(self._left(failure)) from failure.__cause__
        finally:
            self.release()

    def _left(self, failure: CacheError) -> str:
        """After a commit that failed for good."""
        reason = getattr(failure.__cause__, "strerror", None) or failure
        kept = f"the {len(self.reader)} examples committed are on disk"
        ids = sorted(self.pending)
        named = ", ".join(map(str, ids[:5])) + (f", ... {ids[-1]}" if len(ids) > 5 else "")
        lost = (
            f"the {len(ids)} appended since ({named}) are not" if ids else "though the disk has not confirmed the last"
        )
        return (
            f"cache {str(self.path)!r}: writing failed ({reason}) when the block ended; {kept}, {lost}; free space, "
            "open it with resume (--resume) and append what it lacks: `id in cache` tells"
        )

    def __del__(self) -> None:
        if getattr(self, "_lock", -1) >= 0:
            os.close(self._lock)


def _check_shard_bytes(shard_bytes: int) -> None:
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        fail(CacheError, "shard_bytes", repr(shard_bytes), "an int, at least 1")


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    replace_file(folder / NAME, lambda file: (file.write(manifest.to_bytes()), None)[1])


def _check_new(folder: Path, resume: bool) -> None:
    """Refuse a path that holds something else (or, without `resume`, a cache)."""
    if (folder / NAME).exists():
        if not (resume or _unused(folder)):
            examples = read_manifest(folder).examples
            remedy = "go on with resume=True (--resume), or choose another"
            fail(CacheError, "path", repr(str(folder)), f"new, it is a cache of {examples} examples", remedy)
    elif folder.exists() and not folder.is_dir():
        fail(CacheError, "path", repr(str(folder)), "a folder, it is a file", "choose another")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        fail(CacheError, "path", repr(str(folder)), "an empty folder or a cache, it is neither", "choose another")


def _unused(folder: Path) -> bool:
    """Whether a cache has nothing but its manifest and lock: no shard, listed or not, no part of a rank."""
    return {path.name for path in folder.iterdir()} <= {NAME, ".lock"} and not read_manifest(folder).shards


def _check_same(folder: Path, recorded: Settings, asked: Settings) -> None:
    for name in recorded.differences(asked):
        fail(
            CacheError, name, repr(getattr(asked, name)),
            f"as the cache {str(folder)!r} began, {getattr(recorded, name)!r}", "resume as it began, or choose another",
        )  # fmt: skip


def lock(folder: Path) -> int:
    """The lock of the one writer; it goes with the process, however that ends."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        fail(CacheError, "path", repr(str(folder)), f"a folder that can be written ({error.strerror})")
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows: two writers are not noticed
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise CacheError(
            f"cache {str(folder)!r} is being written by another process; wait, or give every rank a path of its own"
        ) from error
    return handle
