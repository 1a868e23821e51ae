"""`kdkernels.switch_gate` on a CPU against the eager formula and its compilation: `python -m benchmarks.gate`.

Writes benchmarks/results/gate-cpu.json: for each dtype, batch and vocabulary the milliseconds of the public function,
of its native leaf alone and of the rivals, how many times the public function's time the rivals take, and everything
over the floor: the larger of reading both models' logits once and one exponential per logit, which is what two
softmaxes cost at the least (measured on 2^24 logits or more and scaled: waking threads is no part of it).
`--only BATCH` measures one batch and keeps the file's other entries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import floors, machine
from benchmarks.results import dump, milliseconds
from benchmarks.timing import Alternation, Sampler, ratio
from kdkernels import leaves

RESULTS = Path(__file__).with_name("results") / "gate-cpu.json"
BATCHES, VOCABULARIES = (1, 8, 64), (32000, 151936)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS, BUDGET, PATIENCE = 9, 6.0, 4.0
REPEATS_SECONDS = 2e-3
"""A sample is the mean of as many calls as take about this long: the steps of a generation follow one another."""


@dataclass(frozen=True)
class Case:
    """One shape."""

    dtype: str
    batch: int
    vocab: int

    def logits(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.empty(self.batch, self.vocab).normal_(0, 3, generator=generator) for _ in range(2))
        return student.to(DTYPES[self.dtype]), teacher.to(DTYPES[self.dtype])


def eager(student: Tensor, teacher: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The decision as published code makes it: upcast, softmax and log-softmax of both, two KLs; and who speaks."""
    student, teacher = student.float(), teacher.float()
    q, p = student.softmax(-1), teacher.softmax(-1)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = ((p + q) / 2).log()
    jsd = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / (2 * math.log(2))
    from_teacher = jsd > threshold
    return torch.where(from_teacher[:, None], p, q), from_teacher, jsd


def eager_with_draw(student: Tensor, teacher: Tensor, threshold: float) -> Tensor:
    """`eager`, and the token."""
    return torch.multinomial(eager(student, teacher, threshold)[0], 1)[:, 0]


def _timed(function: Callable[[], object], seconds: float = REPEATS_SECONDS) -> Sampler:
    function()
    start = time.perf_counter()
    function()
    repeats = max(1, min(200, int(seconds / max(1e-6, time.perf_counter() - start))))

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - begin) / repeats

    return sample


def _leaf(student: Tensor, teacher: Tensor, uniforms: Tensor) -> Callable[[], object]:
    rows, vocab = student.shape
    bits = torch.full((rows,), 0.5, dtype=torch.float64)
    out = (torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool), torch.empty(rows))
    plain = (None, 1.0, 0.0)
    return lambda: leaves.gate_(student, *plain, teacher, *plain, bits, uniforms, 1.0, 0, 1.0, vocab, *out)


def contestants(case: Case) -> dict[str, Sampler]:
    """What is measured, by name."""
    student, teacher = case.logits()
    uniforms = torch.rand(case.batch, dtype=torch.float64)
    compiled = torch.compile(eager)
    compiled(student, teacher, 0.5)
    count = 2 * case.batch * case.vocab
    scale = max(1.0, 2**24 / count)
    limits = floors.Floors(int(scale * count) * DTYPES[case.dtype].itemsize, int(scale * count))
    return {
        "floor:read": lambda: limits.read() / scale,
        "floor:exp": lambda: limits.exps() / scale,
        "ours": _timed(lambda: kd.switch_gate(student, teacher, 0.5, uniforms=uniforms, backend="cpp")),
        "leaf": _timed(_leaf(student, teacher, uniforms)),
        "eager": _timed(lambda: eager(student, teacher, 0.5)),
        "eager with draw": _timed(lambda: eager_with_draw(student, teacher, 0.5)),
        "compiled": _timed(lambda: compiled(student, teacher, 0.5)),
    }


def _error(case: Case) -> dict[str, float]:
    """Largest error of the divergence against float64, in bits."""
    student, teacher = case.logits()
    exact = eager_float64(student, teacher)
    ours = kd.switch_gate(student, teacher, 0.5, do_sample=False, backend="cpp").jsd.double()
    published = eager(student, teacher, 0.5)[2].double()
    return {name: float(f"{(x - exact).abs().max():.3g}") for name, x in (("ours", ours), ("eager", published))}


def eager_float64(student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence ``[B]`` in bits of logits in float64."""
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    total = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    return total / (2 * math.log(2))


def measure(case: Case) -> dict[str, Any]:
    """One entry of the JSON."""
    torch._dynamo.reset()
    samplers = contestants(case)
    alternation = Alternation(samplers, ROUNDS, BUDGET, PATIENCE)
    for name in samplers:
        alternation.warm_up(name)
    noise = machine.Disturbance()
    for _ in range(ROUNDS):
        alternation.round()
    seconds = alternation.medians
    floor = [max(pair) for pair in zip(seconds["floor:read"], seconds["floor:exp"], strict=True)]
    names = [name for name in seconds if not name.startswith("floor:")]
    return {
        **asdict(case),
        "ms": {name: milliseconds(rounds) for name, rounds in seconds.items()},
        "over_floor": {name: ratio(seconds[name], floor).as_list() for name in names},
        "times_ours": {
            name: ratio(seconds[name], seconds["ours"]).as_list() for name in names if name not in ("ours", "leaf")
        },
        "error_bits": _error(case),
        "disturbance": noise.shares(),
    }


def _say(entry: dict[str, Any]) -> None:
    ours, leaf = 1e3 * entry["ms"]["ours"][0], 1e3 * entry["ms"]["leaf"][0]
    rivals = ", ".join(f"{name} {times[0]} times ours" for name, times in entry["times_ours"].items())
    head = f"{entry['dtype']} B {entry['batch']} V {entry['vocab']}"
    print(
        f"{head}: {ours:.1f} us (leaf {leaf:.1f}), {entry['over_floor']['ours'][0]} times the floor; {rivals}",
        flush=True,
    )


def _kept(only: int | None) -> list[dict[str, Any]]:
    if only is None or not RESULTS.is_file():
        return []
    return [entry for entry in json.loads(RESULTS.read_text())["times"] if entry["batch"] != only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, choices=BATCHES, help="one batch; the file's other entries stay")
    only = parser.parse_args().only
    times = _kept(only)
    for dtype, batch, vocab in itertools.product(DTYPES, BATCHES, VOCABULARIES):
        if only in (None, batch):
            times.append(measure(Case(dtype, batch, vocab)))
            _say(times[-1])
    times.sort(key=lambda entry: (entry["dtype"], entry["batch"], entry["vocab"]))
    limits = {name: float(f"{rate:.4g}") for name, rate in floors.limits(64, 3).items()}
    found = {"machine": machine.describe(), "commit": machine.commit(), "limits": limits}
    RESULTS.write_text(dump({**found, "times": times}))


if __name__ == "__main__":
    main()
