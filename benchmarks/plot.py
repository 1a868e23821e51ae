"""The picture: each contestant's time over the machine's floor, and peak memory in logits tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import LABELS, best
from benchmarks.shapes import MAIN

COLOURS = {
    "ours": "#1b6ca8",
    "compile": "#e08e45",
    "eager": "#8c8c8c",
    "torchtune": "#7fb069",
    "liger": "#b0578d",
    "trl": "#c94c4c",
}
"""Package -> colour; also the order of the bars."""


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bars(axes: Any, groups: list[tuple[str, dict[str, float]]], unit: str) -> None:
    """Horizontal bars in groups, logarithmic, the value written at each bar's end."""
    y, ticks, seen = 0.0, [], set()
    for label, values in groups:
        first = y
        for name in [name for name in COLOURS if name in values]:
            axes.barh(y, values[name], height=0.8, color=COLOURS[name], label=None if name in seen else name)
            axes.text(values[name] * 1.04, y, _short(values[name]), va="center", fontsize=6.5)
            seen.add(name)
            y += 1
        ticks.append(((first + y - 1) / 2, label))
        y += 0.8
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xscale("log")
    every = [value for _, values in groups for value in values.values()]
    axes.set_xlim(0.6 * min(every), 1.8 * max(every))  # room for the numbers
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _over_floor(found: dict[str, Any], op: str) -> list[tuple[str, dict[str, float]]]:
    """Per case of the default allocator, at the larger vocabulary: each package's fastest contestant over the floor."""
    entries = [e for e in found["time"] if e["op"] == op and e["allocator"] == "default" and e["divergence"] in MAIN]
    largest = max((e["V"] for e in entries), default=0)
    groups = []
    for entry in entries:
        if entry["V"] != largest:
            continue
        named = {package: best(entry, package) for package in COLOURS}
        values = {package: entry["over_floor"][name][0] for package, name in named.items() if name is not None}
        groups.append((f"{LABELS[entry['divergence']]}\n{entry['N']} x {entry['V']}\n{entry['dtype']}", values))
    return groups


def _memory(found: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Per dense and fused case: the leanest contestant of each package, MiB beyond the inputs."""
    groups: dict[str, dict[str, float]] = {}
    for entry in found.get("memory", []):
        package = entry["contestant"].split(":")[0]
        if entry["allocator"] == "default" and "error" not in entry and package in COLOURS:
            op, name, dtype, size = entry["case"].split("-")
            values = groups.setdefault(f"{LABELS[name]} {op}\n{size.replace('x', ' x ')}\n{dtype}", {})
            values[package] = min(values.get(package, float("inf")), max(entry["extra_mib"], 0.1))
    return list(groups.items())


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        (
            "Dense losses, forward + backward",
            _over_floor(found, "dense"),
            "time over the floor (1 = memory or exponentials)",
        ),
        ("Fused linear, forward + backward", _over_floor(found, "linear"), "time over the bare matrix products"),
        ("Peak memory beyond the inputs", _memory(found), "MiB"),
    ]
    panels = [panel for panel in panels if panel[1]]
    most = max(sum(len(values) + 0.8 for _, values in groups) for _, groups, _ in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 1.2 + 0.16 * most), squeeze=False)
    for (title, groups, unit), ax in zip(panels, axes[0], strict=True):
        _bars(ax, groups, unit)
        ax.set_title(title, fontsize=9)
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = [name for name in COLOURS if name in handles]
    figure.legend(
        [handles[n] for n in ordered], ordered, loc="lower center", ncols=len(ordered), fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
