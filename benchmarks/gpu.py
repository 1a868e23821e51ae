"""What the losses take on a GPU: `python -m benchmarks.gpu [--quick] [--cases WORDS] [--out FILE]`, from `make gpu`.

Times are CUDA events around one forward and backward, median of alternating rounds, the second-level cache overwritten
before each; memory is `torch.cuda.max_memory_allocated` beyond what the inputs hold. Everyone must first agree with
eager on the inputs that are timed. The share of bandwidth is the least bytes (`registry`) over the time, against a
stream of two reads and one write measured in the same run; fused heads, bound by products, have none.

    --check       is there a GPU that torch can use? Exit status 2 with one line if not.
    --sanitize    some of the GPU tests under NVIDIA's compute-sanitizer, if it is installed.
"""

from __future__ import annotations

import argparse
import gc
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checks, inputs, machine, registry, results, rivals, shapes
from benchmarks.rivals import Contestant, Loss
from benchmarks.rivals.liger import BETA
from benchmarks.runner import Runner
from benchmarks.shapes import Case
from benchmarks.timing import Alternation

PACKAGES = ("ours", "eager", "compile", "liger", "trl")
CASES = [case for case in shapes.FULL if case.divergence in shapes.MAIN]
FLUSH_BYTES = 512 * 2**20
STREAM_BYTES = 2**30
NEVER = float("inf")
"""Seconds: a first run compiles, which says nothing about the next."""
TOOLS = ("memcheck", "racecheck", "initcheck")
SANITIZED = "test_tails or test_bad_rows or test_rows_that_begin_anywhere or test_padding or test_on_a_gpu"


def obstacle() -> str:
    """Why nothing can be measured here, "" if it can."""
    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return f"torch {torch.__version__} ({built}) sees no NVIDIA GPU"
    return ""


def liger_dense(case: Case) -> Loss:
    """Liger's Triton (or CuTe, where installed) JSD on log-probabilities, as its documentation calls it."""
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD(beta=BETA[case.divergence])

    def run(given: inputs.Inputs) -> Tensor:
        assert isinstance(given, inputs.DenseInputs)
        (student,) = given.student()
        return loss(student.log_softmax(-1), given.teacher.log_softmax(-1))

    return run


