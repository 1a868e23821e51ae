"""Writers that are killed, disks that are full, files that are damaged: nothing acknowledged is lost or wrong."""

from __future__ import annotations

import errno
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
import numpy as np
import pytest

from kdkernels import durable
from kdkernels.compression import codec, shard
from kdkernels.compression.manifest import NAME, CacheError, read_manifest
from kdkernels.compression.merge import merge
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter

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


# --- full disks ---


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


# --- damaged files ---


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.choice((0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))))]


def _extend(data: bytearray, rng: random.Random) -> bytearray:
    return data + bytes(rng.randrange(1, 64))


def _swap(data: bytearray, rng: random.Random) -> bytearray:
    """Two stretches of one length trade places."""
    size = rng.randrange(1, max(2, len(data) // 3))
    a = rng.randrange(0, len(data) - 2 * size + 1)
    b = rng.randrange(a + size, len(data) - size + 1)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return data


def _lengths(data: bytearray, rng: random.Random) -> bytearray:
    """A hostile number where a length is likely to be."""
    at = rng.choice((0, 8 * rng.randrange(len(data) // 8)))
    value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, len(data), rng.getrandbits(64)))
    data[at : at + 8] = value.to_bytes(8, "little")
    return data


def _digits(data: bytearray, rng: random.Random) -> bytearray:
    places = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    data[rng.choice(places)] = rng.choice(b"0123456789-.eE")
    return data


DAMAGES: list[Callable[[bytearray, random.Random], bytearray]] = [_flip, _truncate, _extend, _swap, _lengths, _digits]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "cache"
    cases.build(folder, range(12), commits=2)
    return folder


def _detected(folder: Path) -> bool:
    """Is the damage told, and is every example that is served the right one?"""
    try:
        reader = CacheReader(folder)
    except CacheError:
        return True
    problems = reader.verify()
    for number in range(12):
        try:
            cases.check(reader, number)
        except CacheError:
            assert problems
    return bool(problems)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.soak)])
def test_damaged_files_are_detected(tmp_path: Path, sound: Path, count: int) -> None:
    rng = random.Random(count)
    shutil.copytree(sound, tmp_path / "cache")
    files = sorted(path.name for path in sound.iterdir() if path.suffix in (".json", ".safetensors"))
    assert len(files) == 3
    done = 0
    while done < count:
        name, damage = rng.choice(files), rng.choice(DAMAGES)
        whole = (sound / name).read_bytes()
        damaged = bytes(damage(bytearray(whole), rng))
        if damaged == whole:
            continue
        (tmp_path / "cache" / name).write_bytes(damaged)
        assert _detected(tmp_path / "cache"), (name, damage.__name__, done)
        (tmp_path / "cache" / name).write_bytes(whole)
        done += 1


def test_swapped_blocks_and_swapped_shards_are_detected(tmp_path: Path, sound: Path) -> None:
    shutil.copytree(sound, tmp_path / "cache")
    first, second = sorted((tmp_path / "cache").glob("*.safetensors"))
    opened = shard.Shard(first)
    data = bytearray(first.read_bytes())
    sizes = np.diff(opened.offsets)
    number = int(np.flatnonzero(sizes[1:] == sizes[:-1])[0])  # it and the next are of one size
    start = len(data) - int(opened.offsets[-1])
    a, b, c = (start + int(opened.offsets[number + i]) for i in range(3))
    data[a:b], data[b:c] = data[b:c], data[a:b]
    first.write_bytes(data)
    codec.inspect(bytes(data[a:b]))  # each block is sound in itself
    reader = CacheReader(tmp_path / "cache")
    for swapped in (number, number + 1):
        with pytest.raises(CacheError, match=f"checksum of example {swapped} is wrong"):
            reader.read(swapped)
    cases.check(reader, 5 if number < 4 else 0)
    shutil.copy(second, first)
    with pytest.raises(CacheError, match="damaged"):
        CacheReader(tmp_path / "cache").read(0)


def test_heads_with_right_checksums_and_wrong_contents_are_refused(tmp_path: Path, sound: Path) -> None:
    """Whoever can write the manifest can make every checksum right: lengths are checked all the same."""
    shutil.copytree(sound, tmp_path / "cache")
    rng = random.Random(1)
    path = sorted((tmp_path / "cache").glob("*.safetensors"))[0]
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = rng.choice((_flip, _lengths, _digits, _swap))(bytearray(whole[:900]), rng) + whole[900:]
        path.write_bytes(data)
        try:
            opened = shard.Shard(path)
            for place in range(len(opened.ids)):
                codec.decode(opened.block(place))
        except (CacheError, codec.CodecError):
            refused += 1
    assert refused > 100


def test_hostile_manifests(tmp_path: Path, sound: Path) -> None:
    shutil.copytree(sound, tmp_path / "cache")
    manifest = tmp_path / "cache" / NAME
    for text in ("", "[]", "null", "[" * 100_000, '{"a": ' * 10_000, "9" * 5000, '{"format": 1}', "\xff", "\x00" * 64):
        manifest.write_text(text, encoding="latin-1")
        with pytest.raises(CacheError, match=r"manifest.json' is damaged \(.+\); restore it"):
            read_manifest(tmp_path / "cache")
    with manifest.open("wb") as file:
        file.truncate(1 << 40)  # sparse: refused by its size, not read
    with pytest.raises(CacheError, match="larger than any manifest"):
        read_manifest(tmp_path / "cache")


def test_a_shard_that_shrinks_while_it_is_open_is_an_error(tmp_path: Path, sound: Path) -> None:
    """A memory map would end the process with SIGBUS."""
    shutil.copytree(sound, tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    cases.check(reader, 0)
    path = sorted((tmp_path / "cache").glob("*.safetensors"))[0]
    os.truncate(path, 2000)
    with pytest.raises(CacheError, match="it ends before byte"):
        reader.read(5)


def test_temporary_files_do_not_outlive_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        durable.write_atomically(tmp_path / "x", lambda file: 1 // 0)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_its_own_snapshot_until_it_reloads(tmp_path: Path) -> None:
    """A cache that grows while it is read."""
    reader = cases.build(tmp_path / "cache", range(3))
    with CacheWriter(tmp_path / "cache") as writer:
        cases.append(writer, 7)
    assert 7 not in reader
    cases.check(reader, 2)
    reader.reload()
    cases.check(reader, 7)
