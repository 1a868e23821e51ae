"""Vocabulary shards on a CPU: what splitting a loss over two ranks costs: `python -m benchmarks.shards`.

Writes benchmarks/results/shards-cpu.json:

- ``logits``, ``heads``: processor time of forward and backward, both ranks together (``ms_shards``), over that of the
  whole loss on one thread (``ms_whole``; waiting threads of a pool would count as busy). ``ms_halves`` is what the two
  ranks take at the same time for the loss without a group on half the vocabulary each: work that is merely split,
  which costs more than the whole alone where cores share memory. ``ratio``, ``ratio_to_halves``: median, least, most;
- ``sent``: bytes per token that a rank gives to each collective, counted at 2, 3 and 4 ranks;
- ``memory``: what one rank's peak is beyond its inputs, at several N and V.

`--only logits` and so on measures a part anew; `--quick` takes small shapes. Ranks are processes on this machine with
one thread each, over gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import kdkernels as kd
from benchmarks import machine
from benchmarks.results import dump
from kdkernels import collectives, shard_pages

RESULTS = Path(__file__).with_name("results") / "shards-cpu.json"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "alpha_beta")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 5
HIDDEN = 1024


def logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Student (requiring grad) and teacher."""
    generator = torch.Generator().manual_seed(vocab)
    made = [(3 * torch.randn(rows, vocab, generator=generator)).to(dtype) for _ in range(2)]
    return made[0].requires_grad_(), made[1]


