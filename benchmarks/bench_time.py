"""The timings, as pytest-benchmark cases: `python -m pytest benchmarks/bench_time.py --case ID --benchmark-json FILE`.

One benchmark is one case, and one of pytest-benchmark's rounds is one round of `timing.Alternation`: every contestant
in turn. pytest-benchmark drives the rounds, writes the JSON and times the round as a whole; the contestants' own
times travel in `extra_info`, because the library measures one callable at a time and two that are measured one after
the other cannot be compared on a machine whose clock drifts by 20 %.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import checks, inputs, machine, registry, rivals
from benchmarks.floors import Floors
from benchmarks.rivals import ours
from benchmarks.runner import Runner, flush
from benchmarks.shapes import Case
from benchmarks.timing import Alternation, Sampler

REFERENCE = "eager"


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    """Compiled code and tensors of one case do not outlive it."""
    yield
    torch._dynamo.reset()
    gc.collect()


def _runners(case: Case, given: inputs.Inputs) -> tuple[dict[str, Runner], dict[str, str]]:
    """Runners of those who are installed and right; for the others why not. The reference comes first."""
    out: dict[str, str] = {}
    found: dict[str, Runner] = {}
    for contestant in sorted(rivals.contestants(case), key=lambda c: c.name != REFERENCE):
        wrong = rivals.absent(contestant, case) or checks.tiny(contestant, case)
        if wrong:
            out[contestant.name] = wrong
        else:
            found[contestant.name] = Runner(contestant, case, given)
    return found, out


def _warm(
    runners: dict[str, Runner], out: dict[str, str], alternation: Alternation, given: inputs.Inputs
) -> dict[str, dict[str, float]]:
    """First runs, each compared with the reference on the very inputs that are timed."""
    reference: dict[str, Tensor] = {}
    value, errors = float("nan"), {}
    for name, runner in runners.items():
        alternation.warm_up(name)
        if not reference:
            reference, value = {k: g.clone() for k, g in given.gradients().items()}, runner.value
        errors[name] = checks.against(runner, reference, value)
        wrong = checks.red(runner.contestant, given.case, errors[name])
        if wrong:
            out[name] = wrong
            alternation.drop(name)
    return errors


def _limits(case: Case, given: inputs.Inputs) -> dict[str, Sampler]:
    """What the machine takes for the least work, run in the same rounds."""
    if case.op == "dense":
        floors = Floors(case.logits_bytes, registry.work(case).exponentials)
        return {"floor:stream": floors.stream, "floor:exp": floors.exps}
    return {"floor:products": ours.bare_products(case, given)}


def test_time(case: Case, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Times everyone who computes the case; ours must have been right."""
    rounds, budget, patience = (request.config.getoption(f"--{word}") for word in ("rounds", "budget", "patience"))
    given = inputs.make(case)
    runners, out = _runners(case, given)
    samplers: dict[str, Sampler] = {name: runner.sample for name, runner in runners.items()}
    alternation = Alternation({**samplers, **_limits(case, given)}, rounds, budget, patience)
    flush()
    errors = _warm(runners, out, alternation, given)
    for name in alternation.samplers.keys() - runners.keys():
        alternation.warm_up(name)
    disturbance = machine.Disturbance()
    benchmark.pedantic(alternation.round, rounds=rounds, iterations=1)
    benchmark.extra_info.update(case=case.id, seconds=alternation.medians, errors=errors, out=out)
    benchmark.extra_info["disturbance"] = disturbance.shares()
    failed = {name: why for name, why in out.items() if name.startswith("ours")}
    assert not failed, f"no time is reported for a loss that is wrong: {failed}"
