"""What the gate's kernels on a GPU cost, by their compiled code: the numbers behind test_gate_budgets.py.

    python gate_budgets.py            # prints the table
    python gate_budgets.py --write    # writes gate_budgets.json

Counts are of executed PTX, per (student, teacher) pair of logits, over all launches of a call; `loads` relative to both
operands once. Registers, spills and shared memory are ptxas'.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_topk
import pytest
import torch
from cuda_budgets import toolkit_ptxas
from cuda_gate import Machine, gate, load_ratio
from emulated import serve
from gate_oracle import Call, Decision, assert_right
from ptx import TARGETS, Report
from ptx.static_facts import static_facts

from kdkernels.ops.gate import Sampling, SwitchDecision, gate_rows_
from kdkernels.ops.rows import Side
from kdkernels.triton import launch

TABLE = Path(__file__).with_suffix(".json")
KERNELS = {"kd_gate_f32": 128, "kd_gate_f16": 128, "kd_gate_bf16": 128, "kd_gate_any": 128, "kd_gate_filter": 1024}
"""CUDA C++ kernels and their threads."""
VOCAB, ROWS = 151936, 2
SHARED_OUT, WHOLE_GPU = Machine(4, 50 * 2**20), Machine(132, 50 * 2**20)
"""Eight blocks a row, as 66 rows have them on 132 multiprocessors; and all of those for two rows."""
CALLS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any], Machine]] = {
    "bf16": (torch.bfloat16, torch.bfloat16, {}, SHARED_OUT),
    "fp16": (torch.float16, torch.float16, {}, SHARED_OUT),
    "fp32": (torch.float32, torch.float32, {}, SHARED_OUT),
    "bf16 and fp32": (torch.bfloat16, torch.float32, {}, SHARED_OUT),
    "bf16 T=0.7": (torch.bfloat16, torch.bfloat16, {"temperature": 0.7}, SHARED_OUT),
    "bf16 greedy": (torch.bfloat16, torch.bfloat16, {"uniforms": None}, SHARED_OUT),
    "bf16 two rows on 132 multiprocessors": (torch.bfloat16, torch.bfloat16, {}, WHOLE_GPU),
    "bf16 k=50": (torch.bfloat16, torch.bfloat16, {"top_k": 50}, SHARED_OUT),
    "bf16 p=0.9": (torch.bfloat16, torch.bfloat16, {"top_p": 0.9}, SHARED_OUT),
    "bf16 k=50 p=0.9": (torch.bfloat16, torch.bfloat16, {"top_k": 50, "top_p": 0.9}, SHARED_OUT),
}
TRITON = ("bf16", "fp32", "bf16 and fp32", "bf16 T=0.7", "bf16 greedy")
"""The calls that the Triton kernels are counted for."""


def call_of(name: str) -> tuple[Call, Machine]:
    """Rows of which the teacher resembles the student; one speaks each."""
    dtype, other, options, machine = CALLS[name]
    draw = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(ROWS, VOCAB, generator=draw)
    teacher = student + torch.randn(ROWS, VOCAB, generator=draw)
    given: dict[str, Any] = {"uniforms": torch.rand(ROWS, dtype=torch.float64, generator=draw), **options}
    sides = Side(student.to(dtype)), Side(teacher.to(other))
    return Call(*sides, torch.tensor([-1.0, 2.0], dtype=torch.float64), **given), machine


def static(name: str, target: int) -> dict[str, float]:
    """Of one CUDA C++ kernel; `blocks`: that fit a multiprocessor."""
    with mock.patch.dict(os.environ, {"PTXAS": toolkit_ptxas()}):
        facts = static_facts(cuda_topk.kernel_text(target, name), target)
    return {
        "registers": facts.registers,
        "spills": facts.spills + facts.stack,
        "shared": facts.static_shared,
        "blocks": facts.ctas(KERNELS[name]),
    }


def counts(reports: list[Report], call: Call) -> dict[str, float]:
    """Of a call's launches."""
    pairs = call.rows * call.vocab
    return {
        "launches": len(reports),
        "instructions": round(sum(r.thread_instructions for r in reports) / pairs, 2),
        "issued": round(sum(32 * r.warp_instructions for r in reports) / pairs, 2),
        "special": round(sum(r.special for r in reports) / pairs, 2),
        "loads": round(load_ratio(reports, call), 3),
    }


def counted(name: str, target: int) -> dict[str, float]:
    """Of one call of the CUDA C++ kernels."""
    call, machine = call_of(name)
    made = gate(target, call, machine)
    assert_right(made, call)
    return counts(made.reports, call)


def counted_triton(name: str, target: int) -> dict[str, float]:
    """Of one call of the Triton kernels, in parts as 64 rows have them; the most registers, and all spills."""
    call, _ = call_of(name)
    made = Decision.empty(call.rows)
    with pytest.MonkeyPatch.context() as patch:
        emulator = serve(patch, target)
        patch.setattr(launch, "_GATE_PROGRAMS", 1)
        sampling = Sampling(call.uniforms, call.temperature, call.top_k, call.top_p)
        out = SwitchDecision(made.token, made.from_teacher, made.jsd)
        gate_rows_("triton", call.student, call.teacher, call.threshold, sampling, call.vocab, out)
    assert_right(made, call)
    facts = [static_facts(compiled.ptx, target) for compiled in emulator.compiled]
    return {
        **counts(emulator.reports, call),
        "registers": max(fact.registers for fact in facts),
        "spills": sum(fact.spills + fact.stack for fact in facts),
    }


def names() -> Iterator[tuple[str, int]]:
    """Every entry of the table: a kernel on each target; calls on sm_90, of some also on the others."""
    yield from ((name, target) for target in TARGETS for name in KERNELS)
    yield from ((name, 90) for name in CALLS)
    yield from ((f"triton {name}", 90) for name in TRITON)
    yield from ((name, target) for target in (80, 100) for name in ("bf16", "fp32", "triton bf16", "triton fp32"))


def measure(name: str, target: int) -> dict[str, float]:
    """One entry."""
    if name in KERNELS:
        return static(name, target)
    if name.startswith("triton "):
        return counted_triton(name.removeprefix("triton "), target)
    return counted(name, target)


def main() -> None:
    table = {}
    for name, target in names():
        table[f"{name} sm_{target}"] = row = measure(name, target)
        print(f"{name} sm_{target}".ljust(50) + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
