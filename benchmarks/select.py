"""`kdkernels.compress` on a CPU against torch, numpy and the compiled combination: `python -m benchmarks.select`.

Writes benchmarks/results/select-cpu.json: for each dtype, vocabulary and k, times over the floor (the larger of reading
the logits once and one exponential per logit), of ours (selection, log-sum-exp and tail in one call) and of each rival;
then ours on hard rows over its own time on random ones. `--quick` measures V = 151936 alone.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import floors, machine
from benchmarks.results import dump, milliseconds
from benchmarks.timing import Alternation, Sampler, ratio

RESULTS = Path(__file__).with_name("results") / "select-cpu.json"
VOCABULARIES, KEPT = (32000, 151936, 262144), (8, 64, 256, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ELEMENTS = 256 * 151936
ROUNDS, BUDGET, PATIENCE = 9, 6.0, 4.0


@dataclass(frozen=True)
class Case:
    """One shape: as many rows as make about `ELEMENTS` logits."""

    dtype: str
    vocab: int
    k: int

    @property
    def rows(self) -> int:
        return ELEMENTS // self.vocab

    def logits(self, rows: Tensor | None = None) -> Tensor:
        """Random logits, or every row as given."""
        generator = torch.Generator().manual_seed(0)
        if rows is None:
            z = torch.empty(self.rows, self.vocab).normal_(0, 3, generator=generator)
        else:
            z = rows.repeat(self.rows, 1)
        return z.to(DTYPES[self.dtype])


def _timed(function: Callable[[], object]) -> Sampler:
    def sample() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return sample


def _topk_and_normaliser(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, ids = torch.topk(z, k)
    return values, ids, torch.logsumexp(z.float(), -1)


def _floors(case: Case) -> dict[str, Sampler]:
    count = case.rows * case.vocab
    limits = floors.Floors(count * DTYPES[case.dtype].itemsize, count)
    return {"floor:read": limits.read, "floor:exp": limits.exps}


def contestants(case: Case) -> dict[str, Sampler]:
    """What is measured, by name. numpy has no bfloat16."""
    z = case.logits()
    compiled = torch.compile(_topk_and_normaliser)
    compiled(z, case.k)
    found: dict[str, Callable[[], object]] = {
        "ours": lambda: kd.compress(z, case.k, backend="cpp"),
        "torch.topk": lambda: torch.topk(z, case.k),
        "torch.topk + logsumexp": lambda: _topk_and_normaliser(z, case.k),
        "compiled": lambda: compiled(z, case.k),
    }
    if case.dtype == "fp32":
        found["numpy.argpartition"] = lambda: np.argpartition(z.numpy(), case.vocab - case.k, axis=-1)
    return {**_floors(case), **{name: _timed(function) for name, function in found.items()}}


def hard_rows(vocab: int, k: int) -> Iterator[tuple[str, Tensor]]:
    """Rows on which a sampled threshold or a fixed grouping does badly."""
    i, noise = torch.arange(vocab), torch.randn(vocab, generator=torch.Generator().manual_seed(k))
    eighth = vocab // 8
    yield "ascending", i * 1e-4
    yield "descending", -i * 1e-4
    yield "constant", torch.ones(vocab)
    yield "two values", torch.where(noise > 0, 1.0, -1.0)
    yield "ties at the threshold", (3 * noise).clamp(-20, 4)
    yield "one entry", torch.where(i == vocab // 2, 60.0, 0.0)
    yield "one entry, far above", torch.where(i == vocab // 2, 600.0, noise)
    yield "peaked", 100 * noise
    yield "sawtooth", (i % 512) * 0.01
    yield "bunched groups", torch.where(i % 128 < 8, 10.0, 0.0) + 0.1 * noise
    yield "bunched half", (i % eighth) / eighth * 8 + 1e-3 * noise
    yield "sampled positions poisoned", torch.where(i % 32 == 0, -1e4, 3 * noise)
    yield "half masked", torch.where(i % 2 == 0, -torch.inf, 3 * noise)


def _run(samplers: dict[str, Sampler], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    alternation = Alternation(samplers, rounds, BUDGET, PATIENCE)
    for name in samplers:
        alternation.warm_up(name)
    noise = machine.Disturbance()
    for _ in range(rounds):
        alternation.round()
    return alternation.medians, noise.shares()


def measure(case: Case) -> dict[str, Any]:
    """One entry of the JSON."""
    torch._dynamo.reset()
    seconds, disturbance = _run(contestants(case), ROUNDS)
    floor = [max(pair) for pair in zip(seconds["floor:read"], seconds["floor:exp"], strict=True)]
    names = [name for name in seconds if not name.startswith("floor:")]
    return {
        "dtype": case.dtype, "rows": case.rows, "vocab": case.vocab, "k": case.k,
        "ms": {name: milliseconds(rounds) for name, rounds in seconds.items()},
        "over_floor": {name: ratio(seconds[name], floor).as_list() for name in names},
        "times_ours": {name: ratio(seconds[name], seconds["ours"]).as_list() for name in names if name != "ours"},
        "disturbance": disturbance,
    }  # fmt: skip


def measure_hard(case: Case) -> dict[str, Any]:
    """Ours on hard rows over ours on random ones, which every round runs too."""
    ratios = {}
    random = case.logits()
    for name, row in hard_rows(case.vocab, case.k):
        z = case.logits(row)
        samplers = {
            "hard": _timed(lambda z=z: kd.compress(z, case.k, backend="cpp")),  # type: ignore[misc]
            "random": _timed(lambda: kd.compress(random, case.k, backend="cpp")),
        }
        seconds, _ = _run(samplers, 5)
        ratios[name] = ratio(seconds["hard"], seconds["random"]).as_list()
    return {"dtype": case.dtype, "rows": case.rows, "vocab": case.vocab, "k": case.k, "over_random": ratios}


def _say(entry: dict[str, Any]) -> None:
    head = f"{entry['dtype']} V {entry['vocab']} k {entry['k']}"
    if "over_random" in entry:
        worst = max(entry["over_random"].items(), key=lambda item: item[1][0])
        print(f"{head}: hardest rows {worst[0]}, {worst[1][0]} times random ones", flush=True)
        return
    rivals = ", ".join(f"{name} {times[0]} times ours" for name, times in entry["times_ours"].items())
    print(f"{head}: {entry['over_floor']['ours'][0]} times the floor; {rivals}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="V = 151936 alone, nothing written")
    quick = parser.parse_args().quick
    cases = [Case(*c) for c in itertools.product(DTYPES, (151936,) if quick else VOCABULARIES, KEPT)]
    times, hard = [], []
    for case in cases:
        times.append(measure(case))
        _say(times[-1])
    for case in cases:
        if case.vocab == 151936 and case.k in (8, 64, 1024):
            hard.append(measure_hard(case))
            _say(hard[-1])
    if not quick:
        limits = {name: float(f"{rate:.4g}") for name, rate in floors.limits().items()}
        found = {"machine": machine.describe(), "commit": machine.commit(), "limits": limits}
        RESULTS.write_text(dump({**found, "times": times, "hard_rows": hard}))


if __name__ == "__main__":
    main()
