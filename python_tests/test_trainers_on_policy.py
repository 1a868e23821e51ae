"""`kdkernels distill --on-policy`: which steps are generated, what they are trained on, replay, resuming, bad input."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import switch_oracle as oracle
import tiny_models as tiny
import torch
from on_policy_runs import SMALL, steps
from trainer_runs import config, lines, one_thread, place, weights, words

from kdkernels import data
from kdkernels.trainers import Interrupted, OnPolicy, distill
from kdkernels.trainers.on_policy import Writer, prompt_of
from kdkernels.trainers.on_policy_text import OnPolicyText
from kdkernels.trainers.replay import ReplayBuffer, Written
from kdkernels.trainers.setup import build

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
__all__ = ["one_thread", "place", "words"]  # fixtures


def skew_reverse_kl(zs: torch.Tensor, zt: torch.Tensor) -> torch.Tensor:
    """KL(q || 0.9 p + 0.1 q), a token each."""
    lq, lp = zs.double().log_softmax(-1), zt.double().log_softmax(-1)
    mixture = (0.9 * lp.exp() + 0.1 * lq.exp()).log()
    return (lq.exp() * (lq - mixture)).sum(-1)


def text_of(options: Any) -> tuple[OnPolicyText, Any]:
    setup = build(options)
    order = data.BlockOrder({k: len(v) for k, v in setup.corpus.train.items()}, "proportional", options.seed)
    return OnPolicyText.of(options, setup, order), setup


# --- what a step is trained on ---


@pytest.mark.parametrize("gate", ["constant:1", "constant:-1", "constant:0.13"], ids=["student", "teacher", "between"])
def test_a_generated_step_against_a_loop_written_by_hand(place: Path, tmp_path: Path, gate: str) -> None:
    """Prompts, draws, padding, mask and loss: sequences one by one, without cache and padding, whole logits."""
    options = config(place, tmp_path / "run", gate=gate, steps=1, optimizer="sgd", lr=1.0, clip=0.0, **SMALL,
                     accumulate=2, ce_weight=0.7, seed=3)  # fmt: skip
    text, setup = text_of(options)
    student, teacher = setup.objective.student.double().eval(), setup.objective.teacher.double()
    tau, total, tokens = float(gate.partition(":")[2]), torch.zeros((), dtype=torch.float64), 0
    spoke = 0
    for row in range(4):
        name, index = text.order[row]
        prompt = prompt_of(setup.corpus.train[name][index], 5, options.seed, 0, row)
        draws = np.random.default_rng([options.seed, 2, 0, row]).random(6)
        told = oracle.generate(student, teacher, prompt, draws.tolist(), lambda _: tau, stops=(0, 2))
        assert told.margin > 1e-6, "draw by another seed: one lies on an edge"
        ids = torch.tensor([prompt + told.tokens])
        with torch.no_grad():
            zt = teacher(ids).logits[0, len(prompt) - 1 : -1]
        total = total + skew_reverse_kl(student(ids).logits[0, len(prompt) - 1 : -1], zt).sum()
        tokens += len(told.tokens)
        spoke += sum(told.from_teacher)
    assert {"constant:1": spoke == 0, "constant:-1": spoke == tokens}.get(gate, 0 < spoke < tokens)
    (total / tokens).backward()
    result = distill(options, progress=False)
    row = steps(tmp_path / "run")[0]
    assert row["tokens"] == tokens
    assert row["loss"] == pytest.approx(total.item() / tokens, rel=1e-4)
    assert row["teacher_share"] == pytest.approx(spoke / tokens)
    assert row["response_length"] == tokens / 4
    before = dict(build(options).objective.student.named_parameters())
    for name, p in student.named_parameters():
        moved = (before[name] - dict(result.student.named_parameters())[name]).double()
        assert p.grad is not None
        assert (moved - p.grad).norm() <= 2e-4 * p.grad.norm(), name


def test_steps_are_generated_with_the_probability_asked_for(place: Path, tmp_path: Path) -> None:
    made = [
        [Writer(OnPolicy(generated_share=share, seed=seed), None, None, vocab_size=None, stops=[]).plan(step, 4)[0]
         for step in range(400)]
        for share, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (0.0, 0), (1.0, 0))
    ]  # fmt: skip
    assert made[0] == made[1] != made[2]
    assert 160 < sum(made[0]) < 240  # four standard deviations
    assert 160 < sum(made[2]) < 240
    assert not any(made[3])
    assert all(made[4])


def test_without_generation_it_is_the_plain_run(place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"divergence": "skew_reverse_kl", "ce_weight": 0.5, "steps": 2}
    distill(config(place, tmp_path / "plain", **options), progress=False)
    distill(config(place, tmp_path / "on", **options, **{**SMALL, "generated_share": 0.0}), progress=False)
    ours, theirs = weights(tmp_path / "on"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert config(place, "x", on_policy=True).divergence == "skew_reverse_kl"
    assert config(place, "x", on_policy=True, divergence="jsd").divergence == "jsd"
    assert config(place, "x").divergence == "forward_kl"


def test_how_rows_are_batched_changes_nothing(place: Path, tmp_path: Path) -> None:
    """Written one at a time or together, passed in one batch or four: the same text, the same gradients."""
    common = {**SMALL, "steps": 2, "optimizer": "sgd", "lr": 0.1}
    shapes = ({"batch_size": 4}, {"batch_size": 4, "write_batch": 3}, {"batch_size": 1, "accumulate": 4})
    logs = []
    for number, shape in enumerate(shapes):
        distill(config(place, tmp_path / str(number), **common, **shape), progress=False)
        logs.append(steps(tmp_path / str(number)))
    for other in logs[1:]:
        for a, b in zip(logs[0], other, strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_modes_come_back_and_dropout_sleeps(place: Path, tmp_path: Path, words: Any) -> None:
    """A student with dropout and gradient checkpointing, one module of which is kept in eval mode."""
    student = tiny.llama(2, attention_dropout=0.3)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    options = config(place, tmp_path / "run", **SMALL)
    setup = build(options, student=student, tokenizer=words)
    student.model.layers[0].eval()
    order = data.BlockOrder({k: len(v) for k, v in setup.corpus.train.items()}, "proportional", 0)
    text = OnPolicyText.of(options, setup, order)
    modes, state = [m.training for m in student.modules()], torch.get_rng_state()
    first, generated = text.batches(0, lambda: False)
    again, _ = text.batches(0, lambda: False)
    assert generated
    assert [m.training for m in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0]["input_ids"], again[0]["input_ids"])
    loss, _ = setup.objective(first[0], 5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_a_prompt_is_the_beginning_of_one_document() -> None:
    """A packed block, an instruction with a masked prompt, and padding."""
    ids = torch.arange(100, 120)
    positions = torch.cat([torch.arange(3), torch.arange(11), torch.arange(6)])  # documents of 3 and 11, 6 of padding
    labels = torch.where(positions == 0, -100, ids)
    labels[14:] = -100
    block = {"input_ids": ids, "position_ids": positions, "labels": labels}
    found = [tuple(prompt_of(block, 4, 0, step, 0)) for step in range(200)]
    assert set(found) == {(100,), (103, 104, 105, 106)}
    assert 130 < found.count((103, 104, 105, 106)) < 185  # 11 / 14 of 200: 157
    labels = ids.clone()
    labels[:7] = -100
    assert prompt_of({"input_ids": ids, "labels": labels}, 4, 0, 0, 0) == list(range(100, 107))
    mask = (torch.arange(20) >= 5).long()
    labels = torch.where(mask.bool(), ids, -100)
    assert prompt_of({"input_ids": ids, "labels": labels}, 4, 0, 0, 0, mask) == [105, 106, 107, 108]


# --- replay ---


def test_the_buffer_is_bounded_in_number_and_age() -> None:
    buffer = ReplayBuffer(5, 2)
    for step in range(4):
        buffer.add([Written((step, i), 1, step) for i in range(2)])
    assert len(buffer) == 5
    rng = np.random.default_rng(0)
    drawn = [s for _ in range(50) for s in buffer.draw(3, 4, rng) or []]
    assert {s.born for s in drawn} == {2, 3}  # the one of step 1 is too old by now
    assert len({s.tokens for s in drawn}) == 4
    assert len({s.tokens for s in buffer.draw(4, 4, rng) or []}) == 4
    assert buffer.draw(5, 4, rng) is None
    assert buffer.draw(1, 9, rng) is None
    other = ReplayBuffer(5, 2)
    other.load_state_dict(buffer.state_dict())
    assert other.draw(4, 4, np.random.default_rng(1)) == buffer.draw(4, 4, np.random.default_rng(1))
    empty = ReplayBuffer(5, 2)
    empty.load_state_dict(ReplayBuffer(5, 2).state_dict())
    assert len(empty) == 0


def test_kept_sequences_are_trained_on_again(place: Path, tmp_path: Path) -> None:
    options = config(place, tmp_path / "run", **SMALL, replay=4, replay_share=1.0, replay_age=2)
    text, _ = text_of(options)
    seen = []
    for step in range(5):
        batches, _ = text.batches(step, lambda: False)
        text.commit()
        seen.append({tuple(row.tolist()) for row in batches[0]["input_ids"]})
    assert seen[1] == seen[2] == seen[0] != seen[3]  # written at step 0, too old at step 3
    assert seen[4] == seen[3]
    told = text.figures()
    assert told["replayed_share"] == pytest.approx(3 / 5)
    assert text.figures() == {}


# --- going on ---


def test_a_run_stopped_while_it_writes_goes_on_bit_for_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replay, a second text, accumulation, a log line over several steps; the signal comes between two tokens."""
    common = {**SMALL, "generated_share": 0.7, "replay": 8, "accumulate": 2, "log_every": 3, "seed": 3, "steps": 7,
              "lm_data": str(place / "data"), "lm_weight": 0.5}  # fmt: skip
    distill(config(place, tmp_path / "whole", **common), progress=False)
    rows = steps(tmp_path / "whole")
    assert any(0 < row["replayed_share"] < 1 for row in rows)
    assert any(0 < row["generated_share"] < 1 for row in rows)
    plain = Writer.write
    for stop in (1, 4):

        def write(self: Any, step: int, *rest: Any, at: int = stop) -> Any:
            if step >= at:
                signal.raise_signal(signal.SIGTERM)
            return plain(self, step, *rest)

        output = tmp_path / f"cut-{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "write", write)
            with pytest.raises(Interrupted, match="SIGTERM"):
                distill(config(place, output, **common), progress=False)
        torch.manual_seed(99)
        distill(config(place, output, resume=True, **common), progress=False)
        assert lines(output) == lines(tmp_path / "whole")
        ours, theirs = weights(output), weights(tmp_path / "whole")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- second text, prompts of a file ---


