"""`OnPolicy` under transformers' Trainer: the loss by hand, ranks and accumulation, LoRA, checkpoints, bad input."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import switch_oracle as oracle
import tiny_models as tiny
import torch
from trainer_runs import one_thread

import kdkernels as kd
from kdkernels.errors import UserError
from kdkernels.trainers import OnPolicy

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
__all__ = ["one_thread"]  # a fixture
ALWAYS: dict[str, Any] = {"generated_share": 1.0, "max_new_tokens": 5, "schedule": "constant", "tau0": 0.36}


def rows(count: int = 8, length: int = 12) -> list[dict[str, Any]]:
    """Samples with a masked prompt, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(3, 300, (length,), generator=generator)
        found.append({"input_ids": ids, "labels": torch.where(torch.arange(length) < 2 + number % 5, -100, ids)})
    return found


def trainer(folder: Path, student: Any, teacher: Any, policy: OnPolicy, **options: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0, "seed": 0,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    own = {k: options.pop(k) for k in ("lm_dataset", "lm_weight", "ce_weight", "divergence") if k in options}
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    return kd.trainers.DistillationTrainer(
        student, arguments, train_dataset=rows(), teacher=teacher, on_policy=policy, **own
    )


def order_of(run: Any) -> list[list[int]]:
    """Indices of the samples in the order in which the Trainer deals them out."""
    run.train_dataset = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows()]
    first = [int(row["input_ids"][0]) for row in run.train_dataset]
    return [[first.index(int(i)) for i in batch["input_ids"][:, 0]] for batch in run.get_train_dataloader()]


def by_hand(student: Any, teacher: Any, indices: list[int], step: int, tau: float) -> tuple[torch.Tensor, int, int]:
    """Sum of the loss, tokens, and the teacher's tokens of a generated step, sequence by sequence."""
    total, tokens, spoke = torch.zeros((), dtype=torch.float64), 0, 0
    for row, index in enumerate(indices):
        sample = rows()[index]
        prompt = sample["input_ids"][sample["labels"] == -100].tolist()
        draws = np.random.default_rng([0, 2, step, row]).random(5)
        told = oracle.generate(student, teacher, prompt, draws.tolist(), lambda _: tau, stops=(2,))
        assert told.margin > 1e-6, "draw by another seed: one lies on an edge"
        ids = torch.tensor([prompt + told.tokens])
        lq = student(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        lp = teacher(ids).logits[0, len(prompt) - 1 : -1].detach().double().log_softmax(-1)
        total = total + (lq.exp() * (lq - (0.9 * lp.exp() + 0.1 * lq.exp()).log())).sum()
        tokens, spoke = tokens + len(told.tokens), spoke + sum(told.from_teacher)
    return total, tokens, spoke


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_a_generated_step_follows_the_gradient_written_by_hand(tmp_path: Path, adapter: bool) -> None:
    """Under gradient checkpointing, which keeps no cache, and accumulated; the student whole or with an adapter."""
    student, teacher = tiny.llama(2), tiny.llama(3, seed=1)
    if adapter:
        peft = pytest.importorskip("peft")
        student = peft.get_peft_model(
            student, peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        )
    hand = copy.deepcopy(student).eval()
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 1, "ce_weight": 0.5}
    run = trainer(tmp_path, student, teacher, OnPolicy(**ALWAYS), gradient_checkpointing=True, **options)
    dealt = order_of(run)
    total, tokens, spoke = by_hand(hand, teacher.eval(), dealt[0] + dealt[1], 0, 0.36)
    (total / tokens).backward()
    run.train()
    assert student.training
    line = run.state.log_history[0]
    assert line["loss"] == pytest.approx(total.item() / tokens, rel=1e-4)
    assert line["divergence"] == pytest.approx(line["loss"], rel=1e-5)
    assert line["teacher_share"] == pytest.approx(spoke / tokens)
    assert 0 < spoke < tokens
    assert line["response_length"] == tokens / 4
    assert line["generated_share"] == 1
    assert 0 < line["jsd"] < 1
    start, moved = dict(hand.named_parameters()), 0
    for name, p in student.named_parameters():
        grad = start[name].grad
        if grad is None:
            assert torch.equal(p, start[name])
            continue
        assert ((start[name] - p).detach() / 0.1 - grad).norm() < 3e-4 * grad.norm()
        moved += 1
    assert moved == (6 if adapter else len(start))


