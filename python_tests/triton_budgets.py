"""What each Triton kernel costs, by its compiled code: the numbers behind test_triton_budgets.py.

    python triton_budgets.py            # prints the table
    python triton_budgets.py --write    # writes triton_budgets.json

Counts are per (student, teacher) logit pair of one launch, from executed PTX; registers and spills are ptxas'.
Sectors are relative to the least: both operands read once, the gradient written once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import serve
from ptx.static_facts import static_facts

from kdkernels.ops.rows import RowSpec, Side, divergence_rows_
from kdkernels.weights import RowWeights

TABLE = Path(__file__).with_suffix(".json")
ONLINE = ("forward_kl", "reverse_kl")
SEPARABLE = ("jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "alpha_beta_b0", "alpha_beta_a0",
             "alpha_beta_a0_b0")  # fmt: skip
VOCAB = 128256  # Llama 3's
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RUNS = (80, 90)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel, compiled for one target."""

    kernel: str
    dtype: str
    target: int
    extra: str = ""  # "labels", "labels+stats", "cap"

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kernel, self.extra, self.dtype, f"sm_{self.target}")))

    def arguments(self) -> dict[str, Any]:
        """Of `divergence_rows_`: one row."""
        draw = torch.Generator().manual_seed(0)
        dtype = DTYPES[self.dtype]
        student, teacher = ((3 * torch.randn(1, VOCAB, generator=draw)).to(dtype) for _ in range(2))
        labels = torch.tensor([VOCAB // 3]) if self.extra.startswith("labels") else None
        bias = torch.randn(VOCAB, generator=draw) if self.extra == "cap" else None
        return {
            "student": Side(student, bias, 1.0, 30.0 if self.extra == "cap" else 0.0),
            "teacher": Side(teacher),
            "weights": RowWeights(torch.ones(1), None if labels is None else torch.ones(1), labels),
            "spec": RowSpec(self.kernel, 0.3, 0.7, 1.0, VOCAB),
            "loss": torch.empty(1),
            "dlogits": torch.empty_like(student),
            "stats": torch.empty(1, 6) if self.extra.endswith("stats") else None,
        }


def cases(kernels: tuple[str, ...] = ONLINE + SEPARABLE) -> Iterator[Case]:
    """Every kernel on every target; the variants of forward KL and JSD in bfloat16."""
    for target in (80, 90, 100):
        for kernel in kernels:
            dtypes = DTYPES if kernel in (*ONLINE, "jsd") else ("bf16",)
            yield from (Case(kernel, dtype, target) for dtype in dtypes)
            if kernel in ("forward_kl", "jsd"):
                yield from (Case(kernel, "bf16", target, extra) for extra in ("labels", "labels+stats", "cap"))


def measure(case: Case) -> dict[str, float]:
    """Registers, spills and shared memory; counts where the target is executed."""
    with pytest.MonkeyPatch.context() as patch:
        emulator = serve(patch, case.target)
        divergence_rows_("triton", **case.arguments())
    compiled, report = emulator.compiled[-1], emulator.reports[-1]
    facts = static_facts(compiled.ptx, case.target)
    size = DTYPES[case.dtype].itemsize
    return {
        "registers": facts.registers,
        "spills": facts.spills,
        "shared": compiled.shared,
        "warps": compiled.threads // 32,
        "instructions": round(report.thread_instructions / VOCAB, 2),
        "special": round(report.special / VOCAB, 2),
        "loads": round(report.load_sectors * 32 / (2 * VOCAB * size), 3),
        "stores": round(report.store_sectors * 32 / (VOCAB * size), 3),
    }


def main() -> None:
    table = {}
    for case in cases():
        table[case.name] = measure(case)
        print(f"{case.name:40} " + "  ".join(f"{k} {v}" for k, v in table[case.name].items()), flush=True)
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