def test_the_second_text_adds_its_cross_entropy(place: Path, tmp_path: Path) -> None:
    common = {**SMALL, "steps": 1, "lr": 1e-9, "accumulate": 2, "lm_data": str(place / "data" / "prose")}
    result = distill(config(place, tmp_path / "run", lm_weight=0.25, **common), progress=False)
    setup = build(config(place, tmp_path / "x", **common))
    assert setup.language is not None
    order = data.BlockOrder({k: len(v) for k, v in setup.language.train.items()}, "proportional", 0)
    batch = data.batch_of(setup.language, order, 0, 4, torch.device("cpu"))
    with torch.no_grad():
        z = setup.objective.student.eval()(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    nll = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten())
    row = steps(result.output)[0]
    assert row["lm_nll"] == pytest.approx(float(nll), rel=1e-4)
    assert row["loss"] == pytest.approx(row["divergence"] + 0.25 * float(nll), rel=1e-4)


def test_prompts_of_a_file(place: Path, tmp_path: Path, words: Any) -> None:
    """Generated steps begin with a prompt, the others are the answers, on which alone the loss lies."""
    pairs = [("the river", "ran under old bridges"), ("def return", "import class self"), ("alpha", "beta " * 40)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    options = config(place, tmp_path / "run", prompts=str(path), **{**SMALL, "generated_share": 0.5})
    text, _ = text_of(options)
    prompts = [words(p)["input_ids"] for p, _ in pairs]
    answers = [words(r)["input_ids"] + [words.eos_token_id] for _, r in pairs]
    kinds = set()
    for step in range(8):
        (batch,), generated = text.batches(step, lambda: False)
        kinds.add(generated)
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            which = next(i for i, p in enumerate(prompts) if ids[: len(p)] == p)
            size = len(prompts[which])
            answer = [label for label in labels[size:] if label != -100]
            assert labels[:size] == [-100] * size
            assert ids[size : size + len(answer)] == answer
            if not generated:
                assert answer == answers[which][: options.block_size - size]
    assert kinds == {True, False}
    (tmp_path / "alone.txt").write_text("the river\n\nalpha beta\n")
    distill(config(place, tmp_path / "alone", prompts=str(tmp_path / "alone.txt"), steps=3, **SMALL), progress=False)
