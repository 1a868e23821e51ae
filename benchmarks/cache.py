"""Random access and writing, the teacher cache against Parquet and plain safetensors: `python -m benchmarks.cache`.

Writes benchmarks/results/cache-cpu.json. Examples of 512 tokens, k = 64, V = 151936, ids spread at random (the codec's
worst case), one thread.

- ours: `cache` gives `SparseLogits` (checksum verified, decoded to int32 and float32), `reader` the same as numpy
  arrays, `block` the verified bytes only, for who decodes elsewhere.
- safetensors: stacked int32 ids and float16 log-probabilities, an example by `get_slice`; no checksum. parquet-N: the
  same as lists, zstd, N examples a row group (its unit of access); no durability before the file is closed.
- access_us: one example, from a random order; warm: files in the page cache. cold: they were dropped from it before
  they were opened (as far as the system obeys `posix_fadvise`), and each example is read once.
- write_mb_s: ids and log-probabilities as int32 and float32, 512 bytes a token, over the seconds until they are on
  disk (fsync), encoding included. What the disk gives at that moment weighs heavily: `disk_mb_s` is a plain file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.timing import Alternation, spread
from kdkernels.compression.cache import TeacherCache
from kdkernels.compression.manifest import Settings
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter

RESULT = machine.ROOT / "benchmarks" / "results" / "cache-cpu.json"
VOCAB, K, LENGTH = 151936, 64, 512
SHARD = 200
"""Examples a file, for all alike."""
Access = Callable[[int], Any]


@dataclass(frozen=True)
class Example:
    """ids [512, 64] int32, log_probs [512, 64] float32, log_tail [512] float32."""

    ids: np.ndarray
    log_probs: np.ndarray
    log_tail: np.ndarray


def examples(count: int, seed: int = 0) -> list[Example]:
    """Rows whose probabilities fall as a power of the rank, a random power a row; a few, over and over."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(min(count, 40)):
        ids = np.sort(rng.integers(0, VOCAB - K, (LENGTH, K)), -1) + np.arange(K)
        fall = -rng.uniform(0.8, 2.5, (LENGTH, 1)) * np.log(np.arange(1, K + 1)) + rng.normal(0, 0.2, (LENGTH, K))
        tail = np.log(rng.uniform(0.02, 0.2, LENGTH))
        kept = fall - np.logaddexp.reduce(fall, -1, keepdims=True) + np.log1p(-np.exp(tail))[:, None]
        found.append(Example(ids.astype(np.int32), rng.permuted(kept, axis=-1).astype(np.float32), tail.astype("f4")))
    return [found[i % len(found)] for i in range(count)]


def write_ours(folder: Path, rows: list[Example]) -> Path:
    with CacheWriter.create(folder / "cache", Settings(VOCAB, K), shard_bytes=1 << 40) as writer:
        for number, row in enumerate(rows):
            writer.append(number, row.ids, row.log_probs, row.log_tail)
            if (number + 1) % SHARD == 0:
                writer.commit()
    return folder / "cache"


def write_safetensors(folder: Path, rows: list[Example]) -> Path:
    from safetensors.numpy import save_file

    target = folder / "safetensors"
    target.mkdir()
    for begin in range(0, len(rows), SHARD):
        part = rows[begin : begin + SHARD]
        path = target / f"{begin:06d}.safetensors"
        logs = np.stack([row.log_probs for row in part]).astype(np.float16)
        save_file({"ids": np.stack([row.ids for row in part]), "log_probs": logs}, path)
        _sync(path)
    return target


