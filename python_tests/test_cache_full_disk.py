"""Disks that are full while a cache is written: nothing committed is lost, and the error says how to go on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cache_cases as cases
import pytest

from kdkernels.compression.manifest import CacheError
from kdkernels.compression.merge import merge
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter

HERE = Path(__file__).parent


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", range(1, 5))
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """At whichever of the four fsyncs the disk gives up."""
    writer = CacheWriter.create(tmp_path / "cache", cases.SETTINGS)
    for number in range(4):
        cases.append(writer, number)
    writer.commit()
    for number in range(4, 9):
        cases.append(writer, number)
    calls = []
    fsync = os.fsync

    def give_up(handle: int) -> None:
        calls.append(handle)
        if len(calls) == at:
            _no_space()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", give_up)
    with pytest.raises(CacheError, match=r"writing failed \(No space left on device\).*commit again, or resume"):
        writer.commit()
    assert set(range(4)) <= set(CacheReader(tmp_path / "cache").ids().tolist())
    assert CacheReader(tmp_path / "cache").verify() == []
    assert all(number in writer for number in range(9))
    cases.append(writer, 9)
    writer.close()
    reader = CacheReader(tmp_path / "cache")
    assert reader.ids().tolist() == list(range(10))
    assert reader.verify() == []
    for number in range(10):
        cases.check(reader, number)
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == len(reader.manifest.shards)


def test_a_really_full_disk(tmp_path: Path) -> None:
    """The system's own limit on a file's size, in a process of its own."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
import cache_cases as cases
from kdkernels.compression.manifest import CacheError
from kdkernels.compression.writer import CacheWriter
writer = CacheWriter.create({str(tmp_path / "cache")!r}, cases.SETTINGS)
cases.append(writer, 0)
writer.commit()
for number in range(1, 60):
    cases.append(writer, number)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    writer.commit()
except CacheError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.close()
print(writer.reader.verify(), len(writer.reader))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "writing failed (File too large); the 1 examples committed are safe, 59 are pending" in done.stdout
    assert done.stdout.endswith("[] 60\n")


@pytest.mark.parametrize("commits", [True, False], ids=["commit in the block", "commit at its end"])
def test_a_disk_that_is_full_when_the_block_ends(tmp_path: Path, commits: bool) -> None:
    """The error says what is on disk, what is lost and how to go on; and that works."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
import cache_cases as cases
from kdkernels.compression.manifest import CacheError
from kdkernels.compression.writer import CacheWriter
try:
    with CacheWriter.create({str(tmp_path / "cache")!r}, cases.SETTINGS) as writer:
        cases.append(writer, 5)
        writer.commit()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        for number in range(10, 60):
            cases.append(writer, number)
        if {commits}:
            writer.commit()
except CacheError as error:
    print(error, type(error.__cause__).__name__)
try:
    writer.commit()
except CacheError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "writing failed (File too large) when the block ended; the 1 examples committed are on disk" in done.stdout
    assert "the 50 appended since (10, 11, 12, 13, 14, ... 59) are not; free space, open it with resume" in done.stdout
    assert "OSError" in done.stdout
    assert "was closed; open it for appending again with resume" in done.stdout
    with CacheWriter(tmp_path / "cache") as writer:
        lacking = [number for number in (5, *range(10, 60)) if number not in writer]
        assert lacking == list(range(10, 60))
        for number in lacking:
            cases.append(writer, number)
    reader = CacheReader(tmp_path / "cache")
    assert len(reader) == 51
    assert reader.verify() == []


def test_a_full_disk_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with CacheWriter.create(tmp_path / "cache", cases.SETTINGS) as writer:
            cases.append(writer, 1)
            monkeypatch.setattr(os, "fsync", _no_space)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        work()
    assert len(CacheReader(tmp_path / "cache")) == 0


def test_an_exception_in_the_block_commits_what_was_appended(tmp_path: Path) -> None:
    def work() -> None:
        with CacheWriter.create(tmp_path / "cache", cases.SETTINGS) as writer:
            cases.append(writer, 1)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        work()
    assert CacheReader(tmp_path / "cache").ids().tolist() == [1]


def test_merging_onto_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.build(tmp_path / "a", range(3))
    writer = CacheWriter.create(tmp_path / "all", cases.SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        with pytest.raises(CacheError, match="cache and parts are as they were"):
            merge(writer, [tmp_path / "a"], remove=True)
    assert len(CacheReader(tmp_path / "all")) == 0
    assert merge(writer, [tmp_path / "a"], remove=True) == 3
    assert CacheReader(tmp_path / "all").verify() == []
    assert not (tmp_path / "a").exists()
    writer.close()
