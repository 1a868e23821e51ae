"""What the compiled top-k kernels may cost: the committed table, and the limits that matter."""

from __future__ import annotations

import json

import budget_table
import cuda_budgets as budgets
import cuda_topk
import pytest
from ptx import TARGETS

TABLE = json.loads(budgets.TABLE.read_text())
EVERY_TIME = [("kd_topk_rows_bf16", 90), ("kd_topk_merge", 90), ("bf16 k=64", 90)]


def test_the_table_has_every_kernel_and_call() -> None:
    assert set(TABLE) == {f"{name} sm_{target}" for name, target in budgets.names()}


def test_no_kernel_spills_and_two_blocks_fit() -> None:
    for target in TARGETS:
        for name in budgets.KERNELS:
            row = TABLE[f"{name} sm_{target}"]
            assert (row["spills"], row["stack"]) == (0, 0), name
            assert row["registers"] <= 64, name
            assert row["blocks"] >= 2, name


@pytest.mark.parametrize("target", TARGETS)
def test_calls_meet_their_limits(target: int) -> None:
    """Each logit is read once, twice for entropy or other temperatures. 20 instructions a bfloat16 logit leave an H100
    at its memory roof; issued ones count idle lanes too."""
    for name in budgets.CALLS:
        assert TABLE[f"{name} sm_{target}"]["loads"] <= 2.1, name
    plain = TABLE[f"bf16 k=64 sm_{target}"]
    assert plain["loads"] <= 1.01
    assert plain["instructions"] <= 20
    assert plain["special"] <= 1.1


def compare(name: str, target: int) -> None:
    budget_table.compare(name, budgets.measure(name, target), TABLE[f"{name} sm_{target}"], "cuda_budgets.py")


needs_nvcc = pytest.mark.skipif(bool(cuda_topk.obstacle()), reason=cuda_topk.obstacle() or "can be had")


@needs_nvcc
@pytest.mark.parametrize(("name", "target"), EVERY_TIME)
def test_no_kernel_costs_more_than_the_table_says(name: str, target: int) -> None:
    compare(name, target)


@needs_nvcc
@pytest.mark.soak
@pytest.mark.parametrize(("name", "target"), [pair for pair in budgets.names() if pair not in EVERY_TIME])
def test_no_variant_costs_more_than_the_table_says(name: str, target: int) -> None:
    compare(name, target)
