"""The training loop: its steps, scores, accumulation, precision, vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from trainer_runs import config, lines, one_thread, place, weights, words

from kdkernels import data
from kdkernels.errors import UserError
from kdkernels.trainers import DistillConfig, checkpoint, distill, heads, optim
from kdkernels.trainers.setup import build

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
__all__ = ["one_thread", "place", "words"]  # fixtures


# --- the loop ---


def test_accumulation_equals_the_large_batch(place: Path, tmp_path: Path) -> None:
    """The same eight blocks in one pass or in eight, with different numbers of tokens that count in each."""
    runs = []
    for name, batch_size, accumulate in (("large", 8, 1), ("small", 1, 8)):
        options = {"steps": 3, "batch_size": batch_size, "accumulate": accumulate, "optimizer": "sgd", "lr": 1.0}
        result = distill(config(place, tmp_path / name, ce_weight=0.5, **options), progress=False)
        runs.append((dict(result.student.named_parameters()), lines(tmp_path / name)))
    for name, value in runs[0][0].items():
        worst = float((value - runs[1][0][name]).detach().abs().max())
        assert worst <= 1e-6 * float(value.detach().abs().max()) + 1e-7, (name, worst)
    for large, small in zip(runs[0][1], runs[1][1], strict=True):
        if large["event"] == "step":
            assert large["loss"] == pytest.approx(small["loss"], rel=1e-6)


def test_the_steps_are_the_textbook_ones(place: Path, tmp_path: Path) -> None:
    """Three steps against a loop written out with full logits and torch's own losses."""
    options = config(
        place, tmp_path / "run", steps=3, batch_size=3, ce_weight=0.3, kd_weight=0.7, temperature=2.0,
        temperature_scaling="t2", schedule="linear", warmup=1, clip=0.5, weight_decay=0.1,
    )  # fmt: skip
    result = distill(options, progress=False)
    setup = build(options)
    teacher, student = setup.objective.teacher, setup.objective.student
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    order = data.BlockOrder({k: len(v) for k, v in setup.corpus.train.items()}, "proportional", 0)
    for step, rate in enumerate([1.5e-3, 3e-3, 1.5e-3]):
        batch = data.batch_of(setup.corpus, order, 3 * step, 3, torch.device("cpu"))
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        zs, zt = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        kl = torch.nn.functional.kl_div(
            (zs / 2).log_softmax(-1), (zt / 2).log_softmax(-1), reduction="none", log_target=True
        )
        ce = torch.nn.functional.cross_entropy(zs.flatten(0, 1), labels.flatten(), reduction="mean")
        (0.7 * 4 * kl.sum(-1)[labels != -100].mean() + 0.3 * ce).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        adam.zero_grad()
    for (name, ours), theirs in zip(result.student.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=name)


