"""What each CUDA C++ kernel of selection costs, by its compiled code: the numbers behind test_cuda_topk_budgets.py.

    python cuda_budgets.py            # prints the table
    python cuda_budgets.py --write    # writes cuda_budgets.json

Registers, spills and shared memory are ptxas', of nvcc's own toolkit. Counts are of executed PTX, per logit of a row.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import cuda_topk
import torch
from cuda_topk import Head
from cuda_topk_oracle import assert_right
from ptx import TARGETS
from ptx.compile import nvcc
from ptx.static_facts import static_facts

TABLE = Path(__file__).with_suffix(".json")
KERNELS = [
    *(f"kd_topk_{kind}_{dtype}" for kind in ("rows", "rows_head", "sums", "sums_head") for dtype in cuda_topk.NAMES),
    "kd_topk_merge",
    "kd_topk_finish",
]  # fmt: skip
VOCAB = 151936
CALLS = {
    "bf16 k=64": (torch.bfloat16, 64, Head(), 1),
    "bf16 k=1024": (torch.bfloat16, 1024, Head(), 1),
    "bf16 k=4096": (torch.bfloat16, 4096, Head(), 1),
    "fp32 k=64": (torch.float32, 64, Head(), 1),
    "fp16 k=64": (torch.float16, 64, Head(), 1),
    "bf16 k=64 entropy, 3 temperatures": (torch.bfloat16, 64, Head(others=(0.5, 2.0, 4.0), entropy=True), 1),
    "bf16 k=64 one row on 132 multiprocessors": (torch.bfloat16, 64, Head(), 132),
    "bf16 k=1024 one row on 132 multiprocessors": (torch.bfloat16, 1024, Head(), 132),
}
"""Name -> dtype, k, head, multiprocessors (1: a block takes the row)."""


@functools.cache
def toolkit_ptxas() -> str:
    """The assembler of the toolkit whose nvcc wrote the PTX."""
    dry = subprocess.run([str(nvcc()), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"(?m)\bTOP=(.+?)\s*$", dry.stderr)
    return str(Path(top[1]) / "bin/ptxas") if top else "ptxas"


def static(name: str, target: int) -> dict[str, float]:
    """Of one kernel; `blocks`: that fit a multiprocessor with the dynamic shared memory of k up to 256."""
    with mock.patch.dict(os.environ, {"PTXAS": toolkit_ptxas()}):
        facts = static_facts(cuda_topk.kernel_text(target, name), target)
    dynamic = 0 if "sums" in name or "finish" in name else (4096 + 16) * 8
    return {
        "registers": facts.registers,
        "spills": facts.spills,
        "stack": facts.stack,
        "shared": facts.static_shared,
        "blocks": facts.ctas(512, dynamic),
    }


def counted(name: str, target: int) -> dict[str, float]:
    """Of one call on a row of normal logits."""
    dtype, k, head, multiprocessors = CALLS[name]
    logits = (3 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))).to(dtype)
    kept = cuda_topk.topk(target, logits, k, head, multiprocessors=multiprocessors)
    assert_right(kept, logits, k, head)
    return {
        "launches": len(kept.reports),
        "instructions": round(sum(r.thread_instructions for r in kept.reports) / VOCAB, 2),
        "issued": round(sum(32 * r.warp_instructions for r in kept.reports) / VOCAB, 2),
        "special": round(sum(r.special for r in kept.reports) / VOCAB, 2),
        "loads": round(cuda_topk.load_ratio(kept.reports, logits, VOCAB), 3),
    }


def names() -> Iterator[tuple[str, int]]:
    """Every entry of the table: a kernel on each target, a call on those that the emulator executes."""
    yield from ((name, target) for target in TARGETS for name in KERNELS)
    yield from ((name, target) for target in TARGETS for name in CALLS)


def measure(name: str, target: int) -> dict[str, float]:
    """One entry."""
    return static(name, target) if name in KERNELS else counted(name, target)


def main() -> None:
    table = {}
    for name, target in names():
        table[f"{name} sm_{target}"] = row = measure(name, target)
        print(f"{name} sm_{target}".ljust(56) + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
