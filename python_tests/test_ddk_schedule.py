"""A schedule over a run: measured, weighed, drawn; and under transformers' Trainer, stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

import kdkernels as kd
from kdkernels.ddk import DomainSchedule
from kdkernels.errors import UserError

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(count: int, seed: int, low: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(low, low + 100, (10,), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


DATA = {"code": samples(9, 0), "prose": samples(5, 1, 100), "lists": samples(12, 2, 200)}
HELD_OUT = {"code": samples(2, 3), "prose": samples(2, 4, 100), "lists": samples(2, 5, 200)}
TEACHER = {"code": 50.0, "prose": 80.0, "lists": 65.0}


def schedule(**options: Any) -> DomainSchedule:
    return DomainSchedule(DATA, HELD_OUT, **{"interval": 8, "teacher": TEACHER, **options})


def test_an_interval_is_drawn_by_what_was_measured() -> None:
    plan = schedule()
    assert plan.sampler.counts() == {"code": 3, "prose": 3, "lists": 2}
    list(plan.sampler)
    row = plan.update({"code": 200.0, "prose": 80.0, "lists": 65.0}, step=4)
    expected = torch.softmax(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64), 0).tolist()
    assert list(row["weights"].values()) == pytest.approx(expected)
    list(plan.sampler)
    assert plan.sampler.counts() == {"code": 7, "prose": 1, "lists": 0}


def test_the_teacher_is_measured_once(tmp_path: Path) -> None:
    teacher, student = tiny.llama(1, seed=1), tiny.llama(1)
    plan = schedule(teacher=teacher, cache=tmp_path)
    plan.remeasure(student, 1)
    assert plan.teacher_ppl == kd.ddk.measure_perplexity(teacher, HELD_OUT)
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
    plan.remeasure(student, 2)
    assert [row["step"] for row in plan.history] == [1, 2]
    assert plan.history[0]["discrepancy"] == pytest.approx(plan.history[1]["discrepancy"])


def test_state_goes_on_in_the_middle() -> None:
    a, b = schedule(), schedule()
    list(a.sampler)
    a.update({"code": 90.0, "prose": 80.0, "lists": 65.0}, 4)
    draws = iter(a.sampler)
    for _ in range(3):
        next(draws)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert list(draws) == list(b.sampler)
    assert b.history == a.history
    assert a.update(TEACHER, 8) == b.update(TEACHER, 8)
    assert list(a.sampler) == list(b.sampler)


def test_the_course_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = schedule()
    for step in (2, 4, 6):
        plan.update({"code": 90.0 + step, "prose": 80.0, "lists": 65.0}, step)
    path = plan.draw(tmp_path / "deep" / "course.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000


def run(folder: Path, steps: int, resume: str | None = None, **options: Any) -> tuple[Any, Any]:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": steps, "learning_rate": 0.5, "optim": "sgd",
        "report_to": "none", "logging_steps": 1, "save_steps": 1, "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    student = tiny.llama(1)
    trainer = kd.trainers.DistillationTrainer(student, arguments, teacher=tiny.llama(1, seed=1), domains=schedule())
    trainer.train(resume_from_checkpoint=resume)
    return trainer, student


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_trainer_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole, student = run(tmp_path / "whole", 9)
    assert [row["step"] for row in whole.domains.history] == [4, 8]
    again, other = run(tmp_path / "other", 9, str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert again.domains.history == whole.domains.history
    for p, q in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    logged = [line for line in whole.state.log_history if "ddk_weight_code" in line]
    assert [line["step"] for line in logged] == [4, 8]
    assert logged[0]["ddk_weight_prose"] == whole.domains.history[0]["weights"]["prose"]
    assert (tmp_path / "whole" / "ddk.png").is_file()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held_out = "):
        DomainSchedule(DATA, {"code": HELD_OUT["code"]}, interval=8, teacher=TEACHER)
    with pytest.raises(ValueError, match="teacher = "):
        schedule(teacher={"code": 1.0})
    with pytest.raises(ValueError, match="interval = 8: must be a multiple of 6"):
        run(tmp_path, 2, gradient_accumulation_steps=3)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    teacher = tiny.llama(1)
    with pytest.raises(ValueError, match="train_dataset = given: must be None"):
        kd.trainers.DistillationTrainer(
            tiny.llama(1), arguments, train_dataset=DATA["code"], teacher=teacher, domains=schedule()
        )
    (tmp_path / "checkpoint-1").mkdir()
    from kdkernels.trainers.domains import load_domains

    with pytest.raises(UserError, match=r"a checkpoint with ddk\.json"):
        load_domains(schedule(), str(tmp_path / "checkpoint-1"))