def liger_fused(case: Case) -> Loss:
    """Liger's fused linear JSD, logits in fp32."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def run(given: inputs.Inputs) -> Tensor:
        assert isinstance(given, inputs.LinearInputs)
        sides = (given.hidden, given.weight, given.teacher_hidden, given.teacher_weight)
        return LigerFusedLinearJSDFunction.apply(*sides, None, BETA[case.divergence])

    return run


SOURCE = "liger-kernel 0.8.5"
GPU_ONLY = [
    Contestant("liger:jsd", liger_dense, f"{SOURCE} LigerJSD", arithmetic="input", packages=("liger_kernel",)),
    Contestant(
        "liger:fused", liger_fused, f"{SOURCE} LigerFusedLinearJSDFunction", ops=("linear",), packages=("liger_kernel",)
    ),
]


def contestants(case: Case) -> list[Contestant]:
    """Who is measured on a case; eager, the reference, first."""
    chosen = [c for c in rivals.contestants(case) if c.name.split(":")[0] in PACKAGES]
    return sorted([*chosen, *(c for c in GPU_ONLY if c.serves(case))], key=lambda c: c.name != "eager")


def make_inputs(case: Case, device: torch.device) -> inputs.Inputs:
    """The inputs of a case, drawn on the CPU (the same everywhere) and moved."""
    given = inputs.make(case, pristine=False)
    if isinstance(given, inputs.DenseInputs):
        moved = inputs.DenseInputs.of(case, given.buffer.to(device), given.teacher.to(device))
        moved._pristine = moved.buffer.clone()
        return moved
    for name in ("hidden", "weight"):
        setattr(given, name, getattr(given, name).detach().to(device).requires_grad_())
    given.teacher_hidden, given.teacher_weight = given.teacher_hidden.to(device), given.teacher_weight.to(device)
    return given


class Clock:
    """Times and weighs work on the current GPU."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call, by events, with nothing of its inputs in a cache."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        before.record()
        work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        """Bytes that one call holds at most beyond what is there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def stream_rate(self) -> float:
        """Bytes a second of two reads and one write, the best of ten."""
        a, b = (torch.ones(STREAM_BYTES // 4, device=self.device) for _ in range(2))
        return 3 * STREAM_BYTES / min(self.seconds(lambda: a.lerp_(b, 0.5)) for _ in range(10))


def first_runs(
    case: Case, given: inputs.Inputs, clock: Clock, alternation: Alternation
) -> tuple[dict[str, Runner], dict[str, dict[str, Any]]]:
    """Runs everyone once and compares with eager, which is first. Who is right, and an entry for each contestant."""
    runners: dict[str, Runner] = {}
    entries: dict[str, dict[str, Any]] = {}
    reference: dict[str, Tensor] = {}
    value = float("nan")
    for contestant in contestants(case):
        name = contestant.name
        entry = entries[name] = {"case": case.id, "contestant": name, "source": contestant.source}
        why = rivals.absent(contestant, case)
        if not why:
            try:
                with clock.device:
                    runner = Runner(contestant, case, given)
                alternation.samplers[name] = sampler(runner, clock)
                alternation.warm_up(name)
            except (RuntimeError, TypeError, ImportError) as error:  # out of memory, or a GPU it does not know
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if not why:
            if not reference:
                reference, value = {k: g.clone() for k, g in given.gradients().items()}, runner.value
            entry["distance_from_eager"] = checks.against(runner, reference, value)
            why = checks.red(contestant, case, entry["distance_from_eager"])
        if why:
            entry["not_timed"] = why
            alternation.drop(name)
        else:
            runners[name] = runner
    return runners, entries


def sampler(runner: Runner, clock: Clock) -> Callable[[], float]:
    """Seconds of one forward and backward of a runner."""

    def sample() -> float:
        runner.inputs.reset()
        return clock.seconds(runner.once)

    return sample


def measure(case: Case, clock: Clock, rate: float, effort: shapes.Effort) -> list[dict[str, Any]]:
    """One entry per contestant: times, share of the bandwidth ``rate``, peak memory; or why there is no time.

    Raises:
        RuntimeError: a loss of ours is wrong or fails: then nothing is reported.
    """
    given = make_inputs(case, clock.device)
    alternation = Alternation({}, effort.rounds, effort.budget, effort.patience)
    runners, entries = first_runs(case, given, clock, alternation)
    wrong = {n: e["not_timed"] for n, e in entries.items() if n.startswith("ours") and "not_timed" in e}
    if wrong:
        raise RuntimeError(f"{case.id}: {wrong}")
    for _ in range(effort.rounds):
        alternation.round()
    least = registry.work(case).bytes
    for name, runner in runners.items():
        ms = results.milliseconds(alternation.medians[name])
        given.reset()
        gc.collect()
        entries[name] |= {
            "ms": ms,
            "bandwidth_share": round(least / (ms[0] / 1e3) / rate, 3) if case.op == "dense" else None,
            "peak_extra_mib": round(clock.peak_bytes(runner.once) / 2**20, 2),
        }
    torch._dynamo.reset()
    return [*entries.values()]


def describe() -> dict[str, Any]:
    """The GPU, without the names of machine or people."""
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def file_name(gpu: str) -> str:
    """`gpu-nvidia-h100-80gb-hbm3.json`."""
    return f"gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def run(cases: list[Case], clock: Clock, gpu: dict[str, Any], quick: bool) -> dict[str, Any]:
    """The whole JSON."""
    rate = clock.stream_rate()
    found: dict[str, Any] = {
        "what": "measured with CUDA events",
        "commit": machine.commit(),
        "gpu": gpu,
        "versions": machine.describe()["versions"],
        "limits": {"stream_bytes_per_second": rate},
        "settings": {"quick": quick, "cases": len(cases)},
        "time": [],
    }
    effort = shapes.Effort(3, 0.5, NEVER) if quick else shapes.Effort(15, 3.0, NEVER)
    for case in cases:
        print(case.id, file=sys.stderr, flush=True)
        found["time"] += measure(case, clock, rate, effort)
    return found


def sanitize() -> int:
    """Some GPU tests under each of compute-sanitizer's tools; says so where it is not installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: not run (it comes with the CUDA toolkit)")
        return 0
    tests = ["-m", "pytest", "-q", "-x", "-p", "python_tests.gpu_lane", "-m", "gpu and not slow", "-k", SANITIZED]
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "1", "--target-processes", "all", sys.executable, *tests]
        status = subprocess.run([*command, "python_tests"], cwd=machine.ROOT, check=False).returncode
        if status:
            print(f"compute-sanitizer --tool {name} ended with {status}", file=sys.stderr)
            return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    out.add_argument("--check", action="store_true", help="only say whether there is a usable GPU")
    out.add_argument("--sanitize", action="store_true", help="run some tests under compute-sanitizer instead")
    out.add_argument("--quick", action="store_true", help="three rounds")
    out.add_argument("--cases", default="", help="only cases whose id holds all of these comma-separated words")
    out.add_argument("--out", type=Path, help="the JSON (default, if all cases: benchmarks/results/gpu-NAME.json)")
    return out


def main(words: list[str] | None = None) -> int:
    """Returns the exit status: 2 without a GPU or for wrong input."""
    options = parser().parse_args(words)
    why = obstacle()
    try:
        cases = shapes.select(CASES, options.cases)
    except ValueError as error:
        why = why or str(error)
    if why:
        print(f"benchmarks.gpu: {why}", file=sys.stderr)
        return 2
    if options.check:
        return 0
    if options.sanitize:
        return sanitize()
    from benchmarks import gpu_report

    gpu = describe()
    found = run(cases, Clock(), gpu, options.quick)
    partial = bool(options.cases) or options.quick
    out = options.out or machine.ROOT / ("runs" if partial else "benchmarks/results") / file_name(gpu["name"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(results.dump(found))
    print(f"wrote {out}", file=sys.stderr)
    print(gpu_report.gpu_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
