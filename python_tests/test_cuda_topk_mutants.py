"""Damaged machine code of the top-k kernels: a barrier, a vote or a shuffle less is a fault or a wrong answer."""

from __future__ import annotations

import functools

import cuda_topk
import pytest
import torch
from cuda_topk import Head, topk
from cuda_topk_oracle import assert_right
from ptx import PTXError, parse
from ptx.mutants import Mutant, Mutants
from ptx.parser import Kernel
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cuda_topk.obstacle()), reason=cuda_topk.obstacle() or "can be had"),
]

TARGET, HEAD = 90, Head(entropy=True)
KERNELS = ("kd_topk_rows_f32", "kd_topk_merge", "kd_topk_sums_f32", "kd_topk_finish")


@functools.cache
def workloads() -> list[tuple[Tensor, int, int]]:
    """Logits, k, multiprocessors that launches are planned for.

    Together they take every path: with and without a first bound, a full buffer, one block a row or several, whose
    lists fill the buffer of the merge.
    """
    draw = torch.Generator().manual_seed(0)
    mixed = torch.stack([torch.randn(20011, generator=draw), torch.arange(20011) / 20011, torch.zeros(20011)])
    return [
        (mixed, 600, 1),
        (mixed, 3000, 1),
        (mixed[:, :700], 600, 1),
        (mixed, 600, 132),
        (mixed[:1].repeat(1, 4), 256, 900),
    ]


@functools.cache
def mutants(name: str) -> list[Mutant]:
    found = Mutants(cuda_topk.kernel_text(TARGET, name))
    return [*found.barriers(), *found.shuffles()]


def survives(name: str, mutant: Mutant) -> bool:
    """Whether the call still ends with the right numbers."""
    damaged = parse(mutant.text, name)

    def kernel(asked: str) -> Kernel:
        return damaged if asked == name else cuda_topk.kernel(TARGET, asked)

    def right(logits: Tensor, k: int, multiprocessors: int) -> bool:
        try:
            kept = topk(TARGET, logits, k, HEAD, multiprocessors=multiprocessors, mutate=kernel)
            assert_right(kept, logits, k, HEAD)
        except (PTXError, AssertionError):
            return False
        return True

    return all(right(*workload) for workload in workloads())


def survivors(name: str, step: int) -> list[str]:
    return [str(mutant) for mutant in mutants(name)[::step] if survives(name, mutant)]


def test_the_workloads_are_right_without_damage() -> None:
    for logits, k, multiprocessors in workloads():
        assert_right(topk(TARGET, logits, k, HEAD, multiprocessors=multiprocessors), logits, k, HEAD)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_damage_is_noticed(name: str) -> None:
    assert survivors(name, 20) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", KERNELS)
def test_any_damage_is_noticed(name: str) -> None:
    assert survivors(name, 1) == []
