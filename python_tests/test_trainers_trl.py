"""TRL's trainers with kdkernels' loss: SFTTrainer through the mixin, and the on-policy one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

import kdkernels as kd

pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


SETTINGS = {
    "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "report_to": "none",
    "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0, "bf16": False,
    "lr_scheduler_type": "constant", "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def test_sft_trainer_distils(tmp_path: Path, words: Any) -> None:
    class DistillSFT(kd.trainers.DistillationMixin, trl.SFTTrainer):
        pass

    data = datasets.Dataset.from_dict({"text": tiny.sentences("prose", 8)})
    student, teacher = tiny.llama(2), tiny.llama(2, seed=1)
    run = DistillSFT(
        student, args=trl.SFTConfig(str(tmp_path), max_length=32, **SETTINGS), train_dataset=data,
        processing_class=words, teacher=teacher, divergence="jsd",
    )  # fmt: skip
    run.train()
    line = run.state.log_history[0]
    assert line["loss"] == pytest.approx(line["divergence"], rel=1e-4)
    assert 0 < line["loss"] < 0.7  # a JSD, not SFT's cross-entropy of about 6


def on_policy(place: Path, words: Any, cls: type, student: Any, teacher: Any, **options: Any) -> Any:
    prompts = datasets.Dataset.from_dict({"prompt": tiny.sentences("prose", 6)})
    own = {k: options.pop(k) for k in ("divergence", "vocab_size") if k in options}
    config = trl.DistillationConfig(str(place), max_completion_length=6, **{**SETTINGS, **options})
    return cls(student, teacher, config, train_dataset=prompts, processing_class=words, **own)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompt, completion = (torch.randint(0, 200, (2, n), generator=generator) for n in (4, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": completion,
        "completion_mask": mask,
    }  # fmt: skip


class Distill(kd.trainers.TRLDistillationMixin, trl.DistillationTrainer):
    pass


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 11.0])
def test_the_same_loss_and_gradient_as_theirs(tmp_path: Path, words: Any, beta: float, items: float | None) -> None:
    teacher, student = tiny.llama(2, seed=1), tiny.llama(2)
    pairs = []
    for cls in (Distill, trl.DistillationTrainer):
        run = on_policy(tmp_path, words, cls, copy.deepcopy(student), teacher, beta=beta, temperature=2.0)
        number = None if items is None else torch.tensor(items)
        loss, entropy, counted = run._compute_loss(run.model, inputs(), number)
        loss.backward()
        pairs.append((loss.detach(), entropy, counted, [p.grad for p in run.model.parameters()]))
    ours, theirs = pairs
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5)
    assert ours[0] > 1e-3
    assert torch.allclose(ours[1], theirs[1], rtol=1e-4)
    assert int(ours[2]) == int(theirs[2]) == 8
    for a, b in zip(ours[3], theirs[3], strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


def test_they_generate_and_this_scores(tmp_path: Path, words: Any) -> None:
    student = tiny.llama(2)
    before = copy.deepcopy(student.state_dict())
    run = on_policy(tmp_path, words, Distill, student, tiny.llama(2, seed=1), divergence="skew_reverse_kl")
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 6 for loss in losses)
    assert any(not torch.equal(p, before[name]) for name, p in student.state_dict().items())


def test_options_that_would_change_the_loss(tmp_path: Path, words: Any) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing_factor = 0.1: must be 0"):
        on_policy(tmp_path, words, Distill, tiny.llama(1), tiny.llama(1), label_smoothing_factor=0.1)
