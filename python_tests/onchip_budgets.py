"""What the on-chip kernels cost, by their compiled code: the numbers behind test_cuda_onchip_budgets.py.

    python onchip_budgets.py            # prints the table
    python onchip_budgets.py --write    # writes onchip_budgets.json

Counts are per (student, teacher) logit pair of two rows on one cluster, from executed PTX; registers and spills are
ptxas'. Sectors are relative to the least: both operands read once, the gradient written once.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulated_onchip import TARGETS, kernel_text, serve
from ptx import Settings
from ptx.static_facts import StaticFacts, static_facts

from kdkernels import onchip
from kdkernels.ops.rows import RowSpec, Side, divergence_rows_
from kdkernels.weights import RowWeights

TABLE = Path(__file__).with_suffix(".json")
VOCAB, ROWS = 128256, 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel, compiled for one target."""

    kernel: str
    dtype: str
    target: int

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.dtype} sm_{self.target}"


def cases() -> Iterator[Case]:
    for target in TARGETS:
        for kernel in onchip.DIRECTIONS:
            yield from (Case(kernel, dtype, target) for dtype in DTYPES)


def facts(case: Case) -> StaticFacts:
    """By nvcc's own ptxas, which knows its PTX."""
    entry = onchip.kernel_name(case.kernel, DTYPES[case.dtype])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTXAS", shutil.which("ptxas") or "ptxas")
        return static_facts(kernel_text(case.target), case.target, ("--entry", entry))


def measure(case: Case) -> dict[str, float]:
    """Registers, spills and shared memory by ptxas, counts by execution."""
    draw, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]
    student, teacher = ((3 * torch.randn(ROWS, VOCAB, generator=draw)).to(dtype) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        emulator = serve(patch, case.target, Settings(check_races=False))
        emulator.clusters = 1
        weights = RowWeights(torch.ones(ROWS), None, None)
        spec = RowSpec(case.kernel, 0.0, 0.0, 1.0, VOCAB)
        divergence_rows_("cuda", Side(student), Side(teacher), weights, spec, torch.empty(ROWS), student, None)
    (report,) = emulator.reports
    plan, found, pairs = onchip.plan(VOCAB * dtype.itemsize), facts(case), ROWS * VOCAB
    assert plan is not None
    return {
        "registers": found.registers,
        "spills": found.spills,
        "shared": plan.shared,
        "cluster": plan.cluster,
        "instructions": round(report.thread_instructions / pairs, 2),
        "issued": round(report.warp_instructions * 32 / pairs, 2),
        "special": round(report.special / pairs, 2),
        "loads": round(report.load_sectors * 32 / (2 * pairs * dtype.itemsize), 3),
        "stores": round(report.store_sectors * 32 / (pairs * dtype.itemsize), 3),
        "conflicts": round(report.bank_conflicts / pairs, 3),
    }


def main() -> None:
    table = {}
    for case in cases():
        table[case.name] = measure(case)
        print(f"{case.name:24} " + "  ".join(f"{k} {v}" for k, v in table[case.name].items()), flush=True)
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