def test_learning_rate_schedules() -> None:
    base = DistillConfig(steps=10, warmup=2, lr=1.0, min_lr=0.1)
    rates = [optim.learning_rate(i, base) for i in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.1 < rates[-1] < 0.2
    assert optim.learning_rate(9, DistillConfig(steps=10, lr=1.0, schedule="constant")) == 1.0
    assert optim.learning_rate(5, DistillConfig(steps=10, lr=1.0, schedule="linear")) == 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_distillation_lowers_the_divergence(place: Path, tmp_path: Path, optimizer: str) -> None:
    options = {"steps": 12, "optimizer": optimizer, "lr": {"sgd": 0.1, "adamw": 5e-3, "adafactor": 2e-2}[optimizer]}
    result = distill(config(place, tmp_path / "run", mix="equal", **options), progress=False)
    summary = result.summary
    assert set(summary["after"]) == {"code", "lists", "prose"}
    for name, after in summary["after"].items():
        assert after["kl"] < summary["before"][name]["kl"]
        assert after["tokens"] > 10
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert not checkpoint.steps_in(tmp_path / "run" / "checkpoints")


def test_scores_equal_the_textbook(place: Path, tmp_path: Path) -> None:
    result = distill(config(place, tmp_path / "run", steps=1, lr=1e-9, eval_blocks=1, batch_size=1), progress=False)
    setup = build(config(place, tmp_path / "run"))
    for name, blocks in setup.corpus.held_out.items():
        batch = {key: value[None] for key, value in blocks[0].items()}
        labels = batch.pop("labels")[0, 1:]
        keep = labels != -100
        with torch.no_grad():
            lq, lp = (
                m.eval()(**batch).logits[0, :-1][keep].double().log_softmax(-1)
                for m in (setup.objective.student, setup.objective.teacher)
            )
        score = result.summary["before"][name]
        nll = -lq.gather(1, labels[keep][:, None]).mean()
        assert score["kl"] == pytest.approx(float((lp.exp() * (lp - lq)).sum(-1).mean()), rel=1e-4)
        assert score["ppl"] == pytest.approx(float(nll.exp()), rel=1e-4)
        assert score["teacher_ppl"] == pytest.approx(
            float((-lp.gather(1, labels[keep][:, None]).mean()).exp()), rel=1e-4
        )
        assert score["top1"] == pytest.approx(float((lp.argmax(-1) == lq.argmax(-1)).double().mean()))
        assert score["tokens"] == int(keep.sum())


def test_text_alone_needs_no_teacher_pass(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = heads.hidden_states
    monkeypatch.setattr(
        "kdkernels.trainers.objective.hidden_states", lambda model, batch: calls.append(model) or plain(model, batch)
    )
    options = config(place, tmp_path / "run", kd_weight=0.0, ce_weight=1.0, steps=2)
    result = distill(options, progress=False)
    assert len(calls) == 2
    assert all(model is result.student for model in calls)
    steps = [row for row in lines(tmp_path / "run") if row["event"] == "step"]
    assert all(row["loss"] == pytest.approx(row["nll"], rel=1e-5) and "divergence" not in row for row in steps)


def test_logits_are_never_built(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No module of either model may produce anything as wide as the vocabulary, once the heads are checked."""
    options = config(place, tmp_path / "run", steps=2)
    setup = build(options)
    wide: list[str] = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.shape[-1] >= 300:
            wide.append(type(module).__name__)

    for model in (setup.objective.teacher, setup.objective.student):
        for module in model.modules():
            module.register_forward_hook(watch)
    batch = data.batch_of(setup.corpus, data.BlockOrder({"code": 2}, "equal", 0), 0, 2, torch.device("cpu"))
    loss, _ = setup.objective(batch, 10)
    loss.backward()
    assert wide == []


def test_bf16_keeps_float32_masters(place: Path, tmp_path: Path) -> None:
    setup = build(config(place, tmp_path / "x", bf16=True))
    assert setup.objective.dtype == torch.bfloat16
    assert next(setup.objective.teacher.parameters()).dtype == torch.bfloat16
    assert next(setup.objective.student.parameters()).dtype == torch.float32
    result = distill(config(place, tmp_path / "run", bf16=True, steps=8), progress=False)
    assert all(w.dtype == torch.bfloat16 for w in weights(tmp_path / "run").values())
    for name, after in result.summary["after"].items():
        assert after["kl"] < result.summary["before"][name]["kl"]


# --- padding and vocabularies ---


def test_padded_vocabularies_meet_at_the_smaller(place: Path, tmp_path: Path, words: Any) -> None:
    padded = tiny.llama(2, vocab=320)
    plain = tiny.llama(2, vocab=304)
    state = plain.state_dict()
    for name, value in padded.state_dict().items():
        value[: len(state[name])] = state[name]
    outcomes = []
    for name, student in (("plain", plain), ("padded", padded)):
        options = config(place, tmp_path / name, steps=2)
        outcomes.append(distill(options, student=student, tokenizer=words, progress=False).summary)
    for domain, score in outcomes[0]["before"].items():
        assert outcomes[1]["before"][domain]["kl"] == pytest.approx(score["kl"], rel=1e-5)
        assert outcomes[1]["after"][domain]["kl"] == pytest.approx(outcomes[0]["after"][domain]["kl"], rel=1e-4)


def test_different_vocabularies_are_named(place: Path, tmp_path: Path) -> None:
    other = tiny.tokenizer(280)
    tiny.save(tiny.llama(1, vocab=281), tmp_path / "other", other)
    with pytest.raises(UserError, match=rf"tokenizers differ: teacher has \d+ tokens, student {len(other)}"):
        build(config(place, tmp_path / "run", student=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"teacher has 304 rows, student 281, the tokenizer \d+ tokens"):
        build(config(place, tmp_path / "run", student=str(tmp_path / "other"), tokenizer=str(place / "teacher")))
    with pytest.raises(UserError, match="vocab_size is 999; allowed: up to 304"):
        build(config(place, tmp_path / "run", vocab_size=999))
