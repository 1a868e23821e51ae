"""Ranks for tests: ``python shard_worker.py FOLDER JOB...`` runs each job, ``SUITE:RANKS``, in forked processes.

They share what is imported here. Rank r's results are in ``FOLDER/JOB.r``, a JSON object of names and what failed.
Suites: ``cases`` (shard_cases.py, shard_dtensors.py, shard_faults.py), ``killed`` and ``late`` (what becomes of the
last rank), ``mesh`` (shard_mesh.py).
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import signal
import sys
import time
import traceback

import shard_cases
import shard_dtensors
import shard_faults
import shard_mesh
import shard_sparse
import torch
import torch.distributed as dist

import kdkernels as kd

TIMEOUT = 4.0  # seconds that a collective may take where a peer is dead or late


def run_cases(rank: int, size: int) -> dict[str, str]:
    world = shard_cases.World(rank, size)
    results = {}
    for name, case in (shard_cases.CASES | shard_dtensors.CASES | shard_faults.CASES | shard_sparse.CASES).items():
        begin = time.perf_counter()
        try:
            case(world)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - begin:.2f} s", file=sys.stderr)
        failures = torch.tensor([float(bool(results[name]))])
        dist.all_reduce(failures)  # nobody goes on to the next case alone
        if failures:
            return results
    return results


def run_fault(rank: int, size: int, fault: str) -> dict[str, str]:
    """The last rank is killed, or late; the error that each of the others gets, and after how long."""
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    kd.distillation_loss(student, teacher, group=dist.group.WORLD)
    begin = time.perf_counter()
    if rank == size - 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3 * TIMEOUT)
    error = ""
    try:
        kd.distillation_loss(student, teacher, group=dist.group.WORLD)
    except RuntimeError as raised:
        error = str(raised)
    return {"error": error, "seconds": str(time.perf_counter() - begin)}


def run_mesh(rank: int, size: int) -> dict[str, str]:
    try:
        shard_mesh.run()
    except Exception:
        return {"mesh": traceback.format_exc()}
    return {"mesh": ""}


def run_rank(folder: str, suite: str, size: int, rank: int) -> None:
    torch.set_num_threads(1)
    fault = suite in ("killed", "late")
    timeout = datetime.timedelta(seconds=TIMEOUT if fault else 120)
    store = f"file://{folder}/{suite}.{size}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    run = {"cases": run_cases, "mesh": run_mesh}.get(suite, functools.partial(run_fault, fault=suite))
    results = run(rank, size)
    with open(f"{folder}/{suite}:{size}.{rank}", "w", encoding="utf-8") as file:
        json.dump(results, file)


def main() -> None:
    folder, *jobs = sys.argv[1:]
    for job in jobs:
        suite, size = job.split(":")
        children = []
        for rank in range(int(size)):
            child = os.fork()
            if child == 0:
                try:
                    run_rank(folder, suite, int(size), rank)
                finally:
                    os._exit(0)  # a group with a dead peer cannot be shut down in order
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
