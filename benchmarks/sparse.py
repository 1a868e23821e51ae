"""Losses on sparse teachers: time, and what each mode's gradient is worth.

    python -m benchmarks.sparse [--quick]       times over the floor: benchmarks/results/sparse-cpu.json
    python -m benchmarks.sparse --angles [DIR]  loss and gradient angle against the full teacher: sparse-angles.json

Times are of a forward and backward pass, gradient in place ("ours:inplace") and not ("ours"), for N = 512 rows. Least
work: the student's row read twice and its gradient written over it, where two rows no longer fit the cache the second
read is not counted; two exponentials an entry, none for renormalize. The floor is the slower of the two, measured in
the same rounds. Rivals: the same formula in torch, eager and through torch.compile, on an fp32 copy; and our dense
loss, which the sparse one stands in for.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import machine
from benchmarks.floors import Floors
from benchmarks.inputs import Produce
from benchmarks.results import dump
from benchmarks.timing import Alternation, Sampler, ratio, spread

RESULT = machine.ROOT / "benchmarks" / "results" / "sparse-cpu.json"
ANGLES = machine.ROOT / "benchmarks" / "results" / "sparse-angles.json"
MODES = ("ghost", "renormalize", "truncate", "sampled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """Forward KL of ``rows`` rows against ``kept`` entries each."""

    mode: str
    dtype: str
    rows: int
    vocab: int
    kept: int

    @property
    def id(self) -> str:
        return f"{self.mode}-{self.dtype}-{self.rows}x{self.vocab}-k{self.kept}"

    @property
    def exponentials(self) -> int:
        return 0 if self.mode == "renormalize" else 2 * self.rows * self.vocab


class Inputs(NamedTuple):
    """A student's logits, the full teacher's, and what is kept of them."""

    student: Tensor
    full: Tensor
    teacher: kd.SparseLogits


def inputs(case: Case) -> Inputs:
    """Logits as a language model's: a few large, a long tail."""
    generator = torch.Generator().manual_seed(0)
    full = 2 * torch.randn(case.rows, case.vocab, generator=generator)
    full[:, ::97] += 6
    student = (full + torch.randn(full.shape, generator=generator)).to(DTYPES[case.dtype])
    full = full.to(DTYPES[case.dtype])
    if case.mode == "sampled":
        return Inputs(student, full, kd.compress(full, samples=case.kept, generator=generator))
    return Inputs(student, full, kd.compress(full, case.kept))


def formula(student: Tensor, ids: Tensor, log_probs: Tensor, log_tail: Tensor, mode: str) -> Tensor:
    """The mean forward KL of a mode as one writes it down in torch; every row has K entries or -1 after them."""
    lq = student.float().log_softmax(-1)
    held = ids >= 0
    index = ids.clamp(min=0).long()
    kept, p = lq.gather(-1, index), torch.where(held, log_probs.exp(), 0.0)
    if mode == "renormalize":
        kept, log_probs = kept.log_softmax(-1), log_probs.log_softmax(-1)
        p = log_probs.exp()
    surprise = p * torch.where(held, -kept, 0.0)
    if mode == "sampled":
        return surprise.sum(-1).mean()
    value = (surprise + p * torch.where(held, log_probs, 0.0)).sum(-1)
    if mode == "ghost":
        rest = lq.scatter(-1, index, -torch.inf).logsumexp(-1)
        value = value + log_tail.exp() * (log_tail - rest)
    return value.mean()


def _timed(student: Tensor, loss: Callable[[Tensor], Tensor]) -> Sampler:
    def run() -> float:
        leaf = student.detach().requires_grad_()
        start = time.perf_counter()
        loss(leaf).backward()
        return time.perf_counter() - start

    return run


def _in_place(student: Tensor, loss: Callable[[Tensor], Tensor]) -> Sampler:
    """The gradient goes over a copy that is made anew, untimed, before each run."""
    buffer, anchor = student.clone(), torch.zeros((), requires_grad=True)

    def run() -> float:
        buffer.copy_(student)
        logits = Produce.apply(anchor, buffer, lambda _: None)
        start = time.perf_counter()
        loss(logits).backward()
        return time.perf_counter() - start

    return run


