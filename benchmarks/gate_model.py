"""Bounds of the gate on a GPU: `kdkernels bench --model h100 --cases gate`, `python -m benchmarks.gate_model --write`.

The launches of the CUDA kernels, as planned for the GPU and the batch, are executed in the emulator and counted; see
`model` for what a bound is and leaves out: here it leaves out most of a small batch's time, which is the start of its
launches. `cached`: a launch finds in the second-level cache what one before it has read, as the waves are planned for.
Beside them what the vocabulary costs anyone, both rows read once, and two softmaxes in float32: both rows read once,
their probabilities written.
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
from benchmarks.counting import SECTOR, Step
from benchmarks.devices import DEVICES, Device
from benchmarks.report import table

RESULT = machine.ROOT / "benchmarks" / "results" / "model-gate.json"
WORD = "gate"
"""What `--cases` calls these bounds."""
VOCAB, ROWS = 151936, (1, 8, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _tests(name: str) -> Any:
    """A module of python_tests, which the tests use too."""
    folder = str(machine.ROOT / "python_tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def steps(name: str, rows: int, device: Device, vocab: int = VOCAB) -> list[Step]:
    """Counts per (student, teacher) pair of every launch."""
    emulated, oracle = _tests("cuda_gate"), _tests("gate_oracle")
    side = importlib.import_module("kdkernels.ops.rows").Side
    draw, dtype = torch.Generator().manual_seed(0), DTYPES[name]
    student = 3 * torch.randn(rows, vocab, generator=draw)
    teacher = (student + torch.randn(rows, vocab, generator=draw)).to(dtype)
    bits, uniforms = torch.full((rows,), 0.2).double(), torch.rand(rows, dtype=torch.float64, generator=draw)
    call = oracle.Call(side(student.to(dtype)), side(teacher), bits, uniforms)
    made = emulated.gate(device.target, call, emulated.Machine(device.multiprocessors, device.l2_bytes))
    oracle.assert_right(made, call)
    pairs, wave, found = rows * vocab, -(-rows // (len(made.reports) - 1)), []
    for number, report in enumerate(made.reports):
        loads = report.load_sectors + report.atomic_sectors
        begun = min(max(rows - number * wave, 0), wave)  # rows that nothing has read before
        fresh = begun * call.least_bytes // rows // SECTOR
        counted = (report.store_sectors, fresh, report.thread_instructions, report.warp_instructions, report.special)
        found.append(Step(report.kernel, "compiled", 1, loads / pairs, *(count / pairs for count in counted)))
    return found


def entry(name: str, rows: int, device: Device, vocab: int = VOCAB) -> dict[str, Any]:
    """One case: counts per pair, microseconds for rows x vocab of them."""
    counted, pairs, size = steps(name, rows, device, vocab), rows * vocab, DTYPES[name].itemsize
    total, by = model.bound(counted, device, pairs)
    cached, cached_by = model.bound(counted, device, pairs, cached=True)
    read = pairs * 2 * size / device.bytes_per_second
    times = {"bound_us": total, "cached_us": cached, "floor_us": read}
    times["two_softmaxes_us"] = read + pairs * 2 * 4 / device.bytes_per_second
    return {
        "case": f"gate-{name}-{rows}x{vocab}",
        "launches": len(counted),
        "per_pair": {figure: float(f"{sum(getattr(s, figure) for s in counted):.4g}") for figure in model.FIGURES},
        **{key: float(f"{1e6 * value:.4g}") for key, value in times.items()},
        "bound_by": by,
        "cached_by": cached_by,
        "steps": [asdict(step) for step in counted],
    }


def result(names: list[str]) -> dict[str, Any]:
    """The JSON: device name -> entries."""
    bounds = {name: [entry(dtype, rows, DEVICES[name]) for dtype in DTYPES for rows in ROWS] for name in names}
    return {"what": model.STATEMENT, "commit": machine.commit(), "torch": torch.__version__, "bounds": bounds}


def text(found: dict[str, Any]) -> str:
    """A table of each device."""
    head = ["", "launches", "bytes loaded", "instr.", "special", "no cache, us", "cached, us", "set by", "one read, us",
            "two softmaxes, us"]  # fmt: skip
    parts = []
    for name, entries in found["bounds"].items():
        rows = []
        for one in entries:
            per = one["per_pair"]
            counts = (SECTOR * per["load_sectors"], per["thread_instructions"], per["special"])
            times = [f"{one['bound_us']:.3g}", f"{one['cached_us']:.3g}", one["cached_by"], f"{one['floor_us']:.3g}",
                     f"{one['two_softmaxes_us']:.3g}"]  # fmt: skip
            rows.append([one["case"], str(one["launches"]), *(f"{count:.2f}" for count in counts), *times])
        parts.append(f"{DEVICES[name].name}: {found['what']}. Counts are per pair.\n{table(head, rows)}")
    return "\n\n".join(parts)


def show(names: list[str], out: Path | None = None) -> int:
    """Counts, prints, writes where asked; the exit status."""
    why = _tests("cuda_gate").obstacle()
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
    """An H100, which the launches' sizes were chosen for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate_model", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(machine.ROOT)}")
    options = parser.parse_args(words)
    sys.exit(show(["h100"], RESULT if options.write else None))


if __name__ == "__main__":
    main()
