"""Peak extra memory of one forward and backward, in a fresh process.

The process makes its inputs, runs the contestant once on small inputs (so that libraries, thread pools and oneDNN's
kernels are there; compiled ones once on the inputs themselves, then everything is given back), writes 5 to
/proc/self/clear_refs, runs once and reads VmHWM. What is reported is beyond the inputs and includes the outputs
(gradients), whose size is reported beside it.

    python -m benchmarks.memory CASE CONTESTANT        one measurement, JSON on standard output
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from typing import Any

import kdkernels as kd
from benchmarks import checks, inputs, machine, rivals
from benchmarks.runner import Runner
from benchmarks.shapes import MEMORY, Case


def output_bytes(case: Case, overwrites: bool) -> int:
    """Bytes of the gradients a contestant returns; none where it overwrites its input."""
    if case.op == "dense":
        return 0 if overwrites else case.logits_bytes
    return (case.N * case.H + case.V * case.H) * case.itemsize


def measure(case: Case, name: str) -> dict[str, Any]:
    """In this process, which must be fresh."""
    contestant = next(c for c in rivals.contestants(case) if c.name == name)
    if not contestant.compiled:
        small = checks.small(case, case.dtype)
        Runner(contestant, small, inputs.make(small)).once()
    given = inputs.make(case, pristine=False)
    runner = Runner(contestant, case, given)
    if contestant.compiled:
        runner.once()
        given.reset()
    kd.memory.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    machine.peak_window()
    before = machine.resident_bytes()
    runner.once()
    extra = machine.peak_bytes() - before
    outputs = output_bytes(case, contestant.overwrites)
    return {
        "case": case.id,
        "contestant": name,
        "extra_mib": round(extra / 2**20, 2),
        "outputs_mib": round(outputs / 2**20, 2),
        "beyond_outputs_mib": round((extra - outputs) / 2**20, 2),
        "logits_tensors": round(extra / case.logits_bytes, 3),
    }


def in_fresh_process(case: Case, name: str, environment: dict[str, str]) -> dict[str, Any]:
    """`measure` in a process of its own; a failure is reported as {"case", "contestant", "error"}."""
    command = [sys.executable, "-m", "benchmarks.memory", case.id, name]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=machine.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"case": case.id, "contestant": name, "error": f"exit {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    wanted, who = sys.argv[1:3]
    print(json.dumps(measure(next(case for case in MEMORY if case.id == wanted), who)))