def heads(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """The same as hidden states and heads; hidden states do not depend on the rank."""
    generator = torch.Generator().manual_seed(rows)
    hidden = [torch.randn(rows, HIDDEN, generator=generator).to(dtype) for _ in range(2)]
    weight = [(torch.randn(vocab, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype) for _ in range(2)]
    student = kd.LinearLogits(hidden[0].requires_grad_(), weight[0].requires_grad_())
    return student, kd.LinearLogits(hidden[1], weight[1])


def step(student: Any, teacher: Any, divergence: str, group: Any) -> None:
    """Forward and backward."""
    kd.distillation_loss(student, teacher, divergence, group=group).backward()
    for x in (student,) if isinstance(student, torch.Tensor) else (student.hidden, student.weight):
        x.grad = None


def processor_seconds(student: Any, teacher: Any, divergence: str, group: Any) -> float:
    """Of one step, all threads of this process together."""
    begin = time.process_time()
    step(student, teacher, divergence, group)
    return time.process_time() - begin


def measure_logits(rank: int, size: int, quick: bool) -> list[dict[str, Any]]:
    """Logits that exist already."""
    return measure_cpu(logits, rank, size, *((64, 8192) if quick else (512, 128256)))


def measure_heads(rank: int, size: int, quick: bool) -> list[dict[str, Any]]:
    """Hidden states and heads."""
    return measure_cpu(heads, rank, size, *((64, 4096) if quick else (512, 32000)))


def measure_cpu(
    make: Callable[..., tuple[Any, Any]], rank: int, size: int, rows: int, vocab: int
) -> list[dict[str, Any]]:
    """Each round: the shards on all ranks, halves without a group on all ranks, then the whole on rank 0."""
    found = []
    for name, dtype in DTYPES.items():
        mine, whole = make(rows, vocab // size, dtype), make(rows, vocab, dtype) if rank == 0 else None
        for divergence in DIVERGENCES:
            shards, halves, alone = [], [], []
            for _ in range(ROUNDS + 1):
                shards.append(together(mine, divergence, dist.group.WORLD))
                halves.append(together(mine, divergence, None))
                if whole is not None:
                    alone.append(processor_seconds(*whole, divergence, None))
            if rank == 0:
                found.append({
                    "dtype": name, "rows": rows, "vocab": vocab, "divergence": divergence,
                    **{f"ms_{what}": round(1e3 * statistics.median(taken[1:]), 1)
                       for what, taken in (("shards", shards), ("halves", halves), ("whole", alone))},
                    "ratio": ratios(shards, alone), "ratio_to_halves": ratios(shards, halves),
                })  # fmt: skip
    return found


def together(sides: tuple[Any, Any], divergence: str, group: Any) -> float:
    """Processor seconds of one step, begun by all ranks at once, added up over them."""
    dist.barrier()
    spent = torch.tensor(processor_seconds(*sides, divergence, group))
    dist.all_reduce(spent)
    return float(spent)


def ratios(taken: list[float], by: list[float]) -> list[float]:
    """Round by round, the first left out: median, least, most."""
    each = sorted(a / b for a, b in zip(taken[1:], by[1:], strict=True))
    return [round(x, 3) for x in (statistics.median(each), each[0], each[-1])]


class Counter:
    """Bytes that this rank gives to each collective."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def __enter__(self) -> Counter:
        self.gather: Any = getattr(dist, collectives.GATHER)
        self.add: Any = dist.all_reduce

        def gathering(result: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
            self.sent.append(x.numel() * x.element_size())
            return self.gather(result, x, **options)

        def adding(x: torch.Tensor, **options: Any) -> Any:
            self.sent.append(x.numel() * x.element_size())
            return self.add(x, **options)

        self.replace(gathering, adding)
        return self

    def __exit__(self, *_: object) -> None:
        self.replace(self.gather, self.add)

    @staticmethod
    def replace(gather: Any, add: Any) -> None:
        """What `kdkernels.collectives` calls."""
        setattr(dist, collectives.GATHER, gather)
        dist.all_reduce = add


def measure_sent(rank: int, size: int, quick: bool) -> list[dict[str, Any]]:
    """Bytes per token of each collective after the page of options."""
    rows, vocab = 64, 1000 * size + rank
    found = []
    for form, make in (("logits", logits), ("heads", heads)):
        student, teacher = make(rows, vocab, torch.float32)
        for divergence in (*DIVERGENCES, "adaptive_kl"):
            with Counter() as counter:
                step(student, teacher, divergence, dist.group.WORLD)
            assert counter.sent[0] == shard_pages.PAGE
            per_token = [sent / rows for sent in counter.sent[1:]]
            found.append({"form": form, "ranks": size, "divergence": divergence, "bytes_per_token": per_token})
    return found if rank == 0 else []


def measure_memory(rank: int, size: int, quick: bool) -> list[dict[str, Any]]:
    """Peak of one rank beyond its inputs, in MiB, with the part that is outputs (gradients)."""
    found = []
    shapes = [(64, 4096)] if quick else [(1024, 32000), (2048, 32000), (1024, 64000), (2048, 128256)]
    for rows, vocab in shapes:
        mine = heads(rows, vocab // size, torch.bfloat16)
        step(*heads(8, 64, torch.bfloat16), "jsd", dist.group.WORLD)
        kd.memory.release()
        gc.collect()
        machine.peak_window()
        before = machine.resident_bytes()
        value = kd.distillation_loss(*mine, "jsd", group=dist.group.WORLD, chunk_bytes=64 * 2**20)
        value.backward()
        extra = machine.peak_bytes() - before
        outputs = 2 * HIDDEN * (rows + vocab // size)
        found.append({
            "rows": rows, "vocab": vocab, "ranks": size, "logits_mib": round(2 * 2 * rows * vocab / 2**20),
            "extra_mib": round(extra / 2**20, 1), "outputs_mib": round(outputs / 2**20, 1),
        })  # fmt: skip
    return found if rank == 0 else []


MEASURES: dict[str, tuple[Callable[[int, int, bool], list[dict[str, Any]]], tuple[int, ...]]] = {
    "sent": (measure_sent, (2, 3, 4)),
    "memory": (measure_memory, (2,)),
    "logits": (measure_logits, (2,)),
    "heads": (measure_heads, (2,)),
}
"""Each with the numbers of ranks that it runs on."""


def work(rank: int, size: int, folder: str, name: str, quick: bool) -> None:
    """One rank; rank 0 writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}{size}", rank=rank, world_size=size)
    found = MEASURES[name][0](rank, size, quick)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(name: str, size: int, quick: bool) -> list[dict[str, Any]]:
    """`MEASURES[name][0]` on fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (size, folder, name, quick), size)
        found: list[dict[str, Any]] = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {}
    if set(given.only) != set(MEASURES) and given.output.is_file():
        found = json.loads(given.output.read_text(encoding="utf-8"))
    found |= {"machine": machine.describe(), "commit": machine.commit()}
    for name in given.only:
        found[name] = [entry for size in MEASURES[name][1] for entry in on_ranks(name, size, given.quick)]
    given.output.write_text(dump(found), encoding="utf-8")
    print(f"{given.output}: {', '.join(given.only)}")


if __name__ == "__main__":
    main()
