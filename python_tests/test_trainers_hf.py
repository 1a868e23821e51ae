"""The loss under transformers' Trainer: same gradients as by hand, accumulation, logging, heads, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn

import kdkernels as kd
from kdkernels.errors import UserError
from kdkernels.trainers import hf

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(count: int = 8, length: int = 12) -> list[dict[str, Any]]:
    """Samples whose number of counting tokens differs."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(0, 300, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < 1 + number, -100, ids)
        found.append({"input_ids": ids, "labels": labels})
    return found


def arguments(folder: Path, **options: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0, "seed": 0,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**settings, **options})


def trainer(folder: Path, student: Any, teacher: Any, data: Any = None, **options: Any) -> Any:
    own = ("teacher_head", "divergence", "temperature", "ce_weight", "kd_weight", "vocab_size", "sparse_mode")
    settings = {k: options.pop(k) for k in list(options) if k in own}
    return kd.trainers.DistillationTrainer(
        student, arguments(folder, **options), train_dataset=data or rows(), eval_dataset=rows(5), teacher=teacher,
        **settings,
    )  # fmt: skip


def batch(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def reference(student: Any, teacher: Any, data: list[dict[str, Any]], temperature: float, ce: float) -> torch.Tensor:
    """Mean over the tokens that count, from whole logits and textbook formulas."""
    inputs = batch(data)
    zs = student(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        zt = teacher(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    keep = labels != -100
    zs, zt, labels = zs[keep].double(), zt[keep].double(), labels[keep]
    lp, lq = (zt / temperature).log_softmax(-1), (zs / temperature).log_softmax(-1)
    kl = (lp.exp() * (lp - lq)).sum(-1)
    return (kl + ce * nn.functional.cross_entropy(zs, labels, reduction="none")).mean()


def gradients_of(student: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_a_step_follows_the_gradient_written_by_hand(tmp_path: Path) -> None:
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    by_hand = copy.deepcopy(student)
    reference(by_hand, teacher, rows(2), 2.0, 0.5).backward()
    start = {n: p.detach().clone() for n, p in student.named_parameters()}
    trainer(tmp_path, student, teacher, rows(2), temperature=2.0, ce_weight=0.5, max_steps=1).train()
    for name, p in student.named_parameters():
        moved = (start[name] - p.detach()) / 0.1
        expected = dict(by_hand.named_parameters())[name].grad
        assert expected is not None
        assert (moved - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_one_large_batch(tmp_path: Path, accumulate: int) -> None:
    teacher = tiny.llama(2, seed=1)
    students = [tiny.llama(2) for _ in range(2)]
    # steps so long that the parameters' own rounding does not count
    large = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 100.0}
    small = {**large, "per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    logs = []
    for student, options in zip(students, (large, small), strict=True):
        run = trainer(tmp_path, student, teacher, max_steps=1, **options)
        run.train()
        logs.append(run.state.log_history[0])
    start = dict(tiny.llama(2).named_parameters())
    for name, p in students[0].named_parameters():
        other = dict(students[1].named_parameters())[name]
        assert (p - other).norm() <= 1e-6 * (p - start[name]).norm()
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-6)
    assert logs[0]["divergence"] == pytest.approx(logs[1]["divergence"], rel=1e-6)


def test_what_is_logged(tmp_path: Path) -> None:
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    run = trainer(tmp_path, student, teacher, learning_rate=0.0, per_device_train_batch_size=8, max_steps=1)
    run.train()
    line = run.state.log_history[0]
    kl = reference(student, teacher, rows(), 1.0, 0.0).item()
    assert line["loss"] == pytest.approx(kl, rel=1e-4)
    assert line["divergence"] == pytest.approx(kl, rel=1e-4)
    whole = reference(student, teacher, rows(), 1.0, 1.0).item()
    assert line["nll"] == pytest.approx(whole - kl, rel=1e-4)
    assert 0 <= line["accuracy"] <= 1
    assert 0 <= line["top1_agreement"] <= 1
    assert 0 < line["student_entropy"] < 6
    metrics = run.evaluate()
    assert metrics["eval_divergence"] == pytest.approx(reference(student, teacher, rows(5), 1.0, 0.0).item(), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_divergence"], rel=0.2)  # the Trainer's mean of batches


def test_logits_are_never_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    run = trainer(tmp_path, student, teacher, max_steps=1)
    for model in (student, teacher):
        monkeypatch.setattr(model.lm_head, "forward", None)
    run.train()


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_and_a_frozen_head(tmp_path: Path, frozen: bool) -> None:
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1).to(torch.bfloat16)
    student.lm_head.weight.requires_grad_(not frozen)
    before = student.lm_head.weight.detach().clone()
    run = trainer(tmp_path, student, teacher, bf16=True, max_steps=3, learning_rate=0.5)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert torch.equal(student.lm_head.weight, before) == frozen


def test_hidden_states_computed_elsewhere(tmp_path: Path) -> None:
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    with torch.no_grad():
        data = [{**row, "teacher_hidden": teacher.model(row["input_ids"][None]).last_hidden_state[0]} for row in rows()]
    again = copy.deepcopy(student)
    run = trainer(tmp_path, student, None, data, teacher_head=teacher.lm_head)
    run.train()
    trainer(tmp_path, again, teacher).train()
    for p, q in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def test_a_teacher_cache(tmp_path: Path) -> None:
    """Every entry kept in float32: the same steps as with the teacher itself."""
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    again = copy.deepcopy(student)
    data = [{**row, "example_id": 10 + number} for number, row in enumerate(rows())]
    with kd.TeacherCache.create(tmp_path / "cache", vocab_size=304, k=304, bits=32) as cache, torch.no_grad():
        for row in data:
            kept = kd.compress(teacher(row["input_ids"][None]).logits[0], k=304)
            cache.append(row["example_id"], kept, input_ids=row["input_ids"])
        cache.commit()
    trainer(tmp_path, student, kd.TeacherCache.open(tmp_path / "cache"), data).train()
    trainer(tmp_path, again, teacher).train()
    for p, q in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="example_id = None"):
        trainer(tmp_path, student, kd.TeacherCache.open(tmp_path / "cache")).train()


@pytest.mark.parametrize("head", [False, True])
def test_lora_students(tmp_path: Path, head: bool) -> None:
    peft = pytest.importorskip("peft")
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    targets = ["q_proj", "lm_head"] if head else ["q_proj"]
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    expected = copy.deepcopy(adapted)
    reference(expected, teacher, rows(2), 1.0, 0.0).backward()
    start = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    trainer(tmp_path, adapted, teacher, rows(2), max_steps=1).train()
    moved = 0
    for name, p in adapted.named_parameters():
        grad = dict(expected.named_parameters())[name].grad
        if not p.requires_grad:
            assert torch.equal(p, start[name])
            continue
        assert grad is not None
        assert ((start[name] - p.detach()) / 0.1 - grad).norm() < 2e-4 * grad.norm()
        moved += 1
    assert moved == (6 if head else 4)


def test_padded_vocabularies(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, vocab=304), tiny.llama(1, vocab=320, seed=1)
    with pytest.raises(UserError, match="tokenizer"):
        kd.trainers.DistillationTrainer(
            student, arguments(tmp_path), train_dataset=rows(), teacher=teacher, vocab_size=310
        )
    run = trainer(tmp_path, student, teacher, rows(2), vocab_size=300, max_steps=1, learning_rate=0.0)
    run.train()
    inputs = batch(rows(2))
    zs, zt = (model(inputs["input_ids"]).logits.detach()[:, :-1, :300].double() for model in (student, teacher))
    kl = (zt.softmax(-1) * (zt.log_softmax(-1) - zs.log_softmax(-1))).sum(-1)
    assert run.state.log_history[0]["loss"] == pytest.approx(
        float(kl[inputs["labels"][:, 1:] != -100].mean()), rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1: must be 0"),
        ({"torch_compile": True}, "torch_compile = True: must be False"),
    ],
)
def test_options_that_would_change_the_loss(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tiny.llama(1), tiny.llama(1), **options)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher = None: must be a model"):
        trainer(tmp_path, tiny.llama(1), None)
    with pytest.raises(TypeError, match=r"teacher = 'some/model': must be a model.*from_pretrained"):
        trainer(tmp_path, tiny.llama(1), "some/model")
    with pytest.raises(ValueError, match="compute_loss_func"):
        kd.trainers.DistillationTrainer(
            tiny.llama(1), arguments(tmp_path), teacher=tiny.llama(1), compute_loss_func=lambda *_, **__: None
        )
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows()]
    with pytest.raises(UserError, match="labels = None: must be in every batch"):
        trainer(tmp_path, tiny.llama(1), tiny.llama(1), unlabelled).train()
    with pytest.raises(UserError, match="teacher_hidden = None"):
        trainer(tmp_path, tiny.llama(1), None, teacher_head=tiny.llama(1).lm_head).train()
    with pytest.raises(ValueError, match="divergence"):
        trainer(tmp_path, tiny.llama(1), tiny.llama(1), divergence="forward").train()


def test_any_trainer_will_do(tmp_path: Path) -> None:
    class Own(hf.DistillationMixin, transformers.Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "own": 1.0}, *args, **kwargs)

    run = Own(tiny.llama(1), arguments(tmp_path), train_dataset=rows(), teacher=tiny.llama(1, seed=1))
    run.train()
    assert run.state.log_history[0]["own"] == 1.0
    assert "divergence" in run.state.log_history[0]
