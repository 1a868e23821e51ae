"""What each Triton kernel costs, by its compiled code: the numbers behind test_triton_budgets.py.

    python triton_budgets.py            # prints the table
    python triton_budgets.py --write    # writes triton_budgets.json
    python triton_budgets.py --missing  # adds to it what it lacks
    python triton_budgets.py --markdown # prints the table of docs/gpu.md

Counts are per (student, teacher) logit pair of one launch, from executed PTX; registers and spills are ptxas'.
Occupancy is the share of a multiprocessor's threads that can be resident: the one number that may not fall.
Sectors are relative to the least: both operands (the student's logits alone, where the teacher is sparse) read once,
the gradient written once.
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
from kdkernels.ops.sparse import SparseRows, sparse_rows_
from kdkernels.triton import host
from kdkernels.weights import RowWeights

TABLE = Path(__file__).with_suffix(".json")
ONLINE = ("forward_kl", "reverse_kl")
SEPARABLE = ("jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "alpha_beta_b0", "alpha_beta_a0",
             "alpha_beta_a0_b0")  # fmt: skip
VOCAB = 128256  # Llama 3's
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARDS = ("shard norms", "shard sums", "shard gradient")
FACTORS = {"by 1": 1.0, "by a half": 0.5}
VARIANTS = ("labels", "labels+stats", "cap")
BY_ELEMENTS = "by its element functions"
"""Alpha-beta with an alpha too small for its form."""
LIMITS = dict.fromkeys(ONLINE, 40) | dict.fromkeys(SEPARABLE, 70)
"""Instructions a pair that kernels are meant to stay below."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel, compiled for one target."""

    kernel: str
    dtype: str
    target: int
    extra: str = ""  # of VARIANTS or FACTORS, "K=1024", BY_ELEMENTS

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kernel, self.extra, self.dtype, f"sm_{self.target}")))

    @property
    def a(self) -> float:
        """The element functions' first parameter."""
        return 0.1 if self.extra == BY_ELEMENTS else 0.3

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
            "spec": RowSpec("jsd" if self.kernel in SHARDS else self.kernel, self.a, 0.7, 1.0, VOCAB),
            "loss": torch.empty(1),
            "dlogits": torch.empty_like(student),
            "stats": torch.empty(1, 6) if self.extra.endswith("stats") else None,
        }


def run_sparse(case: Case, given: dict[str, Any]) -> None:
    """Against the largest of the teacher's entries, ghost mode, forward KL."""
    log_probs = given["teacher"].x.float().log_softmax(-1)
    ids = log_probs.topk(1024 if case.extra == "K=1024" else 64).indices.sort(-1).values
    outside = torch.ones_like(log_probs, dtype=torch.bool).scatter_(-1, ids, False)
    tail = torch.where(outside, log_probs, -torch.inf).logsumexp(-1)
    known = SparseRows(ids.int(), log_probs.gather(-1, ids), tail)
    spec = given["spec"]._replace(kernel="forward_kl", mode="ghost")
    rest = (given[name] for name in ("loss", "dlogits", "stats"))
    sparse_rows_("triton", given["student"], known, given["weights"], spec, *rest)


def cases() -> Iterator[Case]:
    """Every kernel on every target; variants of forward KL and JSD in bfloat16. Shards: JSD, one rank of one."""
    for target in (80, 90, 100):
        yield from (Case(kernel, "bf16", target) for kernel in ("adaptive_kl", *SHARDS))
        yield from (Case("sparse", dtype, target) for dtype in DTYPES)
        yield from (Case("sparse", "bf16", target, extra) for extra in (*VARIANTS, "K=1024"))
        yield from (Case("scale", "bf16", target, extra) for extra in FACTORS)
        for kernel in ONLINE + SEPARABLE:
            dtypes = DTYPES if kernel in (*ONLINE, "jsd") else ("bf16",)
            yield from (Case(kernel, dtype, target) for dtype in dtypes)
            if kernel in ("forward_kl", "jsd"):
                yield from (Case(kernel, "bf16", target, extra) for extra in VARIANTS)
            if kernel in ("alpha_beta", "alpha_beta_b0"):
                yield Case(kernel, "bf16", target, BY_ELEMENTS)