def test_the_second_text_adds_its_cross_entropy(tmp_path: Path) -> None:
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    second = [{"input_ids": row["input_ids"].flip(0), "labels": row["input_ids"].flip(0)} for row in rows(3)]
    options = {"learning_rate": 0.0, "max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    run = trainer(tmp_path, student, teacher, OnPolicy(**ALWAYS), lm_dataset=second, lm_weight=0.5, **options)
    run.train()
    line = run.state.log_history[0]
    ids = torch.stack([row["input_ids"] for row in second])  # 6 draws of 3 samples: each twice
    z = student(ids).logits[:, :-1].flatten(0, 1).detach().double()
    nll = torch.nn.functional.cross_entropy(z, ids[:, 1:].flatten())
    assert line["loss"] == pytest.approx(line["divergence"] + 0.5 * float(nll), rel=1e-4)


def test_steps_that_are_not_generated_are_the_plain_ones(tmp_path: Path) -> None:
    teacher, policy = tiny.llama(2, seed=1), OnPolicy(max_new_tokens=3, generated_share=0.0)
    students = [tiny.llama(2), tiny.llama(2)]
    run = trainer(tmp_path, students[0], teacher, policy)
    run.train()
    assert run.state.log_history[0]["generated_share"] == 0
    assert "teacher_share" not in run.state.log_history[0]
    plain = trainer(tmp_path, students[1], teacher, policy, divergence="skew_reverse_kl")
    plain.on_policy = None
    plain.train()
    assert all(torch.equal(p, q) for p, q in zip(students[0].parameters(), students[1].parameters(), strict=True))


RESUMED: dict[str, Any] = {"generated_share": 0.8, "replay": 6, "replay_share": 0.6, "max_new_tokens": 4}


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    teacher = tiny.llama(2, seed=1)
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", tiny.llama(2), teacher, OnPolicy(**RESUMED), **options)
    whole.train()
    lines = [line for line in whole.state.log_history if "divergence" in line]
    assert any(line["replayed_share"] for line in lines[4:])
    assert any(not line["generated_share"] for line in lines)
    again = trainer(tmp_path / "again", tiny.llama(2), teacher, OnPolicy(**RESUMED), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    (tmp_path / "whole" / "checkpoint-4" / "on_policy.pt").unlink()
    with pytest.raises(UserError, match=r"a checkpoint with on_policy\.pt"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def course(folder: Path, batch_size: int, accumulate: int) -> list[dict[str, float]]:
    """Lines of a run of four steps of four rows."""
    policy = OnPolicy(generated_share=0.9, replay=8, replay_share=0.6, max_new_tokens=4, seed=2)
    run = trainer(
        folder, tiny.llama(2), tiny.llama(3, seed=1), policy, max_steps=4, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    run.train()
    names = ("loss", "divergence", "generated_share", "replayed_share", "teacher_share", "jsd", "response_length")
    return [{k: v for k, v in line.items() if k in names} for line in run.state.log_history if "divergence" in line]


def one_of_two(rank: int, folder: Path) -> None:
    """A rank of the same run, in a process of its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "", "MASTER_PORT": "0"})
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(course(folder / "ranks", 2, 1)))


def test_ranks_and_accumulated_batches_get_the_same_text(tmp_path: Path) -> None:
    """Four rows a step: in one batch, in two accumulated ones, on two ranks of gloo."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_of_two, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    whole, accumulated = course(tmp_path / "a", 4, 1), course(tmp_path / "b", 2, 2)
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(whole) == 4
    assert {line["replayed_share"] for line in whole} == {0, 1}
    assert sum("jsd" in line for line in whole) > 1
    for other in (accumulated, first, second):
        for ours, theirs in zip(whole, other, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4)


def test_what_cannot_be(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1), tiny.llama(1, seed=1)
    with pytest.raises(TypeError, match=r"on_policy = dict: must be a kdkernels\.trainers\.OnPolicy"):
        trainer(tmp_path, student, teacher, {"replay": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replay = 1: must be 0, or at least the 2 sequences of a step"):
        trainer(tmp_path, student, teacher, OnPolicy(replay=1))
    with pytest.raises(ValueError, match="lm_weight = 0"):
        trainer(tmp_path, student, teacher, OnPolicy(), lm_dataset=rows(), lm_weight=0)
    with pytest.raises(ValueError, match="lm_weight = 'much': must be a finite number"):
        trainer(tmp_path, student, teacher, OnPolicy(), lm_dataset=rows(), lm_weight="much")
    with pytest.raises(TypeError, match="lm_dataset = generator: must be a map-style dataset"):
        trainer(tmp_path, student, teacher, OnPolicy(), lm_dataset=(row for row in rows()))
    with pytest.raises(ValueError, match="lm_dataset = empty"):
        trainer(tmp_path, student, teacher, OnPolicy(), lm_dataset=[])
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="teacher = NoneType: must be a model with on_policy="):
        kd.trainers.DistillationTrainer(
            student, arguments, train_dataset=rows(), teacher_head=teacher.lm_head, on_policy=OnPolicy()
        )
    with pytest.raises(ValueError, match="prompt \\+ max_new_tokens"):
        trainer(tmp_path, student, teacher, OnPolicy(generated_share=1.0, max_new_tokens=255)).train()
    unlabelled = trainer(tmp_path, student, teacher, OnPolicy(generated_share=1.0, max_new_tokens=2))
    unlabelled.train_dataset = [{"input_ids": row["input_ids"]} for row in rows()]
    with pytest.raises(UserError, match="labels = None"):
        unlabelled.train()
