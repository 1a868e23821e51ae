"""Least times on a GPU, computed from compiled kernels: `kdkernels bench --model h100 [--cases WORDS]`.

Not measured times: no GPU is used. `counting` executes the PTX of every kernel that a loss launches, on two rows of the
true vocabulary, and counts 32-byte sectors, instructions and special-function operations. A step cannot be faster than

    max(sectors x 32 B / bandwidth, warp instructions / issue rate, special functions / their rate)

at the rates of `devices`, and the steps of a loss follow one another, so their bounds add up.

What to know when reading the figures:

- Every sector counts as memory traffic. A kernel that reads a row again may find it in the second-level cache, and so
  may the next kernel where a whole tensor fits; the column `cached` is the bound if caches do all they can.
- Instructions are PTX's, the assembler removes some and splits others: take the instruction bound as good to a fifth.
- Latency, occupancy, launches, synchronisation and matrix products are left out: real times are higher, for everyone.
- Torch's own operations between a rival's kernels count with their least bytes and no instructions: a bound in their
  favour.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import counted, machine, results, shapes
from benchmarks.counting import ROWS, SECTOR, Step
from benchmarks.devices import DEVICES, Device
from benchmarks.shapes import Case

STATEMENT = "a bound computed from compiled code, not a measured time"
RESOURCES = ("memory", "issue", "special")
CASES = [case for case in shapes.FULL if case.divergence in shapes.MAIN]
FIGURES = ("load_sectors", "store_sectors", "thread_instructions", "warp_instructions", "special")


def seconds(step: Step, device: Device, pairs: int, *, cached: bool = False) -> dict[str, float]:
    """What each resource needs at the least for one step on that many pairs; `cached`: no load goes to memory twice."""
    loads = step.first_sectors if cached else step.load_sectors
    return {
        "memory": pairs * (loads + step.store_sectors) * SECTOR / device.bytes_per_second,
        "issue": pairs * step.warp_instructions / device.warp_instructions_per_second,
        "special": pairs * step.special / device.specials_per_second,
    }


def bound(steps: Iterable[Step], device: Device, pairs: int, *, cached: bool = False) -> tuple[float, str]:
    """(seconds, resource): the sum of the steps' bounds, and what sets most of it."""
    shares = dict.fromkeys(RESOURCES, 0.0)
    for step in steps:
        need = seconds(step, device, pairs, cached=cached)
        most = max(need, key=lambda name: need[name])
        shares[most] += need[most]
    return sum(shares.values()), max(shares, key=lambda name: shares[name])


def cached_bound(steps: Sequence[Step], device: Device, pairs: int, least: float, stays: bool) -> tuple[float, str]:
    """The bound if caches do all they can. `stays`: a tensor of logits fits the second-level cache and may be there
    when the next kernel wants it; then memory moves no more than the ``least`` seconds' worth that everyone moves."""
    if not stays:
        return bound(steps, device, pairs, cached=True)
    needs = [seconds(step, device, pairs) for step in steps]
    total = {name: sum(need[name] for need in needs) for name in RESOURCES} | {"memory": least}
    most = max(total, key=lambda name: total[name])
    return total[most], most


def floor_ms(case: Case, device: Device) -> float:
    """Milliseconds of the bytes that the vocabulary axis costs anyone: both logits read, one gradient written."""
    return 1e3 * 3 * case.logits_bytes / device.bytes_per_second


def entry(case: Case, name: str, steps: Sequence[Step], device: Device, rows: int) -> dict[str, Any]:
    """One contestant on one case, for the JSON: figures per pair, milliseconds for the case's N x V pairs.

    ``rows`` of logits exist at a time.
    """
    pairs, least = case.N * case.V, floor_ms(case, device)
    stays = rows * case.V * case.itemsize <= device.l2_bytes
    total, by = bound(steps, device, pairs)
    cached, cached_by = cached_bound(steps, device, pairs, least / 1e3, stays)
    kernels, _ = bound([s for s in steps if s.source == "compiled"], device, pairs)
    needs = [seconds(step, device, pairs) for step in steps]
    return {
        "case": case.id,
        "contestant": name,
        "per_pair": {figure: _short(sum(getattr(s, figure) for s in steps)) for figure in FIGURES},
        "bound_ms": _short(1e3 * total),
        "bound_by": by,
        "needs_ms": {name: _short(1e3 * sum(need[name] for need in needs)) for name in RESOURCES},
        "rows_at_a_time": rows,
        "fits_l2": stays,
        "cached_ms": _short(1e3 * cached),
        "cached_by": cached_by,
        "kernels_ms": _short(1e3 * kernels),
        "floor_ms": _short(least),
        "over_floor": _short(1e3 * total / least),
        "steps": [{k: _short(v) if isinstance(v, float) else v for k, v in asdict(s).items()} for s in steps],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def count(cases: Sequence[Case], device: Device) -> dict[str, Any]:
    """Entries of everyone who computes the cases, and who is not installed."""
    found: list[dict[str, Any]] = []
    absent = {c.name: c.absent() for c in counted.CONTESTANTS if c.absent()}
    for case in cases:
        for contestant in counted.CONTESTANTS:
            if contestant.serves(case, device.target) and contestant.name not in absent:
                steps, rows = counted.steps(contestant, case, device.target), contestant.rows(case, device.target)
                found.append(entry(case, contestant.name, steps, device, rows))
    return {"model": found, "not_counted": absent}


def result(cases: Sequence[Case], device: Device) -> dict[str, Any]:
    """The whole JSON."""
    started = time.monotonic()
    found = count(cases, device)
    return {
        "what": STATEMENT,
        "settings": {"rows_counted": ROWS, "vocabulary": "of the case"},
        "commit": machine.commit(),
        "device": {**asdict(device), "sources": list(device.sources)},
        "versions": {
            name: version
            for name, version in machine.describe()["versions"].items()  # type: ignore[attr-defined]
            if name in ("kdkernels", "torch", "triton", "liger-kernel", "trl")
        },
        "seconds": round(time.monotonic() - started, 1),
        **found,
    }


def main(name: str, words: str = "", out: Path | None = None) -> int:
    """Counts the cases whose id holds all of the words, writes the JSON, prints the table.

    Args:
        name: of `DEVICES`.
        words: comma-separated; "topk" or "gate" alone asks for the bounds of `topk` or `gate_model`.
        out: the JSON; by default benchmarks/results/model-<name>.json, if all cases are counted.

    Returns:
        The exit status.
    """
    from benchmarks import gate_model, gpu_report, topk

    for bounds in (topk, gate_model):
        if words == bounds.WORD:
            return bounds.show([name], out)
    error = counted.CONTESTANTS[0].absent()
    try:
        cases = shapes.select(CASES, words)
    except ValueError as wrong:
        error = str(wrong)
    if error:
        print(f"kdkernels bench: error: {error}", file=sys.stderr)
        return 2
    found = result(cases, DEVICES[name])
    out = out or (None if words else machine.ROOT / "benchmarks" / "results" / f"model-{name}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(results.dump(found))
        print(f"wrote {out}", file=sys.stderr)
    print(gpu_report.model_text(found))
    return 0
