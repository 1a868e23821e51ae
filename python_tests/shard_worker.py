"""One process of several: ``python shard_worker.py RANK WORLD STORE SUITE`` writes a JSON line with what failed.

Suites: ``cases`` (shard_cases.py), ``dead`` (a peer is killed, another is late), ``mesh`` (shard_mesh.py).
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

TIMEOUT = 4.0  # seconds that a collective may take where a peer is dead or late


def run_cases(rank: int, size: int) -> dict[str, str]:
    import shard_cases

    world = shard_cases.World(rank, size)
    results = {}
    for name, case in shard_cases.CASES.items():
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


def run_dead(rank: int, size: int) -> dict[str, str]:
    """The last rank is killed; the error that each of the others gets, and after how long."""
    import kdkernels as kd

    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    kd.distillation_loss(student, teacher, group=dist.group.WORLD)
    begin = time.perf_counter()
    if rank == size - 1:
        if os.environ["KD_TEST_FAULT"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3 * TIMEOUT)
    error = ""
    try:
        kd.distillation_loss(student, teacher, group=dist.group.WORLD)
    except RuntimeError as raised:
        error = str(raised)
    return {"error": error, "seconds": str(time.perf_counter() - begin)}


def run_mesh(rank: int, size: int) -> dict[str, str]:
    import shard_mesh

    try:
        shard_mesh.run()
    except Exception:
        return {"mesh": traceback.format_exc()}
    return {"mesh": ""}


def main() -> None:
    rank, size, store, suite = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT if suite == "dead" else 120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    results = {"cases": run_cases, "dead": run_dead, "mesh": run_mesh}[suite](rank, size)
    print(json.dumps(results), flush=True)
    os._exit(0)  # a group with a dead peer cannot be shut down in order


if __name__ == "__main__":
    main()
