"""What the gate's compiled kernels may cost: the committed table, and the limits that matter."""

from __future__ import annotations

import json

import budget_table
import cuda_topk
import gate_budgets as budgets
import pytest
from ptx import TARGETS

TABLE = json.loads(budgets.TABLE.read_text())
EVERY_TIME = [("kd_gate_bf16", 90), ("bf16", 90)]


def test_the_table_has_every_kernel_and_call() -> None:
    assert set(TABLE) == {f"{name} sm_{target}" for name, target in budgets.names()}


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_and_blocks_fill_a_multiprocessor(target: int) -> None:
    for name, threads in budgets.KERNELS.items():
        row = TABLE[f"{name} sm_{target}"]
        assert row["spills"] == 0, name
        assert row["blocks"] * threads >= (768 if name == "kd_gate_any" else 1024), name
    assert all(row.get("spills", 0) == 0 for row in TABLE.values())


def test_both_rows_are_read_twice() -> None:
    """And what a block looks at a third time."""
    for name in ("bf16", "fp16", "fp32", "bf16 and fp32", "bf16 T=0.7", "bf16 greedy"):
        row = TABLE[f"{name} sm_90"]
        assert row["loads"] <= 2 * 1.05, name
        assert row["launches"] == 2, name


@pytest.mark.parametrize("target", TARGETS)
def test_calls_meet_their_limits(target: int) -> None:
    """An H100 that finds the second reading in its cache is at its memory roof below 80 instructions a pair of
    float32, as it is, and 40 of bfloat16, as it is not."""
    for name in ("bf16", "fp32"):
        assert TABLE[f"{name} sm_{target}"]["loads"] <= 2 * 1.05, name
        assert TABLE[f"{name} sm_{target}"]["instructions"] <= 60, name
        assert TABLE[f"{name} sm_{target}"]["special"] <= 5.3, name
        assert TABLE[f"triton {name} sm_{target}"]["loads"] <= 2.25, name


def test_top_k_and_top_p_read_the_speakers_row_three_to_five_times() -> None:
    """One of two rows: half of both operands each time."""
    for name, most in (("k=50", 3), ("p=0.9", 3), ("k=50 p=0.9", 5)):
        assert TABLE[f"bf16 {name} sm_90"]["loads"] <= 2 * 1.05 + most * 0.5 * 1.05, name


def compare(name: str, target: int) -> None:
    budget_table.compare(name, budgets.measure(name, target), TABLE[f"{name} sm_{target}"], "gate_budgets.py")


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
