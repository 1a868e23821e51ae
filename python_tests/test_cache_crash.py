"""Writers that are killed: nothing acknowledged is lost or wrong."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_cases as cases
import pytest

from kdkernels.compression.manifest import NAME
from kdkernels.compression.merge import merge
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


# --- kill -9 ---


def _killed_writer(path: Path, seed: int, delay: float) -> set[int]:
    """What a writer acknowledged before it was killed, `delay` seconds after its first word."""
    line = [sys.executable, str(HERE / "cache_cases.py"), str(path), str(seed)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline()]
    timer = threading.Timer(delay, process.kill)
    timer.start()
    rest, errors = process.communicate(timeout=60)
    timer.cancel()
    assert process.returncode in (-9, 0), errors
    lines = [*said, *rest.splitlines(keepends=True)]
    return {int(word) for line in lines if line.endswith("\n") for word in line.split()}


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_random_moments_nothing_acknowledged_is_lost_or_doubled(tmp_path: Path, kills: int) -> None:
    rng = random.Random(kills)
    acknowledged: set[int] = set()
    for number in range(kills):
        folder = tmp_path / f"cache{number // 40}"  # a new one before all 4000 are there
        acknowledged = acknowledged if number % 40 else set()
        acknowledged |= _killed_writer(folder, number, rng.uniform(0.0, 0.08))
        with CacheWriter(folder) as writer:
            reader = writer.reader
            assert not list(folder.glob(".*.tmp"))
        ids = reader.ids().tolist()
        assert len(ids) == len(set(ids)) == len(reader)
        assert acknowledged <= set(ids)
        assert reader.verify() == []
        for example_id in rng.sample(ids, min(len(ids), 40)):
            cases.check(reader, example_id)
        listed = {entry.file for entry in reader.manifest.shards}
        assert {path.name for path in folder.glob("*.safetensors")} == listed
    assert len(acknowledged) > 20


def _dies_before(step: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that dies before its `step`-th change to the disk; False when it came to its end."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 1), "not as meant"
        return status == 1
    left = [step]

    def mortal(change: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*given: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(1)
            return change(*given, **options)

        return changing

    for place, name in (
        (os, "fsync"), (os, "link"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
        (Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "open"),
    ):  # fmt: skip
        setattr(place, name, mortal(getattr(place, name)))
    try:
        work()
    except BaseException:
        os._exit(2)
    os._exit(0)


def test_death_before_any_single_step_of_a_commit(tmp_path: Path) -> None:
    deaths = 0
    for step in range(1, 100):
        folder = tmp_path / str(step)

        def work(folder: Path = folder) -> None:
            with CacheWriter.create(folder, cases.SETTINGS, resume=True) as writer:
                for number in (1, 0):
                    cases.append(writer, number)
                    writer.commit()
                    os.close(os.open(tmp_path / f"{folder.name}-{number}", os.O_CREAT))  # acknowledged

        if not _dies_before(step, work):
            break
        deaths += 1
        acknowledged = {number for number in range(2) if (tmp_path / f"{step}-{number}").exists()}
        with CacheWriter.create(folder, cases.SETTINGS, resume=True) as writer:
            assert acknowledged <= set(writer.reader.ids().tolist())
            for number in range(2):
                if number not in writer:
                    cases.append(writer, number)
        reader = CacheReader(folder)
        assert reader.verify() == []
        assert reader.ids().tolist() == [0, 1]
        assert not list(folder.glob(".*.tmp"))
    assert deaths > 20


def test_death_before_any_single_step_of_a_merge(tmp_path: Path) -> None:
    deaths = 0
    for part in (0, 1):
        cases.build(tmp_path / "0" / f"part{part}", range(part, 6, 2))
    for step in range(1, 100):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "0", folder)

        def work(folder: Path = folder) -> None:
            with CacheWriter.create(folder / "all", cases.SETTINGS, resume=True) as writer:
                merge(writer, [p for p in sorted(folder.glob("part*")) if (p / NAME).exists()], remove=True)

        if not _dies_before(step, work):
            break
        deaths += 1
        work()
        reader = CacheReader(folder / "all")
        assert reader.verify() == []
        assert reader.ids().tolist() == list(range(6))
        assert not list(folder.glob("part*"))
    assert deaths > 20


def test_what_is_durable_is_written_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shard, fsync, rename, fsync of the folder, manifest, fsync, rename, fsync of the folder."""
    writer = CacheWriter.create(tmp_path / "cache", cases.SETTINGS)
    cases.append(writer, 3)
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        seen.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).lstrip(".").split(".")[0])
        fsync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        seen.append("rename " + target.name.split(".")[0])
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    writer.commit()
    name = "examples-000000000003-000000000003"
    assert seen == [
        f"fsync {name}", f"rename {name}", "fsync cache", "fsync manifest", "rename manifest", "fsync cache"
    ]  # fmt: skip
    writer.close()


@pytest.mark.parametrize("state", ["whole", "damaged", "doubled", "foreign"])
def test_a_shard_that_no_manifest_lists(tmp_path: Path, state: str) -> None:
    """Killed between shard and manifest: a whole shard is taken in, another deleted; a reader sees neither."""
    cases.build(tmp_path / "cache", range(5))
    settings = cases.SETTINGS if state != "foreign" else cases.Settings(cases.VOCAB, cases.K, bits=32, teacher="other")
    with CacheWriter.create(tmp_path / "other", settings) as other:
        for number in (4, 9) if state == "doubled" else (8, 9):
            cases.append(other, number)
    (file,) = (tmp_path / "other").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    if state == "damaged":
        data[-20] ^= 4
    (tmp_path / "cache" / file.name).write_bytes(data)
    assert len(CacheReader(tmp_path / "cache")) == 5
    with CacheWriter(tmp_path / "cache") as writer:
        assert (9 in writer) == (state == "whole")
    reader = CacheReader(tmp_path / "cache")
    assert reader.ids().tolist() == [0, 1, 2, 3, 4, *([8, 9] if state == "whole" else [])]
    assert (tmp_path / "cache" / file.name).exists() == (state == "whole")
    assert reader.verify() == []
