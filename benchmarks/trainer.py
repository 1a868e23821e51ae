"""What `DistillationTrainer` costs beside its loss, on a CPU: `python -m benchmarks.trainer`.

Writes benchmarks/results/trainer-cpu.json:

- ``overhead``: one step of the trainer, from the end of what came before it to its end (data, loss with statistics,
  backward, clipping, optimizer, callbacks), less the same forward, backward, clipping and optimizer step written out
  around `kdkernels.distillation_loss` without statistics. The two alternate in one process, each with its own model;
  processor time on one thread, which a busy machine disturbs less;
- ``memory``: highest memory during a step beyond what is resident before it, in a fresh process each: the trainer, and
  the same trainer whose loss is the usual formula on both sides' logits in full.

`--quick` takes small shapes.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import kdkernels as kd
from benchmarks import machine
from benchmarks.results import dump
from kdkernels.trainers import DistillationTrainer
from kdkernels.trainers.heads import logits_of
from kdkernels.trainers.tally import NAMES

RESULTS = Path(__file__).with_name("results") / "trainer-cpu.json"
SHAPES = {
    "overhead": {"vocab": 32768, "hidden": 128, "layers": 2, "batch": 8, "length": 256, "steps": 26},
    "memory": {"vocab": 128256, "hidden": 64, "layers": 2, "batch": 8, "length": 128, "steps": 3},
}
QUICK = {
    "overhead": {"vocab": 512, "hidden": 32, "layers": 1, "batch": 2, "length": 16, "steps": 3},
    "memory": {"vocab": 2048, "hidden": 32, "layers": 1, "batch": 2, "length": 64, "steps": 3},
}


def llama(shape: dict[str, int], seed: int) -> Any:
    """A Llama of random weights with tied embeddings."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=2 * shape["hidden"],
        num_hidden_layers=shape["layers"], num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=shape["length"], tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def examples(shape: dict[str, int]) -> list[dict[str, Tensor]]:
    """As many as the steps take."""
    generator = torch.Generator().manual_seed(0)
    count = shape["steps"] * shape["batch"]
    ids = torch.randint(shape["vocab"], (count, shape["length"]), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


class Eager(DistillationTrainer):
    """The same trainer with logits in full, log-probabilities as training scripts write them."""

    def _loss(
        self, student: kd.LinearLogits, teacher: Any, labels: Tensor, num_items: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = teacher.materialize()[:, :-1].log_softmax(-1)
        given = student.materialize()[:, :-1].log_softmax(-1)
        each = torch.nn.functional.kl_div(given, target, reduction="none", log_target=True).sum(-1)
        counts = labels[:, 1:] != -100
        return (each * counts).sum() / num_items, each.new_zeros(len(NAMES) + 1, dtype=torch.float64)


def trainer(
    kind: type[DistillationTrainer], shape: dict[str, int], folder: str, callback: transformers.TrainerCallback
) -> DistillationTrainer:
    """Ready to train."""
    settings = transformers.TrainingArguments(
        folder, per_device_train_batch_size=shape["batch"], max_steps=shape["steps"], report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=5, disable_tqdm=True, learning_rate=1e-4, lr_scheduler_type="constant",
    )  # fmt: skip
    student = llama(shape, 0)
    made = kind(student, settings, train_dataset=examples(shape), teacher=llama(shape, 1), callbacks=[callback])
    made.remove_callback(transformers.PrinterCallback)
    return made


class ByHand:
    """The step written out, on a student of its own."""

    def __init__(self, like: DistillationTrainer, shape: dict[str, int]) -> None:
        model: Any = like.model
        self.student = copy.deepcopy(model)
        self.teacher = like.teacher
        self.batches = torch.stack([e["input_ids"] for e in examples(shape)]).split(shape["batch"])
        self.limit = like.args.max_grad_norm
        kind, options = like.get_optimizer_cls_and_kwargs(like.args)
        self.optimizer = kind(self.student.parameters(), **options)

    def step(self, number: int) -> None:
        """One batch."""
        ids = self.batches[number % len(self.batches)]
        batch = {"input_ids": ids}
        with torch.no_grad():
            teacher = logits_of(self.teacher, batch, "teacher")
        student = logits_of(self.student, batch, "student")
        loss = kd.distillation_loss(student, teacher, "forward_kl", labels=ids, shift=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Alternating(transformers.TrainerCallback):
    """After each step of the trainer one by hand; processor seconds of each."""

    def __init__(self) -> None:
        self.hand: ByHand | None = None
        self.trainer: list[float] = []
        self.by_hand: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.hand is not None
        now = time.process_time()
        self.trainer.append(now - self.begin)
        self.hand.step(state.global_step)
        self.begin = time.process_time()
        self.by_hand.append(self.begin - now)


def measure_overhead(shape: dict[str, int]) -> dict[str, Any]:
    """Medians in ms, and the trainer's own share of its steps: median, quartiles. The first two steps are left out."""
    torch.set_num_threads(1)
    callback = Alternating()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(DistillationTrainer, shape, folder, callback)
        callback.hand = ByHand(made, shape)
        made.train()
    pairs = list(zip(callback.trainer[2:] or callback.trainer, callback.by_hand[2:] or callback.by_hand, strict=True))
    shares = [(a - b) / a for a, b in pairs]
    low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
    return {
        **shape,
        "ms_trainer": round(1e3 * statistics.median(a for a, _ in pairs), 1),
        "ms_by_hand": round(1e3 * statistics.median(b for _, b in pairs), 1),
        "share_of_step": [round(x, 4) for x in (middle, low, high)],
    }


class Window(transformers.TrainerCallback):
    """Highest memory of each step beyond what is resident before it."""

    def __init__(self) -> None:
        self.extra: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kd.memory.release()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        machine.peak_window()
        self.before = machine.resident_bytes()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.extra.append(machine.peak_bytes() - self.before)


def measure_memory(kind: str, shape: dict[str, int]) -> float:
    """MiB, of the last step: the optimizer's state is there by then."""
    callback = Window()
    with tempfile.TemporaryDirectory() as folder:
        trainer(DistillationTrainer if kind == "ours" else Eager, shape, folder, callback).train()
    return round(callback.extra[-1] / 2**20, 1)


def in_fresh_process(kind: str, quick: bool) -> float:
    """`measure_memory` in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.trainer", "--memory-of", kind] + ["--quick"] * quick
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=machine.ROOT, env=environment)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=("ours", "eager"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    shapes = QUICK if given.quick else SHAPES
    if given.memory_of:
        print(measure_memory(given.memory_of, shapes["memory"]))
        return
    found: dict[str, Any] = {"machine": machine.describe(), "commit": machine.commit()}
    found["overhead"] = [measure_overhead(shapes["overhead"])]
    ours, eager = in_fresh_process("ours", given.quick), in_fresh_process("eager", given.quick)
    logits = shapes["memory"]["batch"] * shapes["memory"]["length"] * shapes["memory"]["vocab"] * 4 / 2**20
    figures = {"ours_mib": ours, "eager_mib": eager, "ratio": round(ours / eager, 3), "logits_mib": round(logits, 1)}
    found["memory"] = [{**shapes["memory"], **figures}]
    given.output.write_text(dump(found), encoding="utf-8")
    print(json.dumps({"overhead": found["overhead"], "memory": found["memory"]}))


if __name__ == "__main__":
    main()
