"""Distil a real language model in a few minutes on a laptop's processor, and say what came of it.

    python -m demo [--output runs/demo] [--steps N]

Stops (Ctrl-C) and starts again where it was. Writes metrics.json, report.png and the distilled student.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError

STUDENT = "every:2"
OPTIONS: dict[str, str] = {
    "block-size": "256",
    "batch-size": "2",
    "mix": "equal",
    "lr": "1.5e-3",
    "warmup": "8",
    "min-lr": "0.1",
    "eval-blocks": "10",
    "log-every": "4",
    "save-every": "40",
    "keep": "1",
}


class Demo:
    """The stages in their order; each is skipped when an earlier call finished it, and leaves its seconds behind."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.output = Path(arguments.output)
        self.teacher = Path(arguments.teacher or self.output / "teacher")
        self.text = Path(arguments.text or self.output / "text")
        self.batch = self.output / "layer.safetensors"
        self.output.mkdir(parents=True, exist_ok=True)
        self._record = self.output / "stages.json"
        self.options = {k: v for k, v in vars(arguments).items() if k != "output"}
        self.seconds: dict[str, float] = {}
        if self._record.is_file():
            record = json.loads(self._record.read_text(encoding="utf-8"))
            if record["options"] != self.options:
                raise UserError(f"{str(self.output)!r} holds a demo with other options; choose another --output")
            self.seconds = record["seconds"]

    def stage(self, name: str, what: str, work: Callable[[], None]) -> None:
        """Do `work` unless it is done, and note how long it took."""
        if name in self.seconds:
            print(f"[{name}] done before", flush=True)
            return
        print(f"[{name}] {what}", flush=True)
        begin = time.perf_counter()
        work()
        self.seconds[name] = round(time.perf_counter() - begin, 2)
        write(self._record, {"options": self.options, "seconds": self.seconds})

    def distil(self, run: str, changes: dict[str, str], without: tuple[str, ...] = ()) -> None:
        """One `kdkernels distill` in a process of its own, as a user would call it."""
        options = {
            **OPTIONS, "teacher": str(self.teacher), "student": self.arguments.student, "data": str(self.text),
            "steps": str(self.arguments.steps), "seed": str(self.arguments.seed), "output": str(self.output / run),
            **changes,
        }  # fmt: skip
        line = [sys.executable, "-m", "kdkernels", "distill", "--resume", self.arguments.precision]
        options = {name: value for name, value in options.items() if name not in without}
        line += [part for name, value in options.items() for part in (f"--{name}", value) if part]
        print("  $ kdkernels " + " ".join(line[3:]), flush=True)
        status = _wait(subprocess.Popen(line))
        if status:
            raise SystemExit(status)

    def prepare(self) -> None:
        """The teacher and the text, where none were given."""
        from demo import sources

        if not self.arguments.teacher:
            self.stage("teacher", "unpack the 4-bit teacher", lambda: sources.prepare_teacher(self.teacher))
        if not self.arguments.text:
            self.stage("text", "collect text in three domains", lambda: sources.prepare_text(self.text))

    def run(self) -> dict[str, Any]:
        """Every stage; returns the metrics."""
        from demo import figure

        self.prepare()
        self.stage(
            "distilled", "train the student on the teacher's distributions", lambda: self.distil("distilled", {})
        )
        self.stage(
            "cross_entropy",
            "the same steps on the same text with plain cross-entropy, for comparison",
            lambda: self.distil("cross_entropy", {"kd-weight": "0", "ce-weight": "1", "no-eval-before": ""}),
        )
        self.stage("layer", "time and peak memory of the loss layer, against eager", self._layer)
        metrics = self._metrics(json.loads((self.output / "layer.json").read_text()))
        write(self.output / "metrics.json", metrics)
        curves = {name: curve(self.output / name / "metrics.jsonl") for name in ("distilled", "cross_entropy")}
        figure.draw(metrics, curves, self.output / "report.png")
        return metrics

    def _layer(self) -> None:
        from demo import layer

        size = {"blocks": self.arguments.layer_tokens // 256 or 1, "length": min(256, self.arguments.layer_tokens)}
        layer.make_batch(self.teacher, self.output / "distilled" / "student", self.text, self.batch, **size)
        write(self.output / "layer.json", layer.measure(self.batch))
        self.batch.unlink()

    def _metrics(self, loss_layer: dict[str, Any]) -> dict[str, Any]:
        ours, plain = (
            json.loads((self.output / n / "summary.json").read_text()) for n in ("distilled", "cross_entropy")
        )
        config = {n: json.loads((p / "config.json").read_text()) for n, p in
                  (("teacher", self.teacher), ("student", self.output / "distilled" / "student"))}  # fmt: skip

        def column(scores: dict[str, dict[str, float]], key: str) -> dict[str, float]:
            return {domain: round(score[key], 4) for domain, score in scores.items()}

        return {
            "teacher": str(self.arguments.teacher or "SmolLM2-135M-Instruct (Q4_1)"),
            "teacher_params": ours["teacher_params"],
            "teacher_layers": config["teacher"]["num_hidden_layers"],
            "student": ours["student"],
            "student_params": ours["student_params"],
            "student_layers": config["student"]["num_hidden_layers"],
            "kl_before": column(ours["before"], "kl"),
            "kl_after": column(ours["after"], "kl"),
            "ppl_before": column(ours["before"], "ppl"),
            "ppl_after": column(ours["after"], "ppl"),
            "ppl_teacher": column(ours["after"], "teacher_ppl"),
            "top1_before": column(ours["before"], "top1"),
            "top1_after": column(ours["after"], "top1"),
            "cross_entropy": {f"{key}_after": column(plain["after"], key) for key in ("kl", "ppl", "top1")},
            "steps": ours["steps"],
            "tokens": ours["tokens"],
            "held_out_tokens": column(ours["after"], "tokens"),
            "seconds": round(sum(self.seconds.values()), 1),
            "stages": self.seconds,
            "peak_rss_mib": max(ours["peak_rss_mib"], plain["peak_rss_mib"]),
            "loss_layer": loss_layer,
            "versions": ours["versions"],
        }


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status of `process`; it gets our SIGTERM too (Ctrl-C reaches it by itself), and time to save."""
    before = signal.signal(signal.SIGTERM, lambda signum, _: process.send_signal(signum))
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def write(path: Path, value: dict[str, Any]) -> None:
    """A JSON file, atomically."""
    from kdkernels.trainers.checkpoint import write_json

    write_json(path, value)


def curve(log: Path) -> list[tuple[int, float]]:
    """(step, negative log-likelihood) of a run's log."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["nll"]) for row in rows if row["event"] == "step"]


def report(metrics: dict[str, Any]) -> str:
    """What the terminal shows at the end."""
    lines = [f"{'held-out KL, nats':20}{'before':>10}{'cross-entropy':>16}{'distilled':>12}"]
    for domain, after in metrics["kl_after"].items():
        plain = metrics["cross_entropy"]["kl_after"][domain]
        lines.append(f"{domain:20}{metrics['kl_before'][domain]:10.3f}{plain:16.3f}{after:12.3f}")
    lines += ["", f"{'perplexity':20}{'before':>10}{'cross-entropy':>16}{'distilled':>12}{'teacher':>10}"]
    for domain, after in metrics["ppl_after"].items():
        plain, teacher = metrics["cross_entropy"]["ppl_after"][domain], metrics["ppl_teacher"][domain]
        lines.append(f"{domain:20}{metrics['ppl_before'][domain]:10,.0f}{plain:16.1f}{after:12.1f}{teacher:10.1f}")
    layer = metrics["loss_layer"]
    lines += [
        "",
        f"loss layer: {layer['ours_ms']:.0f} ms against {layer['eager_ms']:.0f} ms eager, peak "
        f"{layer['ours_mib']:.0f} MiB against {layer['eager_mib']:.0f} MiB",
        f"{metrics['seconds']:.0f} s in all, peak memory {metrics['peak_rss_mib']:.0f} MiB",
    ]
    return "\n".join(lines)


def arguments_of(argv: list[str] | None, program: str, description: str, output: str) -> argparse.Namespace:
    """The command line of a demo."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--output", default=output, help="folder for everything the demo makes")
    parser.add_argument("--steps", type=int, default=64, help="optimiser steps of either run")
    parser.add_argument("--student", default=STUDENT, help="which of the teacher's layers the student keeps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", help="another teacher (folder)")
    parser.add_argument("--text", help="other text (folder with one domain per subfolder)")
    parser.add_argument("--layer-tokens", type=int, default=2048, help="tokens of the loss-layer measurement")
    parser.add_argument("--float32", dest="precision", action="store_const", const="--no-bf16", default="--bf16")
    return parser.parse_args(argv)


def run_demo(kind: type[Demo], arguments: argparse.Namespace, program: str, ending: Callable[[Demo, Any], str]) -> int:
    """Run a demo and print how it ended; returns the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this disk
    # Threads that wait must sleep: where another program wants a core too, spinning made a step 2 to 10 times slower
    # (2 cores, 2026); alone on the machine it makes no difference.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        demo = kind(arguments)
        found = demo.run()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    print("\n" + ending(demo, found))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Distil, and compare with cross-entropy; returns the exit status."""
    arguments = arguments_of(argv, "python -m demo", "Distil SmolLM2-135M on this machine's CPU.", "runs/demo")
    return run_demo(Demo, arguments, "demo", lambda demo, metrics: "\n".join((
        report(metrics), "", f"report: {demo.output / 'report.png'}", f"student: {metrics['student']}"
    )))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
