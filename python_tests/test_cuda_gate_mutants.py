"""Damaged machine code of the gate: a barrier, a vote or a shuffle less is a fault or a wrong answer."""

from __future__ import annotations

import functools

import cuda_topk
import pytest
import torch
from cuda_gate import Machine, gate, obstacle
from gate_oracle import Call, assert_right
from ptx import PTXError, parse
from ptx.mutants import Mutant, Mutants
from ptx.parser import Kernel
from torch import Tensor

from kdkernels.ops.rows import Side

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "can be had")

TARGET, FEW, MANY = 90, Machine(1, 50 * 2**20), Machine(132, 50 * 2**20)
KERNELS = ("kd_gate_f32", "kd_gate_filter")


def pair(rows: int, width: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(rows, width, generator=draw)
    return student, student + torch.randn(rows, width, generator=draw)


@functools.cache
def workloads(name: str) -> list[tuple[Call, Machine]]:
    """Together they take every path: one block a row and several, sampling, the largest logit; two temperatures;
    histograms of logits, of their bits and of ids, few entries in doubt and many."""
    student, teacher = pair(3, 3000)
    flat = torch.zeros(3, 3000)
    bits, draws = torch.tensor([-1.0, 2.0, -1.0]).double(), torch.tensor([0.02, 0.51, 0.97]).double()

    def call(s: Tensor, t: Tensor, uniforms: Tensor | None = draws, **options: float) -> Call:
        return Call(Side(s), Side(t), bits, uniforms, **options)  # type: ignore[arg-type]

    if name == "kd_gate_filter":
        narrow = torch.cat((student * 1e-4 + 1, student[:, :1500] * 1e-4 - 50), 1)
        return [
            (call(student, teacher, top_k=700, top_p=0.9), FEW),
            (call(narrow, narrow, top_p=0.7), FEW),
            (call(narrow, narrow, top_k=2500), FEW),
            (call(flat, flat, top_k=1400, top_p=0.5), FEW),
        ]
    faint = torch.full((3, 3000), -42 * 0.6931)  # each below 2^-41 of the first, not so their sum
    faint[:, 0] = 0
    return [
        (call(faint, faint + 0.0, torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)), FEW),
        (call(student, teacher), FEW),
        (call(student, teacher, temperature=0.5), MANY),
        (call(student, teacher, None), MANY),
        (call(*pair(3, 9001)), MANY),
    ]


@functools.cache
def mutants(name: str) -> list[Mutant]:
    found = Mutants(cuda_topk.kernel_text(TARGET, name))
    return [*found.barriers(), *found.shuffles()]


def survives(name: str, mutant: Mutant) -> bool:
    """Whether the calls still end with the right numbers."""
    damaged = parse(mutant.text, name)

    def kernel(asked: str) -> Kernel:
        return damaged if asked == name else cuda_topk.kernel(TARGET, asked)

    def right(call: Call, machine: Machine) -> bool:
        try:
            assert_right(gate(TARGET, call, machine, mutate=kernel), call)
        except (PTXError, AssertionError):
            return False
        return True

    return all(right(*workload) for workload in workloads(name))


def survivors(name: str, step: int) -> list[str]:
    return [str(mutant) for mutant in mutants(name)[::step] if survives(name, mutant)]


@pytest.mark.parametrize("name", KERNELS)
def test_the_workloads_are_right_without_damage(name: str) -> None:
    for call, machine in workloads(name):
        assert_right(gate(TARGET, call, machine), call)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_damage_is_noticed(name: str) -> None:
    assert survivors(name, 40) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", KERNELS)
def test_any_damage_is_noticed(name: str) -> None:
    assert survivors(name, 1) == []
