"""Bounds of rows kept on chip beside those of the Triton kernels: `python -m benchmarks.onchip [--write]`.

Forward KL, gradient in place, each kernel counted as `counting` does: compiled for the GPU, its PTX executed on rows of
the true vocabulary. Not measured times: see `model` for what a bound is and leaves out.

The Triton kernel sweeps a row twice. How much of the second sweep goes to memory is not in its code, so its bound is
given three times: all of it; what does not fit the second-level cache, if the rows that run at a time share it evenly
and its replacement is perfect; none of it. On chip there is no second sweep.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import counted, machine, model, results
from benchmarks.counting import ROWS, SECTOR, Step
from benchmarks.devices import DEVICES, Device
from benchmarks.report import table
from benchmarks.shapes import ITEMSIZE, Case
from kdkernels import onchip
from kdkernels.triton import launch

RESULT = machine.ROOT / "benchmarks" / "results" / "model-onchip.json"
VOCABULARIES = (32000, 49152, 128256, 151936, 262144)
DEVICE_NAMES = ("h100", "h200", "b200")
"""An A100 has no clusters. One block alone keeps rows of up to 40 thousand bf16 entries there, whose second sweep is
served by its cache anyway."""
TOKENS, FEW = 512, 16
"""Rows of a training step; and few, which the Triton kernels spread over as many multiprocessors."""


@dataclass(frozen=True)
class Comparison:
    """One case on one GPU; seconds for all its pairs.

    Attributes:
        triton, chip: counts per pair.
        cluster: blocks that keep a row.
        kept: share of the second sweep's loads that the second-level cache can serve.
        uncached, shared, cached: bound of the Triton kernel, in the order of the module's text.
        on_chip: bound of the on-chip kernel.
    """

    device: str
    case: Case
    triton: Step
    chip: Step
    cluster: int
    kept: float
    uncached: float
    shared: float
    cached: float
    on_chip: float

    @property
    def gain(self) -> float:
        """How many times the Triton kernel's bound is the on-chip kernel's, second-level cache shared evenly."""
        return self.shared / self.on_chip


def count(name: str, kernel: str, case: Case, target: int) -> Step:
    """The kernel's share of a loss by one of our contestants."""
    ours = next(c for c in counted.CONTESTANTS if c.name == name)
    return next(step for step in counted.steps(ours, case, target) if step.name == kernel)


def kept_share(case: Case, device: Device) -> float:
    """Of a second sweep over all rows that run at a time: what the second-level cache can hold of them."""
    warps = launch.shape(case.V, case.itemsize, online=True, stats=False, major=device.major).warps
    rows = min(case.N, device.multiprocessors * max(1, 32 // warps))
    return min(1.0, device.l2_bytes / (rows * 2 * case.V * case.itemsize))


def compare(case: Case, name: str, triton: Step, chip: Step) -> Comparison:
    """The bounds of one case on one GPU, from counts."""
    device, pairs = DEVICES[name], case.N * case.V
    plan = onchip.plan(case.V * case.itemsize)
    assert plan is not None
    kept = kept_share(case, device)
    needs = model.seconds(triton, device, pairs)
    least = model.seconds(triton, device, pairs, cached=True)
    memory = {"uncached": needs["memory"], "cached": least["memory"]}
    memory["shared"] = kept * memory["cached"] + (1 - kept) * memory["uncached"]
    busy = min(1.0, case.N / device.multiprocessors)  # a row is one block's
    work = max(needs["issue"], needs["special"]) / busy
    clusters = min(case.N, device.multiprocessors // plan.cluster)
    used = clusters * plan.cluster / device.multiprocessors
    here = model.seconds(chip, device, pairs)
    on_chip = max(here["memory"], here["issue"] / used, here["special"] / used)
    bounds = {which: max(seconds, work) for which, seconds in memory.items()}
    return Comparison(name, case, triton, chip, plan.cluster, kept, on_chip=on_chip, **bounds)


def cases() -> list[Case]:
    """What is compared, on every GPU. Reverse KL has one special function less and is bound alike."""
    found = [Case("dense", "forward_kl", dtype, TOKENS, vocab) for dtype in ITEMSIZE for vocab in VOCABULARIES]
    found += [Case("dense", "forward_kl", dtype, FEW, 128256) for dtype in ITEMSIZE]
    return [case for case in found if onchip.plan(case.V * case.itemsize) is not None]


def comparisons() -> Iterator[Comparison]:
    """All of them; counts do not depend on the number of rows."""
    counts: dict[tuple[Case, int], tuple[Step, Step]] = {}
    for name in DEVICE_NAMES:
        target = DEVICES[name].target
        for case in cases():
            key = replace(case, N=ROWS), target
            if key not in counts:
                triton = count("ours", "dense_kernel", case, target)
                counts[key] = triton, count(counted.ON_CHIP, "kl_onchip", case, target)
            yield compare(case, name, *counts[key])


def entry(found: Comparison) -> dict[str, Any]:
    """For the JSON: milliseconds for the case's pairs, bytes and instructions a pair."""

    def per_pair(step: Step) -> dict[str, float]:
        return {
            "bytes_loaded": round(SECTOR * step.load_sectors, 3),
            "bytes_stored": round(SECTOR * step.store_sectors, 3),
            "thread_instructions": round(step.thread_instructions, 2),
            "warp_instructions_x_32": round(32 * step.warp_instructions, 2),
            "special": round(step.special, 2),
        }

    milliseconds = ("uncached", "shared", "cached", "on_chip")
    return {
        "device": found.device,
        "case": found.case.id,
        "cluster": found.cluster,
        "kept_in_l2": round(found.kept, 3),
        "triton": per_pair(found.triton),
        "chip": per_pair(found.chip),
        "ms": {which: float(f"{1e3 * getattr(found, which):.4g}") for which in milliseconds},
        "gain": round(found.gain, 3),
    }


def text(entries: list[dict[str, Any]]) -> str:
    """The table of docs/gpu.md."""
    head = ["", "blocks a row", "bytes loaded a pair", "instr. a pair", "rows kept by L2", "Triton: no cache",
            "L2 shared", "all cached", "on chip", "L2 shared / on chip"]  # fmt: skip
    rows = []
    for one in entries:
        _, _, dtype, sizes = one["case"].split("-")
        ms = [f"{one['ms'][which]:.3g}" for which in ("uncached", "shared", "cached", "on_chip")]
        pair = [f"{one['triton'][key]:.1f} → {one['chip'][key]:.1f}" for key in ("bytes_loaded", "thread_instructions")]
        name = f"{one['device']} {dtype} {sizes.replace('x', ' x ')}"
        rows.append([name, str(one["cluster"]), *pair, f"{one['kept_in_l2']:.0%}", *ms, f"{one['gain']:.2f}"])
    return table(head, rows)


def main() -> None:
    """Prints the table; --write also writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onchip", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(machine.ROOT)}")
    write = parser.parse_args().write
    entries = [entry(found) for found in comparisons()]
    if write:
        what = {"what": model.STATEMENT, "commit": machine.commit(), "entries": entries}
        Path(RESULT).write_text(results.dump(what))
    print(text(entries))


if __name__ == "__main__":
    main()
