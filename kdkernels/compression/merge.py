"""Parts of a cache, one for each rank that wrote, become one cache: shards are linked, not rewritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kdkernels._checks import fail
from kdkernels.compression.manifest import CacheError, ShardEntry
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.shard import Shard
from kdkernels.compression.writer import CacheWriter, lock
from kdkernels.durable import temporary_of

MERGED = ".merged"  # ends the name of a part that is being deleted


def merge(writer: CacheWriter, parts: Iterable[str | Path], *, remove: bool = False) -> int:
    """Take every shard of `parts` into the cache of `writer`, in one commit; returns how many examples are new.

    Shards are hard links where the file system has them, else copies. Merging again what was merged (after a kill,
    say) changes nothing. Settings that differ and examples that two parts have are errors, found before any change.
    remove: delete the parts once the merged cache is on disk; parts that are still being written are an error then.
    """
    writer.commit()
    readers = [CacheReader(part) for part in parts]
    locks = [lock(reader.path) for reader in readers] if remove else []
    try:
        return _merge(writer, readers, remove)
    finally:
        for handle in locks:
            os.close(handle)


def _merge(writer: CacheWriter, readers: list[CacheReader], remove: bool) -> int:
    new: dict[str, tuple[Path, ShardEntry]] = {}
    listed = set(writer.reader.manifest.shards)
    for reader in readers:
        for name in writer.settings.differences(reader.settings):
            fail(
                CacheError, name, repr(getattr(reader.settings, name)),
                f"the same in part {str(reader.path)!r} and in the cache, {getattr(writer.settings, name)!r}",
            )  # fmt: skip
        for entry in reader.manifest.shards:
            if entry not in listed:
                if entry.file in new:
                    fail(CacheError, "parts", entry.file, "of different examples, two parts have this shard")
                new[entry.file] = (reader.path / entry.file, entry)
    _check_disjoint(writer, new)
    try:
        for name, (source, entry) in new.items():
            _place(source, writer.path / name, entry)
        if new:
            writer._list(*(entry for _, entry in new.values()))
    except OSError as error:
        raise CacheError(
            f"cache {str(writer.path)!r}: merging failed ({error.strerror}); cache and parts are as they were; "
            "free space and merge again"
        ) from error
    if remove:
        for reader in readers:
            shutil.rmtree(reader.path.rename(reader.path.with_name(f".{reader.path.name}{MERGED}")))
    return sum(entry.examples for _, entry in new.values())


def _check_disjoint(writer: CacheWriter, new: dict[str, tuple[Path, ShardEntry]]) -> None:
    found = [writer.reader.ids(), *(Shard(path, entry).ids for path, entry in new.values())]
    ids, counts = np.unique(np.concatenate(found), return_counts=True)
    if (counts > 1).any():
        twice = ids[counts > 1]
        remedy = "let each rank write other examples"
        fail(CacheError, "parts", f"{len(twice)} examples twice, the first {twice[0]}", "of different examples", remedy)


def _place(source: Path, target: Path, entry: ShardEntry) -> None:
    temporary = temporary_of(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    temporary.replace(target)
    temporary.unlink(missing_ok=True)  # renaming one hard link over another of the same file does nothing
    Shard(target, entry)