def run_shards(given: dict[str, Any]) -> None:
    """The three launches of a shard, in the order of SHARDS."""
    from kdkernels.triton import shard_host

    sides, spec, weights = (given["student"], given["teacher"]), given["spec"], given["weights"]
    part, _ = shard_host.norms(*sides, weights, spec, 0)
    merged = shard_host.merge(part[None], spec)
    sums = shard_host.sums(*sides, weights, spec, merged.norms)
    shard_host.gradient_(*sides, weights, spec, 0, merged, sums[:, 1], given["dlogits"])


def measure(case: Case) -> dict[str, float]:
    """Registers, spills and shared memory by ptxas, counts by execution."""
    with pytest.MonkeyPatch.context() as patch:
        emulator = serve(patch, case.target)
        if case.kernel in SHARDS:
            run_shards(case.arguments())
        elif case.kernel == "sparse":
            run_sparse(case, case.arguments())
        elif case.kernel == "scale":
            host.scale_(case.arguments()["dlogits"].fill_(1), torch.tensor(FACTORS[case.extra]))
        else:
            divergence_rows_("triton", **case.arguments())
    at = SHARDS.index(case.kernel) if case.kernel in SHARDS else 0
    compiled, report = emulator.compiled[at], emulator.reports[at]
    facts = static_facts(compiled.ptx, case.target)
    size = DTYPES[case.dtype].itemsize
    operands = 1 if case.kernel in ("sparse", "scale") else 2
    return {
        "registers": facts.registers,
        "spills": facts.spills,
        "shared": compiled.shared,
        "warps": compiled.threads // 32,
        "occupancy": round(facts.occupancy(compiled.threads, compiled.shared), 3),
        "instructions": round(report.thread_instructions / VOCAB, 2),
        "special": round(report.special / VOCAB, 2),
        "loads": round(report.load_sectors * 32 / (operands * VOCAB * size), 3),
        "stores": round(report.store_sectors * 32 / (VOCAB * size), 3),
    }


LABELS = {"alpha_beta_b0": "alpha_beta, beta = 0", "alpha_beta_a0": "alpha_beta, alpha = 0",
          "alpha_beta_a0_b0": "alpha_beta, both 0", "sparse": "forward_kl, 64 entries of a teacher",
          "scale": "gradient times its factor", "cap": "soft cap and bias",
          "labels+stats": "labels and statistics"}  # fmt: skip


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The kernels in bf16, one a line; counts over their limit in bold."""
    lines = ["| bf16, V = 128256, forward + gradient | instructions sm_80 | sm_90 | sm_100 | special functions "
             "| loads, x least | stores, x least |", "|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for case in (c for c in cases() if c.dtype == "bf16" and c.target == 90):
        rows = [table[dataclasses.replace(case, target=target).name] for target in (80, 90, 100)]
        limit = LIMITS.get(case.kernel, float("inf"))
        counts = [f"{row['instructions']:.1f}" for row in rows]
        counts = [f"**{n}**" if row["instructions"] > limit else n for n, row in zip(counts, rows, strict=True)]
        name = ", ".join(LABELS.get(word, word) for word in (case.kernel, case.extra) if word)
        name = name.replace("64 entries of a teacher, K=1024", "1024 entries of a teacher")
        others = (f"{rows[1][key]:.2f}" for key in ("special", "loads", "stores"))
        lines.append(f"| {' | '.join((name, *counts, *others))} |")
    return "\n".join(lines)


def main() -> None:
    if "--markdown" in sys.argv:
        print(markdown(json.loads(TABLE.read_text())))
        return
    table = json.loads(TABLE.read_text()) if "--missing" in sys.argv else {}
    for case in cases():
        if case.name not in table:
            table[case.name] = measure(case)
            print(f"{case.name:40} " + "  ".join(f"{k} {v}" for k, v in table[case.name].items()), flush=True)
        if {"--write", "--missing"} & {*sys.argv}:
            known = {case.name: table[case.name] for case in cases() if case.name in table}
            TABLE.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
