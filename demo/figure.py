"""`report.png`: the demo's figures on one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

BEFORE, PLAIN, OURS, TEACHER = "#c9ced6", "#e8a33d", "#2f6fb3", "#3b3f46"


def draw(metrics: dict[str, Any], curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Four panels: held-out KL, held-out perplexity, the course of training, the loss layer's cost."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
        }
    )
    space = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08, hspace=0.06, wspace=0.03)
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 8.4), layout=space)
    _divergence(axes[0][0], metrics)
    _perplexity(axes[0][1], metrics)
    _course(axes[1][0], curves)
    _layer(axes[1][1], metrics["loss_layer"])
    figure.suptitle(
        f"{metrics['teacher']} → {metrics['student_layers']} of its {metrics['teacher_layers']} layers, "
        f"{metrics['student_params'] / 1e6:.0f} M parameters, {metrics['steps']} steps of "
        f"{metrics['tokens'] // metrics['steps']} tokens",
        fontsize=13,
        x=0.012,
        ha="left",
        va="top",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(
    axis: Any, groups: list[str], series: list[tuple[str, str, list[float]]], form: Callable[[float], str]
) -> None:
    width = 0.8 / len(series)
    for number, (label, colour, values) in enumerate(series):
        places = [i + (number - (len(series) - 1) / 2) * width for i in range(len(groups))]
        bars = axis.bar(places, values, width * 0.92, label=label, color=colour)
        axis.bar_label(bars, [form(v) for v in values], padding=2, fontsize=8.5)
    axis.set_xticks(range(len(groups)), groups)
    axis.tick_params(axis="x", length=0)


def _divergence(axis: Any, metrics: dict[str, Any]) -> None:
    domains = list(metrics["kl_after"])
    _bars(
        axis,
        domains,
        [
            ("layers removed, untrained", BEFORE, [metrics["kl_before"][d] for d in domains]),
            ("cross-entropy on the text", PLAIN, [metrics["cross_entropy"]["kl_after"][d] for d in domains]),
            ("distilled (forward KL)", OURS, [metrics["kl_after"][d] for d in domains]),
        ],
        "{:.2f}".format,
    )
    axis.set_ylabel("nats per token")
    axis.set_title("KL(teacher ‖ student) on held-out text")
    axis.margins(y=0.22)
    axis.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=3, columnspacing=1.2, handlelength=1.2)


def _perplexity(axis: Any, metrics: dict[str, Any]) -> None:
    domains = list(metrics["ppl_after"])
    _bars(
        axis,
        domains,
        [
            ("untrained", BEFORE, [metrics["ppl_before"][d] for d in domains]),
            ("cross-entropy", PLAIN, [metrics["cross_entropy"]["ppl_after"][d] for d in domains]),
            ("distilled", OURS, [metrics["ppl_after"][d] for d in domains]),
            ("teacher", TEACHER, [metrics["ppl_teacher"][d] for d in domains]),
        ],
        _short,
    )
    axis.set_yscale("log")
    axis.set_title("Perplexity on held-out text (log scale)")
    low, high = axis.get_ylim()
    axis.set_ylim(min(1.0, low), high * (high / low) ** 0.25)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_formatter("")
    axis.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=4, columnspacing=1.2, handlelength=1.2)


def _short(value: float) -> str:
    """A perplexity in at most five characters."""
    if value >= 1e6:
        return f"{value / 1e6:.1f} M"
    return f"{value / 1e3:.0f} k" if value >= 1e4 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _course(axis: Any, curves: dict[str, list[tuple[int, float]]]) -> None:
    labels = {"cross_entropy": ("cross-entropy on the text", PLAIN), "distilled": ("distilled", OURS)}
    for name, (label, colour) in labels.items():
        steps, values = zip(*curves[name], strict=True)
        axis.plot(steps, values, color=colour, lw=1.8, label=label)
        ends = [points[-1][1] for points in curves.values()]
        aside = 5 if values[-1] == max(ends) else -11
        axis.annotate(
            f"{values[-1]:.2f}", (steps[-1], values[-1]), (4, aside), textcoords="offset points", color=colour
        )
    axis.set_xlabel("step (same seed, same batches)")
    axis.set_ylabel("nats per token")
    axis.set_title("Negative log-likelihood of the training text")
    axis.legend(frameon=False, fontsize=9)
    axis.grid(axis="y", alpha=0.25)


def _layer(axis: Any, layer: dict[str, Any]) -> None:
    """Two pairs of horizontal bars, each pair scaled to its larger member."""
    rows = [("Peak memory", "MiB", "mib"), ("Time, forward and backward", "ms", "ms")]
    for number, (title, unit, key) in enumerate(rows):
        eager, ours = layer[f"eager_{key}"], layer[f"ours_{key}"]
        top = max(eager, ours, 1e-9)
        for offset, value, colour, name in ((0.18, eager, BEFORE, "eager"), (-0.18, ours, OURS, "kdkernels")):
            axis.barh(number + offset, value / top, 0.32, color=colour)
            axis.text(value / top + 0.012, number + offset, f"{name}: {value:,.0f} {unit}", va="center", fontsize=9.5)
        ratio = f"  —  {eager / ours:.1f} times less" if 0 < ours < eager else ""
        axis.text(0, number + 0.4, title + ratio, fontsize=10.5, va="bottom")
    axis.set_xlim(0, 1.32)
    axis.set_ylim(-0.5, 1.75)
    axis.axis("off")
    axis.set_title(f"Loss layer: {layer['tokens']:,} tokens, vocabulary {layer['vocab']:,}")
