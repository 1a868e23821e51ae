"""benchmarks/trainer.py: what is compared computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer_runs import one_thread  # noqa: F401

pytest.importorskip("transformers")

import transformers

from benchmarks import trainer
from kdkernels.trainers import DistillationTrainer

SHAPE = trainer.QUICK["overhead"]


def test_the_eager_trainer_has_the_same_loss(tmp_path: Path) -> None:
    losses = []
    for kind in (DistillationTrainer, trainer.Eager):
        made = trainer.trainer(kind, SHAPE, str(tmp_path), transformers.TrainerCallback())
        losses.append(made.train().training_loss)
    assert losses[0] > 0.1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_step_by_hand_moves_the_student_as_the_trainer_does(tmp_path: Path) -> None:
    class Once(transformers.TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            hand.batches = [self.batch]
            hand.step(0)
            for (name, ours), theirs in zip(made.model.named_parameters(), hand.student.parameters(), strict=True):
                assert (ours - theirs).abs().max() <= 1e-6 + 1e-3 * moved(name), name

    def moved(name: str) -> float:
        return float((dict(made.model.named_parameters())[name] - before[name]).detach().abs().max())

    callback = Once()
    made = trainer.trainer(DistillationTrainer, {**SHAPE, "steps": 1}, str(tmp_path), callback)
    hand = trainer.ByHand(made, {**SHAPE, "steps": 1})
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    callback.batch = next(iter(made.get_train_dataloader()))["input_ids"]
    made.train()
    assert moved("model.norm.weight") > 1e-5
