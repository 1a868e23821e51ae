"""The benchmarks' own arithmetic, and that everyone who is timed computes the same loss."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import golden
import pytest
import torch

from benchmarks import accuracy, checks, floors, inputs, machine, registry, rivals, shapes
from benchmarks.rivals import Contestant, eager
from benchmarks.runner import Runner
from benchmarks.shapes import MAIN, OTHERS, PARAMETERS, Case
from benchmarks.timing import Alternation, ratio, spread

DENSE = Case("dense", "jsd", "bf16", 3, 10)
LINEAR = Case("linear", "jsd", "fp32", 3, 10, H=4, Ht=5, chunk_bytes=160)


def test_work_of_the_dense_op_is_three_streams_and_two_exponentials() -> None:
    work = registry.work(DENSE)
    assert (work.read, work.written, work.bytes) == (2 * 3 * 10 * 2, 3 * 10 * 2, 180)
    assert (work.exponentials, work.flops) == (60, 0)


def test_work_of_the_fused_op_counts_four_products() -> None:
    work = registry.work(LINEAR)
    products = [(3, 5, 10), (3, 4, 10), (3, 10, 4), (10, 3, 4)]  # zt, zs, dX, dW as (rows, inner, columns)
    assert work.flops == sum(2 * m * k * n for m, k, n in products)
    assert work.read == 4 * (3 * 4 + 10 * 4 + 3 * 5 + 10 * 5)
    assert work.written == 4 * (3 * 4 + 10 * 4)


def test_the_floor_is_the_slowest_of_the_limits() -> None:
    work = registry.Work(read=60, written=40, exponentials=10, flops=0)
    assert registry.floor_seconds(work, bytes_per_second=10.0, exps_per_second=10.0) == 10.0
    assert registry.floor_seconds(work, bytes_per_second=1000.0, exps_per_second=10.0) == 1.0
    with pytest.raises(ValueError, match=r"exps_per_second is 0\.0: a measured rate > 0"):
        registry.floor_seconds(work, bytes_per_second=10.0, exps_per_second=0.0)


def test_every_case_has_an_id_of_its_own_and_can_be_selected() -> None:
    for cases in (shapes.FULL, shapes.QUICK, shapes.MEMORY):
        assert len({case.id for case in cases}) == len(cases)
    assert all("jsd-bf16" in case.id for case in shapes.select(shapes.FULL, "jsd,bf16"))
    with pytest.raises(ValueError, match="cases='jds' matches none of dense-forward_kl"):
        shapes.select(shapes.FULL, "jds")


def test_spread_and_ratio() -> None:
    s = spread([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (s.median, s.low, s.high, s.n) == (3.0, 2.0, 4.0, 5)
    assert ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0, 9.0]).median == 2.0  # 2, 3 and 1; the fourth round has no partner
    with pytest.raises(ValueError, match="spread of no values"):
        spread([])


def test_rounds_alternate_and_slow_contestants_drop_out() -> None:
    order: list[str] = []
    seconds = {"fast": 0.04, "slow": 0.3, "slowest": 2.0}

    def sampler(name: str) -> float:
        order.append(name)
        return seconds[name]

    a = Alternation({name: (lambda name=name: sampler(name)) for name in seconds}, rounds=4, budget=1.0, patience=1.5)
    for name in seconds:
        a.warm_up(name)
    order.clear()
    for _ in range(a.rounds):
        a.round()
    assert order == ["fast", "fast", "slow"] * 3 + ["fast", "fast"]
    assert a.medians == {"fast": [0.04] * 4, "slow": [0.3] * 3, "slowest": [2.0]}
    a.drop("slow")
    assert "slow" not in a.medians


def test_the_warm_up_does_not_count() -> None:
    times = iter([5.0, 0.7, 0.6, 0.9])
    a = Alternation({"paging": lambda: next(times)}, rounds=3, budget=1.0)
    a.warm_up("paging")
    for _ in range(a.rounds):
        a.round()
    assert a.medians == {"paging": [0.7, 0.6]}  # 1.3 s are over the budget of 1: no third round


def test_the_floors_compute_what_they_are_named_after() -> None:
    x = torch.linspace(-80, 1, 4096)
    torch.testing.assert_close(floors.exponential(x).double(), x.double().exp(), rtol=1e-5, atol=0)
    f = floors.Floors(bytes_each=1 << 16, exponentials=1 << 14)
    assert f.stream_bytes == 3 << 16
    assert f.exp_count == 1 << 14
    before = (f._a + f._b) / 2
    assert f.stream() > 0
    assert f.read() > 0
    assert f.exps() > 0
    torch.testing.assert_close(f._a, before)


def test_peak_memory_sees_an_allocation() -> None:
    block = 64 * 2**20
    machine.peak_window()
    before = machine.resident_bytes()
    held = torch.ones(block // 4)
    assert block <= machine.peak_bytes() - before < 1.2 * block
    assert held.numel() == block // 4


def test_disturbance_sees_other_processes() -> None:
    quiet = machine.Disturbance()
    torch.ones(1 << 22).exp().sum()
    assert 0 <= quiet.shares()["others"] <= 1
    disturbance = machine.Disturbance()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(1.0)
        shares = disturbance.shares()  # before it is waited for, which would make its time ours
        other.kill()
    assert shares["others"] > 0.3 / (os.cpu_count() or 1)


def _tiny(op: str, name: str) -> Case:
    return checks.small(Case(op, name, "fp32", 16, 301, H=24 if op == "linear" else 0, Ht=40 if op == "linear" else 0))


PAIRS = [
    (contestant, _tiny(op, name))
    for op in ("dense", "linear")
    for name in (*MAIN, *OTHERS)
    for contestant in rivals.contestants(_tiny(op, name))
    if not contestant.compiled and (op == "dense" or name in MAIN)
]


@pytest.mark.parametrize(
    ("contestant", "case"), PAIRS, ids=[f"{c.name}-{case.op}-{case.divergence}" for c, case in PAIRS]
)
def test_everyone_computes_the_same_loss(contestant: Contestant, case: Case) -> None:
    if contestant.missing():
        pytest.skip(f"not installed: {', '.join(contestant.missing())}")
    assert checks.tiny(contestant, case) == ""


def test_eager_and_ours_are_never_skipped() -> None:
    always = {c.name for c in rivals.everyone() if not set(c.packages) - {"kdkernels"}}
    assert always >= {"ours", "ours:inplace", "eager", "eager:mean", "eager:bf16", "compile", "compile:mean"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "compile:mean"])
def test_the_compiled_formula_computes_the_same_loss(name: str) -> None:
    case = _tiny("dense", "jsd")
    contestant = next(c for c in rivals.contestants(case) if c.name == name)
    given = inputs.make(case)
    runner = Runner(contestant, case, given)
    runner.once()
    want = checks.expected(case, given)
    assert abs(runner.value - float(want.loss.sum())) < 1e-6
    assert checks.gradient_errors(given.gradients(), want)["dlogits"] < 1e-6


def test_a_wrong_loss_has_no_time() -> None:
    case = _tiny("dense", "forward_kl")
    swapped = eager.builder({"forward_kl": eager.reverse_kl}, True, eager.as_it_is)
    assert "another loss" in checks.tiny(Contestant("swapped", swapped, ""), case)
    doubled = eager.builder({"forward_kl": lambda *x: 2 * eager.forward_kl(*x)}, True, eager.as_it_is)
    given = inputs.make(case)
    reference, wrong = (Runner(Contestant("x", build, ""), case, given) for build in (doubled, swapped))
    reference.once()
    gradients = {name: g.clone() for name, g in given.gradients().items()}
    given.reset()
    wrong.once()
    assert "differs from the reference" in checks.red(
        wrong.contestant, case, checks.against(wrong, gradients, reference.value)
    )


def test_in_place_contestants_get_fresh_logits_every_time() -> None:
    case = _tiny("dense", "jsd")
    given = inputs.make(case)
    before = given.buffer.clone()
    contestant = next(c for c in rivals.contestants(case) if c.name == "ours:inplace")
    runner = Runner(contestant, case, given)
    runner.sample()
    first, value = given.gradients()["dlogits"].clone(), runner.value
    assert not torch.equal(given.buffer, before)
    runner.sample()
    assert torch.equal(given.gradients()["dlogits"], first)
    assert runner.value == value
    given.reset()
    assert torch.equal(given.buffer, before)


@pytest.mark.parametrize("name", [*MAIN, *OTHERS])
def test_the_eager_formulas_are_golden_in_float64(name: str) -> None:
    student, teacher, _ = accuracy.pair("ordinary", "fp32", 301)
    leaf = student.double().requires_grad_()
    loss = eager.FORMULAS[name](teacher.double().log_softmax(-1), leaf.log_softmax(-1), *PARAMETERS[name])
    loss.sum().backward()
    want = golden.distill(student, teacher, name, *PARAMETERS[name])
    assert golden.loss_error(loss, want.loss) < 1e-12
    assert golden.gradient_error(leaf.grad, want.grad, want.scale) < 1e-12


def test_errors_are_small_and_named() -> None:
    entry = accuracy.dense("jsd", "fp32", "ordinary", 301)
    assert entry["ours"]["loss"] < 1e-6
    assert entry["ours"]["gradient"] < 1e-6
    assert accuracy.near_convergence("forward_kl", 1e-6, 301)["ours"] < 1e-3
