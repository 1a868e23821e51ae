"""Files that are damaged, shrink or lie: every one is detected, none does harm."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import cache_cases as cases
import numpy as np
import pytest

from kdkernels import durable
from kdkernels.compression import codec, shard
from kdkernels.compression.manifest import NAME, CacheError, read_manifest
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter

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


@pytest.mark.slow
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
