"""Tables of the GPU results: bounds from `model`, and times where a machine with a GPU has measured some.

python -m benchmarks.gpu_report [--readme]      print, or rewrite what stands between the markers in README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.report import LABELS, rewrite, table

MARKERS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")
RESULTS = machine.ROOT / "benchmarks" / "results"
NOT_MEASURED = "GPU time not measured."
SHOWN = "x128256"
"""Cases whose bounds README shows; the JSON has all."""
OURS = {"ours": "Triton", "ours:onchip": "on chip"}
RIVALS = {"liger": "Liger", "trl": "TRL chunked", "eager": "eager"}


def number(value: float) -> str:
    """Three significant digits: a tenth of a microsecond matters here."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def case_label(case: str) -> str:
    """`dense-jsd-bf16-512x32000` in words."""
    op, divergence, dtype, sizes = case.split("-")
    fused = "fused " if op == "linear" else ""
    return f"{fused}{LABELS.get(divergence, divergence)} {sizes.replace('x', ' x ')} {dtype}"


def _by_case(entries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in entries:
        found.setdefault(one["case"], {})[one["contestant"]] = one
    return found


def _counts(one: dict[str, Any]) -> list[str]:
    pair = one["per_pair"]
    sectors = [f"{32 * pair[name]:.1f}" for name in ("load_sectors", "store_sectors")]
    if not pair["warp_instructions"]:
        return [*sectors, "–", "–", "–"]
    return [
        *sectors,
        f"{pair['thread_instructions']:.1f}",
        f"{32 * pair['warp_instructions']:.1f}",
        f"{pair['special']:.2f}",
    ]


def model_text(found: dict[str, Any]) -> str:
    """Everything the model has, as text."""
    device = found["device"]
    head = ["", "bytes loaded", "stored", "thread instr.", "warp instr. x 32", "special"]
    head += ["bound, ms", "set by", "cached, ms", "own kernels, ms", "floor by bytes, ms", "x floor"]
    rows = [
        [
            f"{case_label(one['case'])}: {one['contestant']}",
            *_counts(one),
            number(one["bound_ms"]),
            one["bound_by"],
            number(one["cached_ms"]),
            number(one["kernels_ms"]),
            number(one["floor_ms"]),
            number(one["over_floor"]),
        ]
        for one in found["model"]
    ]
    notes = [f"{name} is left out: {why}" for name, why in found["not_counted"].items()]
    return "\n".join(
        [f"{device['name']}: {found['what']}. Counts are per (student, teacher) pair.", table(head, rows), *notes]
    )


def model_table(found: dict[str, Any], words: str = "") -> str:
    """Cases whose id holds ``words``: ours, each of our kernels by name, with what sets it; rivals in multiples."""
    rows = []
    for case, by in _by_case(found["model"]).items():
        for name, kernels in OURS.items():
            if name not in by or words not in case:
                continue
            mine = by[name]
            ours = [number(mine["bound_ms"]), mine["bound_by"], number(mine["cached_ms"]), number(mine["floor_ms"])]
            rivals = (_times(by.get(rival), mine) for rival in RIVALS)
            rows.append([f"{case_label(case)}, {kernels}", *ours, *rivals])
    return table(["", "ours, ms", "set by", "if cached", "floor by bytes", *RIVALS.values()], rows)


def _times(one: dict[str, Any] | None, mine: dict[str, Any]) -> str:
    """A rival's bound in multiples of ours; starred where its tensors fit the cache and ours do not."""
    if one is None:
        return "–"
    return number(one["bound_ms"] / mine["bound_ms"]) + ("\\*" if one["fits_l2"] and not mine["fits_l2"] else "")


def gpu_table(found: dict[str, Any]) -> str:
    """Measured times of one GPU: ours in milliseconds and as a share of its bandwidth, rivals in multiples of ours."""
    rivals = {"compile": "torch.compile", **RIVALS}
    rows = []
    for case, by in _by_case(found["time"]).items():
        mine = by.get("ours:inplace") or by.get("ours")
        if mine is None or "ms" not in mine:
            continue
        cells = []
        for rival in rivals:
            timed = [one["ms"][0] for name, one in by.items() if name.split(":")[0] == rival and "ms" in one]
            cells.append(number(min(timed) / mine["ms"][0]) if timed else "–")
        share = f"{mine['bandwidth_share']:.0%}" if mine.get("bandwidth_share") is not None else "–"
        rows.append([case_label(case), number(mine["ms"][0]), share, number(mine["peak_extra_mib"]), *cells])
    return table(["", "ours, ms", "of bandwidth", "peak extra MiB", *rivals.values()], rows)


def markdown(folder: Path = RESULTS) -> str:
    """What README shows of GPUs."""
    parts = []
    measured = sorted(folder.glob("gpu-*.json"))
    if not measured:
        parts.append(
            f"**GPU**: {NOT_MEASURED} `make gpu` measures it; until then there is what the compiled code tells."
        )
    for path in measured:
        found = json.loads(path.read_text())
        parts.append(
            f"**{found['gpu']['name']}**, measured, forward + backward, torch {found['versions']['torch']}, triton "
            f"{found['versions']['triton']}; rivals' fastest variant in multiples of ours."
        )
        parts.append(gpu_table(found))
    model = folder / "model-h100.json"
    if model.exists():
        found = json.loads(model.read_text())
        parts.append(
            f"**{found['device']['name']}, {found['what']}**: counts of the compiled kernels over the chip's peak "
            "rates (`kdkernels bench --model h100|h200|a100|b200`, [docs/gpu.md](docs/gpu.md)). Ours twice: the Triton "
            "kernels, and the CUDA C++ kernels that keep rows on chip, which `auto` takes for KL where rows outgrow "
            "the cache. Rivals in multiples of our bound, \\* where their tensors fit the second-level cache and may "
            "stay there, which would make it less. Matrix products are left out, on all sides alike."
        )
        parts.append(model_table(found, SHOWN))
    return "\n\n".join(parts)


def main(words: list[str] | None = None) -> None:
    """Prints or writes the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    if parser.parse_args(words).readme:
        readme = machine.ROOT / "README.md"
        readme.write_text(rewrite(readme.read_text(), markdown(), MARKERS))
    else:
        print(markdown())


if __name__ == "__main__":
    main()
