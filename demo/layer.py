"""The loss layer alone, from hidden states to gradients of hidden states and head: kdkernels against the eager formula.

    python -m demo.layer time BATCH      milliseconds, both in one process, alternating; medians
    python -m demo.layer ours|eager BATCH    peak memory of one call in this fresh process, MiB

BATCH is a safetensors file with `student.hidden` [N, H], `student.weight` [V, H] and the same for the teacher.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from kdkernels.trainers.logbook import peak_rss_mib

Batch = dict[str, torch.Tensor]
REPEATS = 5


def make_batch(teacher: Path, student: Path, text: Path, path: Path, *, blocks: int, length: int) -> None:
    """Hidden states of both models on `blocks` held-out blocks of `length` tokens, in bfloat16."""
    from safetensors.torch import save_file

    from kdkernels.data import load_corpus
    from kdkernels.trainers.heads import head_of, hidden_states
    from kdkernels.trainers.models import load_model, load_tokenizer

    words = load_tokenizer("teacher", str(teacher))
    corpus = load_corpus(str(text), {}, words, length=length, held_out=0.05, seed=0)
    pools = list(corpus.held_out.values())
    rows = [pools[i % len(pools)][i // len(pools) % len(pools[i % len(pools)])] for i in range(blocks)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    kept = {}
    for role, where in (("student", student), ("teacher", teacher)):
        model = load_model(role, str(where), torch.bfloat16).eval()
        with torch.no_grad():
            kept[f"{role}.hidden"] = hidden_states(model, batch).flatten(0, 1).contiguous()
        kept[f"{role}.weight"] = head_of(model, role).weight.detach().clone()
    save_file(kept, path)


def ours(batch: Batch) -> torch.Tensor:
    """Forward KL by kdkernels; logits exist a chunk at a time."""
    student = kd.LinearLogits(batch["student.hidden"], batch["student.weight"])
    teacher = kd.LinearLogits(batch["teacher.hidden"], batch["teacher.weight"])
    loss = kd.distillation_loss(student, teacher, "forward_kl")
    assert isinstance(loss, torch.Tensor)
    return loss


def eager(batch: Batch) -> torch.Tensor:
    """Forward KL as training scripts write it: both logits in full, log-probabilities in float32."""
    student = torch.nn.functional.linear(batch["student.hidden"], batch["student.weight"])
    teacher = torch.nn.functional.linear(batch["teacher.hidden"], batch["teacher.weight"])
    return torch.nn.functional.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="batchmean", log_target=True
    )


FORMULAS: dict[str, Callable[[Batch], torch.Tensor]] = {"ours": ours, "eager": eager}


def _load(path: Path) -> Batch:
    from safetensors.torch import load_file

    batch = {key: value.clone() for key, value in load_file(path).items()}
    for name in ("student.hidden", "student.weight"):
        batch[name].requires_grad_()
    return batch


def _call(name: str, batch: Batch) -> float:
    for value in batch.values():
        value.grad = None
    loss = FORMULAS[name](batch)
    loss.backward()
    return float(loss.detach())


def times(path: Path) -> dict[str, float]:
    """Medians over `REPEATS` alternating calls, forward and backward, after one call of each to warm up; losses too."""
    batch = _load(path)
    found: dict[str, list[float]] = {name: [] for name in FORMULAS}
    losses = {f"{name}_loss": _call(name, batch) for name in FORMULAS}
    for _ in range(REPEATS):
        for name, taken in found.items():
            begin = time.perf_counter()
            _call(name, batch)
            taken.append(1e3 * (time.perf_counter() - begin))
    return {**{f"{name}_ms": round(statistics.median(taken), 1) for name, taken in found.items()}, **losses}


def memory(name: str, path: Path) -> float:
    """Peak resident memory of one call above what lies there before it, MiB; gradients included."""
    batch = _load(path)
    torch.nn.functional.linear(batch["student.hidden"][:1], batch["student.weight"])  # the GEMM library's own buffers
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    before = peak_rss_mib()
    _call(name, batch)
    return round(peak_rss_mib() - before, 1)


def measure(path: Path) -> dict[str, Any]:
    """Times in one fresh process, peak memory in one for each formula."""
    found: dict[str, Any] = {}
    for what in ("time", "ours", "eager"):
        line = [sys.executable, "-m", "demo.layer", what, str(path.resolve())]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
        if done.returncode:
            raise RuntimeError(f"measuring {what} failed:\n{done.stderr}")
        value = json.loads(done.stdout.splitlines()[-1])
        found.update(value if what == "time" else {f"{what}_mib": value})
    batch = _load(path)
    tokens, hidden = batch["student.hidden"].shape
    return {**found, "tokens": tokens, "hidden": hidden, "vocab": batch["student.weight"].shape[0], "dtype": "bfloat16"}


def main(what: str, path: str) -> None:
    """Print one measurement as JSON."""
    print(json.dumps(times(Path(path)) if what == "time" else memory(what, Path(path))))


if __name__ == "__main__":
    main(*sys.argv[1:])