def contestants(case: Case, given: Inputs) -> dict[str, Sampler]:
    """Ours, rivals and the floors of a case."""
    teacher = given.teacher
    parts = (teacher.ids, teacher.log_probs, teacher.log_tail, case.mode)
    compiled = torch.compile(formula)
    floors = Floors(given.student.nbytes, max(4096, case.exponentials))

    def ours(z: Tensor, inplace: bool = False) -> Tensor:
        return kd.distillation_loss(z, teacher, sparse_mode=case.mode, inplace=inplace)

    found = {
        "floor:read and write": lambda: floors.stream() * 2 / 3,
        "ours": _timed(given.student, ours),
        "ours:inplace": _in_place(given.student, lambda z: ours(z, True)),
        "dense:inplace": _in_place(given.student, lambda z: kd.distillation_loss(z, given.full, inplace=True)),
        "eager": _timed(given.student, lambda z: formula(z, *parts)),
        "compile": _timed(given.student, lambda z: compiled(z, *parts)),
    }
    return {**found, "floor:exp": floors.exps} if case.exponentials else found


def distances(case: Case, given: Inputs) -> dict[str, float]:
    """Of our loss and gradient from the formula's on the first rows: a wrong result has no time."""
    few = slice(0, 8)
    teacher = kd.SparseLogits(
        given.teacher.ids[few], given.teacher.log_probs[few], given.teacher.log_tail[few], case.vocab, 1.0,
        given.teacher.kind,
    )  # fmt: skip
    results = []
    for loss in (
        lambda z: kd.distillation_loss(z, teacher, sparse_mode=case.mode),
        lambda z: formula(z, teacher.ids, teacher.log_probs, teacher.log_tail, case.mode),
    ):
        leaf = given.student[few].float().requires_grad_()
        value = loss(leaf)
        value.backward()
        assert leaf.grad is not None
        results.append((value.detach(), leaf.grad))
    (ours, gradient), (theirs, expected) = results
    found = {"loss": float((ours - theirs).abs()), "dlogits": float((gradient - expected).norm() / expected.norm())}
    if found["loss"] > 1e-4 or found["dlogits"] > 1e-4:
        raise AssertionError(f"{case.id}: off by {found}")
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Entry of one case."""
    given = inputs(case)
    errors = distances(case, given)
    disturbance = machine.Disturbance()
    run = Alternation(contestants(case, given), rounds, budget=8.0, patience=8.0)
    for name in run.samplers:
        run.warm_up(name)
    for _ in range(rounds):
        run.round()
    seconds = run.medians
    names = [name for name in seconds if not name.startswith("floor:")]
    limits = [values for name, values in seconds.items() if name.startswith("floor:")]
    floor = [max(values) for values in zip(*limits, strict=False)]
    return {
        "case": case.id,
        **case._asdict(),
        "floor_ms": spread([1e3 * x for x in floor]).as_list(),
        "ms": {name: spread([1e3 * x for x in seconds[name]]).as_list() for name in names},
        "over_floor": {name: ratio(seconds[name], floor).as_list() for name in names},
        "times_ours_inplace": {
            name: ratio(seconds[name], seconds["ours:inplace"]).as_list() for name in names if "ours" not in name
        },
        "distance_from_formula": errors,
        "disturbance": disturbance.shares(),
    }


def cases(quick: bool) -> list[Case]:
    """All modes, two vocabularies, two sizes, two dtypes; quick: the smaller ones."""
    table = itertools.product(DTYPES, (32000,) if quick else (32000, 151936), (64,) if quick else (64, 256), MODES)
    return [Case(mode, dtype, 64 if quick else 512, vocab, kept) for dtype, vocab, kept, mode in table]


def times(quick: bool) -> list[dict[str, Any]]:
    """Every case, with a line each for who waits."""
    found = []
    for case in cases(quick):
        entry = measure(case, 3 if quick else 11)
        found.append(entry)
        shown = {name: value[0] for name, value in entry["over_floor"].items()}
        print(f"{case.id:<36} floor {entry['floor_ms'][0]:8.3f} ms; over it: {shown}", flush=True)
        torch.compiler.reset()
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="losses on sparse teachers: times, or gradient angles")
    parser.add_argument("--quick", action="store_true", help="few and small cases, three rounds, nothing written")
    parser.add_argument("--angles", nargs="?", const="runs/demo", metavar="DIR", help="folder for teacher and text")
    parser.add_argument("--windows", type=int, default=2, help="windows of 512 tokens a domain (default 2)")
    given = parser.parse_args()
    about = {"commit": machine.commit(), "machine": machine.describe()}
    if given.angles is not None:
        from benchmarks import sparse_angles

        found = sparse_angles.measure(Path(given.angles), given.windows)
        ANGLES.write_text(dump({**about, **found}))
        print(f"written: {ANGLES}")
        return
    entries = times(given.quick)
    if not given.quick:
        RESULT.write_text(dump({**about, "time": entries}))
        print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
