"""Measures everything and writes the JSON: `python -m benchmarks.run [--quick] [--cases WORDS] [--out FILE]`.

Times of a group of cases come from a process of their own, once with the default allocator and once with
MALLOC_MMAP_MAX_=0: glibc then keeps large blocks instead of returning them to the system after each use, which spares
out-of-place code the page faults. Memory comes from a process per measurement. `--lock FILE` holds a lock on a file
while one of these processes runs, for a machine shared with other work.

A full run takes about an hour. What is finished is noted in runs/bench.jsonl: a run that was stopped goes on there if
neither commit, settings nor machine have changed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import machine, memory, results, rivals, shapes
from benchmarks.devices import DEVICES
from benchmarks.journal import Journal
from benchmarks.shapes import Case

ALLOCATORS = {"default": {}, "MALLOC_MMAP_MAX_=0": {"MALLOC_MMAP_MAX_": "0"}}
BUSY = 0.1
"""Share of processor time in other processes above which a timing is called disturbed."""
ATTEMPTS = 3
"""Times that a disturbed timing is tried before it is left out and named."""
FULL = machine.ROOT / "benchmarks" / "results" / "cpu.json"
QUICK = machine.ROOT / "runs" / "bench-quick.json"


@contextmanager
def _alone(lock: str | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with Path(lock).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _module(name: str, *words: str) -> Any:
    """JSON that `python -m name` prints last."""
    done = subprocess.run(
        [sys.executable, "-m", name, *words], cwd=machine.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"python -m {name} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def time_group(cases: list[Case], allocator: str, effort: shapes.Effort) -> list[dict[str, Any]]:
    """Entries of cases timed in one process.

    Raises:
        RuntimeError: the process failed, or a loss of ours was wrong; its output is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "benchmarks/bench_time.py", f"--benchmark-json={out}"]
        command += [f"--{word}={value}" for word, value in asdict(effort).items()]
        command += [f"--case={case.id}" for case in cases]
        environment = {**os.environ, **ALLOCATORS[allocator]}
        done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
        extras = [entry["extra_info"] for entry in json.loads(out.read_text())["benchmarks"]]
    by_id = {case.id: case for case in cases}
    return [results.timed(by_id[extra["case"]], allocator, extra) for extra in extras]


def groups(cases: list[Case]) -> list[tuple[str, list[Case]]]:
    """(allocator, cases of one process): same op, vocabulary and dtype, so that a process lasts a minute or two."""

    def key(case: Case) -> tuple[str, int, str, bool]:
        return case.op, case.V, case.dtype, case.divergence in shapes.MAIN

    kept = [case for case in cases if case in shapes.KEPT or case in shapes.QUICK]
    return [
        (allocator, list(group))
        for allocator, chosen in zip(ALLOCATORS, (cases, kept), strict=True)
        for _, group in groupby(chosen, key=key)
    ]


def _times(cases: list[Case], options: argparse.Namespace, journal: Journal) -> tuple[list[Any], dict[str, str]]:
    """Entries, and by case and allocator why it has none: other work had the processors each time it was measured."""
    found: list[dict[str, Any]] = []
    disturbed: dict[str, str] = {}
    for allocator, group in groups(cases):
        for attempt in range(ATTEMPTS):
            name = f"time {group[0].id} and {len(group) - 1} more, {allocator}" + f", attempt {attempt + 1}" * (
                attempt > 0
            )

            def work(allocator: str = allocator, group: list[Case] = group) -> list[dict[str, Any]]:
                with _alone(options.lock):
                    return time_group(group, allocator, shapes.effort(group[0], options.quick))

            entries = journal.do(name, work)
            others = max(entry["disturbance"]["others"] for entry in entries)
            if others <= BUSY:
                found += entries
                break
            _say(f"  {others:.0%} of the processors went to other processes: to be measured again")
        else:
            disturbed |= {
                f"{case.id}, {allocator}": f"other processes took {others:.0%} of the processors" for case in group
            }
    return found, disturbed


def _memory(cases: list[Case], options: argparse.Namespace, journal: Journal) -> list[dict[str, Any]]:
    def work(case: Case) -> list[dict[str, Any]]:
        entries = []
        for contestant in rivals.contestants(case):
            mine = contestant.name.startswith("ours")
            if rivals.absent(contestant, case) or (case.N > 2048 and not mine):
                continue  # the larger N shows that ours is flat in it
            for allocator in ALLOCATORS if mine else ["default"]:
                with _alone(options.lock):
                    entry = memory.in_fresh_process(case, contestant.name, ALLOCATORS[allocator])
                entries.append({**entry, "allocator": allocator})
        return entries

    return [entry for case in cases for entry in journal.do(f"memory {case.id}", partial(work, case))]


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the options ask for."""
    cases = shapes.select(shapes.QUICK if options.quick else shapes.FULL, options.cases)
    started = time.monotonic()
    found: dict[str, Any] = {"commit": machine.commit(), "settings": vars(options), "cases": len(cases)}
    found["machine"] = _module("benchmarks.machine")
    settings = {**vars(options), "out": None, "commit": found["commit"], "machine": found["machine"]}
    journal = Journal(machine.ROOT / "runs" / "bench.jsonl", settings, _say)

    def alone(*words: str) -> Any:
        with _alone(options.lock):
            return _module(*words)

    found["limits"] = journal.do("limits", partial(alone, "benchmarks.floors"))
    parts = options.parts.split(",")
    if "time" in parts:
        found["time"], found["not_shown"] = _times(cases, options, journal)
    if "memory" in parts and not options.quick:
        found["memory"] = _memory(shapes.MEMORY, options, journal)
    if "errors" in parts:
        found["errors"] = journal.do(
            "errors", partial(alone, "benchmarks.accuracy", *(["--quick"] if options.quick else []))
        )
    found["sources"] = {c.name: c.source for c in rivals.everyone()}
    found["minutes"] = round((time.monotonic() - started) / 60, 1)
    journal.close()
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    out.add_argument("--quick", action="store_true", help="small shapes, two minutes; writes runs/bench-quick.json")
    out.add_argument("--cases", default="", help="only cases whose id holds all of these comma-separated words")
    out.add_argument("--parts", default="time,memory,errors", help="which of time, memory, errors (default: all)")
    out.add_argument("--out", type=Path, default=None, help=f"the JSON (default: {FULL.relative_to(machine.ROOT)})")
    out.add_argument(
        "--model", choices=[*DEVICES], help="measure nothing: bounds on this GPU, computed from compiled kernels"
    )
    out.add_argument("--lock", default=None, help="file to lock while a process measures")
    return out


def main(words: list[str] | None = None) -> None:
    """Measures, writes the JSON and the plot, prints the tables."""
    from benchmarks import report

    options = parser().parse_args(words)
    if options.model:
        from benchmarks import model

        sys.exit(model.main(options.model, options.cases, options.out))
    del options.model
    out = options.out or (QUICK if options.quick else FULL)
    options.out = None  # a path of this machine says nothing about the result
    lock, found = options.lock, measure(options)
    found["settings"] = {k: v for k, v in vars(options).items() if k not in ("out", "lock")} | {
        "lock": lock is not None
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(results.dump(found))
    _say(f"wrote {out}")
    print(report.markdown(found))
    if not options.quick and not options.cases:
        from benchmarks import plot

        plot.draw(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
