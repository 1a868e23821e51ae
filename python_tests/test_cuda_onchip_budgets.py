"""What the on-chip kernels may cost: the committed table, and the limits that matter. Damaged kernels are noticed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import cases
import onchip_budgets as budgets
import pytest
import torch
from emulated_onchip import kernel_text, serve, with_clusters
from ptx import PTXError
from ptx.compile import nvcc
from torch import Tensor

import kdkernels as kd
from kdkernels import onchip

pytestmark = [pytest.mark.sample(3), pytest.mark.skipif(nvcc() is None, reason="no nvcc here")]

TABLE = json.loads(budgets.TABLE.read_text())
CASES = {case.name: case for case in budgets.cases()}
MORE = 1.005
"""What a count may exceed the table by: it is exact for one compiler version."""


def test_the_table_has_every_kernel() -> None:
    assert set(TABLE) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_every_logit_is_read_once(name: str) -> None:
    row = TABLE[name]
    assert row["loads"] <= 1.00 * 1.01
    assert row["stores"] <= 1.00 * 1.01
    assert row["instructions"] <= 40
    assert row["issued"] <= 40
    assert row["special"] <= 4.25
    assert row["spills"] == 0


@pytest.mark.parametrize("name", CASES)
def test_a_block_fits_a_multiprocessor(name: str) -> None:
    facts = budgets.facts(CASES[name])
    assert facts.ctas(32 * onchip.WARPS, int(TABLE[name]["shared"])) == 1


@pytest.mark.parametrize(
    "name", [name if name == "forward_kl bf16 sm_90" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_no_kernel_costs_more_than_the_table_says(name: str) -> None:
    now, limits = budgets.measure(CASES[name]), TABLE[name]
    worse = {key: (now[key], limit) for key, limit in limits.items() if now[key] > limit * MORE}
    assert not worse, f"{name} (now, table): {worse}; if that is meant: python python_tests/onchip_budgets.py --write"


def test_plans_keep_rows_on_chip() -> None:
    for vocab in (1, 1000, 32000, 49152, 128256, 151936, 202048, 262144, 400000):
        for size in (2, 4):
            plan = onchip.plan(vocab * size)
            if plan is None:
                assert vocab * size > 900_000
                continue
            assert plan.shared <= onchip.SHARED
            assert plan.stages * plan.cluster * onchip.WARPS * onchip.CHUNK >= vocab * size
    assert [onchip.plan(2 * vocab).cluster for vocab in (32000, 49152, 128256, 151936)] == [1, 2, 4, 4]  # type: ignore[union-attr]


def damaged(text: str, name: str) -> Iterator[tuple[str, str]]:
    """What was done, and the module. Left alone is what the emulator cannot see: that blocks start one after another
    (the first meeting), lanes of a warp out of step (`bar.warp.sync`), and fences between initialisation and copies."""
    start = text.index(f".visible .entry {name}(")
    end = text.find(".visible .entry", start + 1) % (len(text) + 1)
    meetings = re.finditer(r"barrier\.cluster\.arrive[^;]*;\s*barrier\.cluster\.wait[^;]*;", text[start:end])
    changes = [("meeting", m, "") for m in [*meetings][1:]]
    waits = re.finditer(r"mbarrier\.try_wait[^;]*;", text[start:end])
    changes += [("wait", m, "setp.eq.u32 p, 0, 0;") for m in waits]
    copies = re.finditer(r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\]), %r\d+;", text[start:end])
    changes += [("bytes", m, rf"{m[1]}, 4080;") for m in copies]
    for what, match, instead in changes:
        yield what, text[: start + match.start()] + instead + text[start + match.end() :]


def results(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Loss with and without the gradient, and the gradient."""
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, "reverse_kl", backend="cuda", reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    alone = kd.distillation_loss(student, teacher, "reverse_kl", backend="cuda", reduction="none")
    return loss.detach(), alone, gradient


@pytest.mark.slow
def test_damage_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for every path: the quick one, a small divergence, masked entries; more rows than the rings hold."""
    emulator = serve(monkeypatch)
    emulator.clusters = 1
    with_clusters(monkeypatch, 2)
    parts = [cases.pair(kind, 1, 16388, torch.float32) for kind in ("ordinary", "near", "masked", "ordinary")]
    student, teacher = (torch.cat(side) for side in zip(*parts, strict=True))
    whole = results(student, teacher)
    assert torch.equal(whole[0], whole[1])
    found = []
    for what, text in damaged(kernel_text(90), onchip.kernel_name("reverse_kl", torch.float32)):
        emulator.mutate = lambda _, text=text: text
        try:
            result = results(student, teacher)
        except PTXError:
            found.append(what)
            continue
        assert not all(torch.equal(a, b) for a, b in zip(result, whole, strict=True)), f"{what}: nobody noticed"
        found.append(what)
    assert (found.count("meeting"), found.count("wait")) == (5, 2)
    assert found.count("bytes") >= 2