def write_parquet(folder: Path, rows: list[Example], group: int) -> Path:
    pa, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    target = folder / f"parquet-{group}"
    target.mkdir()
    for begin in range(0, len(rows), SHARD):
        part = rows[begin : begin + SHARD]
        path = target / f"{begin:06d}.parquet"
        logs = [row.log_probs.astype(np.float16) for row in part]
        columns = {
            "ids": pa.array([row.ids.reshape(-1) for row in part], pa.list_(pa.int32())),
            "log_probs": pa.array([row.reshape(-1) for row in logs], pa.list_(pa.float16())),
        }
        pq.write_table(pa.table(columns), path, row_group_size=group, compression="zstd")
        _sync(path)
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read_safetensors(folder: Path) -> Access:
    from safetensors import safe_open

    files = [safe_open(path, "np") for path in sorted(folder.iterdir())]
    slices = [(file.get_slice("ids"), file.get_slice("log_probs")) for file in files]

    def access(number: int) -> Any:
        ids, logs = slices[number // SHARD]
        place = number % SHARD
        return ids[place : place + 1], logs[place : place + 1]

    return access


def read_parquet(folder: Path, group: int) -> Access:
    pq = importlib.import_module("pyarrow.parquet")
    files = [pq.ParquetFile(path) for path in sorted(folder.iterdir())]

    def access(number: int) -> Any:
        place = number % SHARD
        table = files[number // SHARD].read_row_group(place // group, use_threads=False)
        row = place % group
        return tuple(table[name][row].values.to_numpy(zero_copy_only=False) for name in ("ids", "log_probs"))

    return access


def check(access: dict[str, Access], rows: list[Example]) -> None:
    """Everybody gives the example that was written."""
    for number in (0, len(rows) - 1, len(rows) // 2):
        want = rows[number]
        for name, read in access.items():
            if name == "block":
                continue
            got = read(number)
            ids, logs = (got.ids, got.log_probs) if hasattr(got, "ids") else got
            assert np.array_equal(np.asarray(ids).reshape(want.ids.shape), want.ids), name
            error = np.abs(np.asarray(logs, np.float32).reshape(want.ids.shape) - want.log_probs).max()
            assert error < 0.05, (name, error)


def drop(folder: Path) -> None:
    """Ask the system to forget the files' pages."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(access: Access, order: list[int]) -> list[float]:
    """Seconds of each access."""
    found = []
    for number in order:
        begin = time.perf_counter()
        access(number)
        found.append(time.perf_counter() - begin)
    return found


def measure_cold(
    openers: dict[str, Callable[[], Access]], folders: dict[str, Path], count: int
) -> tuple[dict[str, Access], dict[str, list[float]]]:
    """(readers, opened after the pages were dropped: mapped ones would stay; us of their first accesses)."""
    order = random.Random(1).sample(range(count), min(count, 60))
    access, cold = {}, {}
    for name, opener in openers.items():
        drop(folders[name])
        access[name] = opener()
        cold[name] = spread([1e6 * s for s in timed(access[name], order)]).as_list()
    return access, cold


def measure_warm(access: dict[str, Access], count: int, rounds: int) -> dict[str, list[float]]:
    """us of an access from a random order, medians of twenty in turn."""
    rng = random.Random(0)

    def sampler(read: Access) -> Callable[[], float]:
        return lambda: float(np.median(timed(read, [rng.randrange(count) for _ in range(20)])))

    runs = Alternation({name: sampler(read) for name, read in access.items()}, rounds, budget=60.0)
    for name in access:
        runs.warm_up(name)
    for _ in range(rounds):
        runs.round()
    return {name: spread([1e6 * s for s in seconds]).as_list() for name, seconds in runs.medians.items()}


def _write_all(rows: list[Example], scratch: Path) -> tuple[dict[str, Path], dict[str, list[float]]]:
    """(where each container's files stay, seconds of its three writes); `disk` is a plain file of the cache's bytes."""
    writers: dict[str, Callable[[Path, list[Example]], Path]] = {
        "ours": write_ours,
        "safetensors": write_safetensors,
        "parquet-1": lambda folder, part: write_parquet(folder, part, 1),
        "parquet-64": lambda folder, part: write_parquet(folder, part, 64),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*writers, "disk")}
    places: dict[str, Path] = {}
    for turn in range(3):
        for name, write in writers.items():
            with tempfile.TemporaryDirectory(dir=scratch) as throwaway:
                begin = time.perf_counter()
                place = write(scratch if turn == 0 else Path(throwaway), rows)
                seconds[name].append(time.perf_counter() - begin)
            places.setdefault(name, place)
        seconds["disk"].append(_plain(scratch, places["ours"]))
    return places, seconds


def run(count: int, rounds: int, scratch: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    disturbance = machine.Disturbance()
    rows = examples(count)
    places, seconds = _write_all(rows, scratch)
    openers: dict[str, Callable[[], Access]] = {
        "block": lambda: CacheReader(places["ours"]).block,
        "reader": lambda: CacheReader(places["ours"]).read,
        "cache": lambda: TeacherCache.open(places["ours"]).get,
        "safetensors": lambda: read_safetensors(places["safetensors"]),
        "parquet-1": lambda: read_parquet(places["parquet-1"], 1),
        "parquet-64": lambda: read_parquet(places["parquet-64"], 64),
    }
    access, cold = measure_cold(openers, {name: places.get(name, places["ours"]) for name in openers}, count)
    check(access, rows)
    warm = measure_warm(access, count, rounds)
    times = {name: {"warm": warm[name], "cold": cold[name]} for name in access}
    nbytes = {name: sum(path.stat().st_size for path in place.iterdir()) for name, place in places.items()}
    raw = count * LENGTH * K * 8
    return {
        "benchmark": "cache",
        "machine": machine.describe(),
        "commit": machine.commit(),
        "disturbance": disturbance.shares(),
        "examples": count,
        "tokens": count * LENGTH,
        "bytes_per_token": {name: round(size / count / LENGTH, 1) for name, size in nbytes.items()},
        "write_mb_s": {name: spread([raw / s / 1e6 for s in seconds[name]]).as_list() for name in places},
        "disk_mb_s": spread([nbytes["ours"] / s / 1e6 for s in seconds["disk"]]).as_list(),
        "access_us": times,
    }


def _plain(scratch: Path, like: Path) -> float:
    """Seconds to write the cache's bytes as one file, fsync included."""
    data = b"".join(path.read_bytes() for path in sorted(like.glob("*.safetensors")))
    begin = time.perf_counter()
    with (scratch / "plain").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'':12} {'warm us':>9} {'cold us':>9} {'B/token':>8} {'write MB/s':>11}"]
    for name, times in found["access_us"].items():
        kept = "ours" if name in ("cache", "reader", "block") else name
        cells = (times["warm"][0], times["cold"][0], found["bytes_per_token"][kept], found["write_mb_s"][kept][0])
        lines.append(f"{name:12} {cells[0]:9.1f} {cells[1]:9.1f} {cells[2]:8.1f} {cells[3]:11.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scratch", help="folder for the files (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        found = run(given.examples, given.rounds, Path(scratch))
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
