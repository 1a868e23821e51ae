"""`kd.switch_generate` on SmolLM2-135M and a student pruned from it: `python -m benchmarks.generate`.

Works on what `make demo` leaves in runs/demo: teacher, distilled student, text. Each piece below replaces its part of
benchmarks/results/generate-cpu.json; without ``--piece`` all of them run, in some minutes.

time: tokens a second against `generate` of the student, of the teacher, and assisted generation. overhead: time of a
token that is no forward pass, over the two forward passes. share: the student's share of the tokens against lambda, on
prompts from the demo's text.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import machine
from benchmarks.results import dump
from benchmarks.timing import Alternation, Sampler, ratio, spread
from kdkernels.trainers import models

RESULTS = Path(__file__).with_name("results") / "generate-cpu.json"
PIECES = ("time", "overhead", "share")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT, TOKENS, ROUNDS = 64, 48, 7
LAMBDAS = {"1/5": 1 / 5, "1/10": 1 / 10, "1/15": 1 / 15, "1/25": 1 / 25}
SHARE_PROMPTS, SHARE_TOKENS = 4, 128
LEFT_OUT = 4
"""Tokens at the start of a run that `overhead` leaves out: the prompt's own forward passes are among them."""


class Models:
    """Teacher, student, tokenizer and prompts."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.teacher = models.load_model("teacher", str(folder / "teacher"), DTYPES[dtype]).eval()
        self.student = models.load_model("student", str(folder / "distilled" / "student"), DTYPES[dtype]).eval()
        self.words = models.load_tokenizer("teacher", str(folder / "teacher"))
        self.text = folder / "text"

    def prompts(self, count: int) -> dict[str, Tensor]:
        """For each domain the first tokens of ``count`` documents, spread over the domain, ``[count, PROMPT]``."""
        found = {}
        for domain in sorted(path for path in self.text.iterdir() if path.is_dir()):
            documents = [self.words(path.read_text(encoding="utf-8")[:4000])["input_ids"] for path in _files(domain)]
            long = [ids[:PROMPT] for ids in documents if len(ids) >= PROMPT]
            found[domain.name] = torch.tensor(long[:: max(1, len(long) // count)][:count])
        return found

    def describe(self) -> dict[str, Any]:
        """Sizes of both."""
        both = {"teacher": self.teacher, "student": self.student}
        return {
            role: {"layers": m.config.num_hidden_layers, "parameters": sum(p.numel() for p in m.parameters())}
            for role, m in both.items()
        }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _timed(call: Callable[[int], Tensor]) -> Sampler:
    """Seconds of one run; each has its own seed."""
    seeds = itertools.count()

    def sample() -> float:
        seed = next(seeds)
        torch.manual_seed(seed)
        start = time.perf_counter()
        sequences = call(seed)
        seconds = time.perf_counter() - start
        if sequences.shape[1] != PROMPT + TOKENS:
            raise RuntimeError(f"{sequences.shape[1] - PROMPT} tokens were generated instead of {TOKENS}")
        return seconds

    return sample


def contestants(m: Models, ids: Tensor) -> dict[str, Sampler]:
    """What is timed, by name; every run generates ``TOKENS`` tokens. Assisted generation takes one sequence alone."""
    plain = {"do_sample": True, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0, "top_k": 0}

    def ours(**options: Any) -> Callable[[int], Tensor]:
        def call(_: int) -> Tensor:
            return kd.switch_generate(
                m.student, m.teacher, ids, max_new_tokens=TOKENS, eos_token_id=[], **options
            ).sequences

        return call

    found = {
        "switch, lambda 1/10": ours(),
        "switch, lambda 1/10, both models at every token": ours(measure="always"),
        "switch, gate closed": ours(schedule="constant", tau0=1.0),
        "switch, gate open": ours(schedule="constant", tau0=-1.0),
        "student generate": lambda _: m.student.generate(ids, **plain),
        "teacher generate": lambda _: m.teacher.generate(ids, **plain),
    }
    if len(ids) == 1:
        found["assisted generate"] = lambda _: m.teacher.generate(ids, assistant_model=m.student, **plain)
    return {name: _timed(call) for name, call in found.items()}


def measure_time(folder: Path, dtype: str, rows: int) -> dict[str, Any]:
    """Tokens a second of every contestant."""
    m = Models(folder, dtype)
    ids = m.prompts(max(rows, 8))["speeches"][:rows]
    samplers = contestants(m, ids)
    alternation = Alternation(samplers, ROUNDS, budget=10.0, patience=8.0)
    for name in samplers:
        alternation.warm_up(name)
    noise = machine.Disturbance()
    for _ in range(ROUNDS):
        alternation.round()
    seconds = alternation.medians
    main = seconds["switch, lambda 1/10"]
    return {
        "dtype": dtype, "rows": rows, "prompt": PROMPT, "tokens": TOKENS,
        "tokens_per_second": {name: spread([rows * TOKENS / s for s in x]).as_list() for name, x in seconds.items()},
        "times_switch": {name: ratio(x, main).as_list() for name, x in seconds.items()},
        "disturbance": noise.shares(),
    }  # fmt: skip


class Clock:
    """Seconds spent inside the forward passes of a model."""

    def __init__(self, *watched: Any) -> None:
        self.seconds = 0.0
        for model in watched:
            inner = model.forward

            def timed(*a: Any, inner: Callable[..., Any] = inner, **k: Any) -> Any:
                start = time.perf_counter()
                out = inner(*a, **k)
                self.seconds += time.perf_counter() - start
                return out

            timed.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
            model.forward = timed


def measure_overhead(folder: Path, dtype: str, rows: int) -> dict[str, Any]:
    """Time of a token outside of the forward passes, both models running at every token."""
    m = Models(folder, dtype)
    ids = m.prompts(max(rows, 8))["docs"][:rows]
    clock = Clock(m.student, m.teacher)
    begun = (0.0, 0.0)

    def progress(done: int, _: int) -> None:
        nonlocal begun
        if done == LEFT_OUT:
            begun = (time.perf_counter(), clock.seconds)

    outside, inside = [], []
    noise = machine.Disturbance()
    for seed in range(ROUNDS + 1):
        kd.switch_generate(
            m.student, m.teacher, ids, max_new_tokens=TOKENS, eos_token_id=[], measure="always", progress=progress,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        whole, forward = time.perf_counter() - begun[0], clock.seconds - begun[1]
        if seed:  # the first run warms up
            inside.append(forward / (TOKENS - LEFT_OUT))
            outside.append((whole - forward) / (TOKENS - LEFT_OUT))
    return {
        "dtype": dtype, "rows": rows,
        "forward_ms": spread([1e3 * s for s in inside]).as_list(),
        "outside_us": spread([1e6 * s for s in outside]).as_list(),
        "outside_over_forward": ratio(outside, inside).as_list(),
        "disturbance": noise.shares(),
    }  # fmt: skip


def measure_share(folder: Path, case: str | None) -> Iterator[dict[str, Any]]:
    """The student's share of the tokens for the paper's values of lambda."""
    m = Models(folder, "fp32")
    prompts = m.prompts(SHARE_PROMPTS)
    ids = torch.cat(list(prompts.values()))
    domains = [name for name, rows in prompts.items() for _ in rows]
    for name, decay in LAMBDAS.items():
        if case in (None, name):
            yield _share(m, ids, domains, name, decay)


def _share(m: Models, ids: Tensor, domains: Sequence[str], name: str, decay: float) -> dict[str, Any]:
    out = kd.switch_generate(
        m.student, m.teacher, ids, max_new_tokens=SHARE_TOKENS, decay=decay, measure="always",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    summary = out.summary()
    per_domain = {}
    for domain in dict.fromkeys(domains):
        rows = torch.tensor([d == domain for d in domains])
        per_domain[domain] = round(1 - float(out.from_teacher[rows].sum() / out.lengths[rows].sum()), 4)
    return {
        "lambda": name, "prompts": len(ids), "max_new_tokens": SHARE_TOKENS, "tokens": summary["tokens"],
        "student_share": round(1 - summary["teacher_share"], 4), "student_share_by_domain": per_domain,
        "mean_jsd": round(summary["mean_jsd"], 4),
    }  # fmt: skip


def _say(piece: str, entry: dict[str, Any]) -> None:
    if piece == "time":
        rates = ", ".join(f"{name} {rate[0]}" for name, rate in entry["tokens_per_second"].items())
        print(f"{entry['dtype']} B {entry['rows']}, tokens/s: {rates}; others {entry['disturbance']}", flush=True)
    elif piece == "overhead":
        share = 100 * entry["outside_over_forward"][0]
        print(f"{entry['dtype']} B {entry['rows']}: {entry['outside_us'][0]} us a token outside of forward passes of "
              f"{entry['forward_ms'][0]} ms, {share:.2f} %; others {entry['disturbance']}", flush=True)  # fmt: skip
    else:
        print(f"lambda {entry['lambda']}: student's share {entry['student_share']:.1%}, by domain "
              f"{entry['student_share_by_domain']}, mean JSD {entry['mean_jsd']}", flush=True)  # fmt: skip


def _place(entry: dict[str, Any]) -> tuple[int, int, int]:
    """Where an entry stands among those of its piece."""
    dtype, decay = entry.get("dtype"), entry.get("lambda")
    return (
        list(DTYPES).index(dtype) if dtype else 0, entry.get("rows", 0), list(LAMBDAS).index(decay) if decay else 0
    )  # fmt: skip


def _keep(piece: str, entries: list[dict[str, Any]], described: dict[str, Any]) -> None:
    """Put a piece's entries into the JSON; those of cases that were not measured stay."""
    for entry in entries:
        _say(piece, entry)
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found.update(machine=machine.describe(), models=described)

    def case(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(key) for key in ("dtype", "rows", "lambda"))

    measured = [{**entry, "commit": machine.commit()} for entry in entries]
    fresh = {case(entry) for entry in measured}
    kept = [entry for entry in found.get(piece, []) if case(entry) not in fresh]
    found[piece] = sorted(kept + measured, key=_place)
    RESULTS.write_text(dump(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="folder that `make demo` has filled")
    parser.add_argument("--piece", choices=PIECES, action="append", help="default: all")
    parser.add_argument("--case", help="one case alone, such as bf16x8, or 1/10 of share; the others stay")
    arguments = parser.parse_args()
    for piece in arguments.piece or PIECES:
        if piece == "share":
            entries = list(measure_share(arguments.runs, arguments.case))
        else:
            measure = measure_time if piece == "time" else measure_overhead
            cases = itertools.product(DTYPES, (1, 8))
            entries = [measure(arguments.runs, d, r) for d, r in cases if arguments.case in (None, f"{d}x{r}")]
        _keep(piece, entries, Models(arguments.runs, "bf16").describe())


if __name__ == "__main__":
    main()
