"""Bounds of top-k selection on a GPU: `kdkernels bench --model h100 --cases topk`, `python -m benchmarks.topk --write`.

The launches of the CUDA kernels, compiled for the GPU, are executed in the emulator on rows of the true vocabulary and
counted; see `model` for what a bound is and leaves out. Beside them what no other way can do without: `torch.topk` and
`torch.logsumexp` in the logits' dtype read each logit once each (a tail from its own entries would come on top).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, model
from benchmarks.counting import ROWS, SECTOR, Step
from benchmarks.devices import DEVICES, Device
from benchmarks.report import table

RESULT = machine.ROOT / "benchmarks" / "results" / "model-topk.json"
WORD = "topk"
"""What `--cases` calls these bounds."""
TOKENS, VOCAB = 512, 151936
KEPT = (64, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _emulated(module: str = "cuda_topk") -> Any:
    """python_tests/cuda_topk.py, or cuda_topk_oracle.py beside it, which the tests use too."""
    folder = str(machine.ROOT / "python_tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)


def steps(dtype: torch.dtype, k: int, target: int, vocab: int = VOCAB) -> list[Step]:
    """Counts per logit of every launch, as planned for more rows than the GPU has multiprocessors."""
    emulated = _emulated()
    logits = (3 * torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(0))).to(dtype)
    kept = emulated.topk(target, logits, k, multiprocessors=1)
    _emulated("cuda_topk_oracle").assert_right(kept, logits, k)
    entries = logits.numel()
    least = entries * logits.element_size() // SECTOR
    return [
        Step(
            report.kernel,
            "compiled",
            1,
            report.load_sectors / entries,
            report.store_sectors / entries,
            min(report.load_sectors, least) / entries,
            report.thread_instructions / entries,
            report.warp_instructions / entries,
            report.special / entries,
        )
        for report in kept.reports
    ]


def entry(name: str, k: int, device: Device, rows: int = TOKENS, vocab: int = VOCAB) -> dict[str, Any]:
    """One case: counts per logit, milliseconds for rows x vocab of them; `floor_ms`: each logit read once."""
    dtype = DTYPES[name]
    counted, entries = steps(dtype, k, device.target, vocab), rows * vocab
    read = 1e3 * entries * dtype.itemsize / device.bytes_per_second
    total, by = model.bound(counted, device, entries)
    return {
        "case": f"topk-k{k}-{name}-{rows}x{vocab}",
        "per_logit": {figure: float(f"{sum(getattr(s, figure) for s in counted):.4g}") for figure in model.FIGURES},
        "bound_ms": float(f"{1e3 * total:.4g}"),
        "bound_by": by,
        "floor_ms": float(f"{read:.4g}"),
        "torch_reads_ms": float(f"{2 * read:.4g}"),
        "steps": [asdict(step) for step in counted],
    }


def result(names: list[str]) -> dict[str, Any]:
    """The JSON: device name -> entries."""
    bounds = {name: [entry(dtype, k, DEVICES[name]) for dtype in DTYPES for k in KEPT] for name in names}
    return {"what": model.STATEMENT, "commit": machine.commit(), "torch": torch.__version__, "bounds": bounds}


def text(found: dict[str, Any]) -> str:
    """A table of each device."""
    head = [
        "",
        "bytes loaded",
        "instr.",
        "issued",
        "special",
        "bound, ms",
        "set by",
        "one read, ms",
        "torch's reads, ms",
    ]
    parts = []
    for name, entries in found["bounds"].items():
        rows = []
        for one in entries:
            per = one["per_logit"]
            counts = [
                SECTOR * per["load_sectors"],
                per["thread_instructions"],
                32 * per["warp_instructions"],
                per["special"],
            ]
            times = [
                f"{one['bound_ms']:.3g}",
                one["bound_by"],
                f"{one['floor_ms']:.3g}",
                f"{one['torch_reads_ms']:.3g}",
            ]
            rows.append([one["case"], *(f"{count:.2f}" for count in counts), *times])
        parts.append(f"{DEVICES[name].name}: {found['what']}. Counts are per logit.\n{table(head, rows)}")
    return "\n\n".join(parts)


def show(names: list[str], out: Path | None = None) -> int:
    """Counts, prints, writes where asked; the exit status."""
    why = _emulated().obstacle()
    if why:
        print(f"kdkernels bench: error: {why}", file=sys.stderr)
        return 2
    found = result(names)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {out}", file=sys.stderr)
    print(text(found))
    return 0


def main(words: list[str] | None = None) -> None:
    """Every device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topk", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(machine.ROOT)}")
    options = parser.parse_args(words)
    sys.exit(show([*DEVICES], RESULT if options.write else None))


if __name__ == "__main__":
    main()
