"""`kdkernels.switch_generate`: vocabularies, dtypes and devices of the two models; what training takes from it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import switch_oracle as oracle
import tiny_models as tiny
import torch
from generation_cases import PROMPTS, STEPS, batch, check, pair, uniforms
from torch import Tensor

import kdkernels as kd

__all__ = ["pair", "uniforms"]  # fixtures

# --- vocabularies, dtypes, devices ---


def test_padded_heads_share_the_tokens_that_exist(uniforms: Tensor) -> None:
    student = tiny.llama(2, vocab=320, seed=1).double().eval()
    teacher = tiny.llama(3, vocab=304, seed=2).double().eval()
    with torch.no_grad():  # padding that would always be drawn
        student.lm_head.weight[300:] = 100 * student.lm_head.weight[7]
    options = {"max_new_tokens": STEPS, "uniforms": uniforms, "eos_token_id": [], "schedule": "constant", "tau0": 0.36}
    out = kd.switch_generate(student, teacher, *batch(), vocab_size=300, **options)
    told = [
        oracle.generate(student, teacher, p, u.tolist(), lambda _: 0.36, vocab=300)
        for p, u in zip(PROMPTS, uniforms, strict=True)
    ]
    check(out, told)
    words = tiny.tokenizer(300)
    words.add_tokens([f"<|{i}|>" for i in range(300 - len(words))])
    same = kd.switch_generate(student, teacher, *batch(), tokenizer=words, teacher_tokenizer=words, **options)
    assert torch.equal(same.sequences, out.sequences)
    with pytest.raises(ValueError, match="student 320, teacher 304"):
        kd.switch_generate(student, teacher, *batch(), **options)


def test_dtypes_may_differ() -> None:
    student, teacher = tiny.llama(2, seed=1).bfloat16().eval(), tiny.llama(4, seed=2).eval()
    out = kd.switch_generate(student, teacher, *batch(), max_new_tokens=6, eos_token_id=[], measure="always")
    ids, mask = out.sequences, out.attention_mask
    with torch.no_grad():
        logits = teacher(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    expected = logits[:, out.prompt_length - 1 : -1].log_softmax(-1).gather(2, out.responses[..., None])[..., 0]
    torch.testing.assert_close(out.teacher_log_probs.float(), expected, atol=1e-4, rtol=1e-4)
    assert out.sequences.dtype == torch.int64
    assert 0 < float(out.jsd.min()) <= float(out.jsd.max()) <= 1


class Elsewhere:
    """A teacher that is said to be on the meta device: it looks at where its input lies and at its shape alone."""

    def __init__(self, like: Any) -> None:
        self.config, self.generation_config, self.training = like.config, like.generation_config, False
        self.embedding = torch.nn.Embedding(2, 2, device="meta")
        self.seen: list[tuple[str, ...]] = []

    def modules(self) -> list[Any]:
        return [self.embedding]

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> Any:
        self.seen.append(tuple(x.device.type for x in (input_ids, attention_mask, position_ids)))
        logits = torch.linspace(-3, 3, 304, dtype=torch.float64).roll(attention_mask.shape[1])
        found = type("Output", (), {})()
        found.logits, found.past_key_values = logits.expand(len(input_ids), input_ids.shape[1], -1), None
        return found

    __call__ = forward


def test_each_model_is_fed_on_its_own_device(pair: tuple[Any, Any]) -> None:
    teacher = Elsewhere(pair[1])
    out = kd.switch_generate(pair[0], teacher, *batch(), max_new_tokens=5, eos_token_id=[], measure="always", decay=0.9)
    assert teacher.seen == [("meta",) * 3] * 5
    assert out.sequences.device.type == "cpu"
    assert out.from_teacher.any()


@pytest.mark.gpu
def test_the_teacher_may_be_on_a_gpu(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    options = {"max_new_tokens": STEPS, "uniforms": uniforms, "schedule": "constant", "tau0": 0.36, "eos_token_id": []}
    expected = kd.switch_generate(*pair, *batch(), **options)
    for student, teacher in (("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")):
        models = copy.deepcopy(pair[0]).to(student), copy.deepcopy(pair[1]).to(teacher)
        out = kd.switch_generate(*models, *batch(), **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.from_teacher, expected.from_teacher)
        torch.testing.assert_close(out.jsd, expected.jsd, atol=1e-6, rtol=1e-6)


# --- what a training loop takes from it ---


def test_the_output_serves_a_training_step(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    student = copy.deepcopy(pair[0]).train()  # without dropout, train mode changes nothing
    stops = list(range(0, 300, 7))
    out = kd.switch_generate(student, pair[1], *batch(), max_new_tokens=STEPS, uniforms=uniforms, eos_token_id=stops)
    labels = out.labels()
    assert labels.shape == out.sequences.shape == out.attention_mask.shape
    assert int((labels != -100).sum()) == int(out.lengths.sum())
    assert (labels[:, : out.prompt_length] == -100).all()
    assert torch.equal(labels[labels != -100], out.responses[out.response_mask])
    positions = (out.attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": out.sequences, "attention_mask": out.attention_mask, "position_ids": positions}
    with torch.no_grad():
        theirs = pair[1](**inputs).logits
    loss = kd.distillation_loss(student(**inputs).logits, theirs, "skew_reverse_kl", labels=labels, shift=True)
    loss.backward()
    assert float(student.lm_head.weight.grad.abs().max()) > 0


def test_summary_has_the_figures_of_the_batch(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    out = kd.switch_generate(
        *pair, *batch(), max_new_tokens=STEPS, uniforms=uniforms, eos_token_id=list(range(0, 300, 7)), decay=0.3
    )
    found = out.summary()
    told = [
        oracle.generate(*pair, p, u.tolist(), lambda t: math.exp(-0.3 * t), stops=tuple(range(0, 300, 7)))
        for p, u in zip(PROMPTS, uniforms, strict=True)
    ]
    assert found["rows"] == 3
    assert found["tokens"] == sum(len(t.tokens) for t in told)
    assert found["teacher_tokens"] == sum(sum(t.from_teacher) for t in told) > 0
    assert found["teacher_share"] == found["teacher_tokens"] / found["tokens"]
    assert found["student"]["log_likelihood"] == pytest.approx(sum(sum(t.student) for t in told), rel=1e-9)
    assert found["student"]["tokens"] == found["tokens"]
    assert found["teacher"]["log_likelihood"] == pytest.approx(sum(sum(t.teacher[1:]) for t in told), rel=1e-9)
    assert found["teacher"]["tokens"] == found["measured"] == found["tokens"] - 3  # it is not asked at step 0
    known = [j for t in told for j in t.jsd[1:]]
    assert found["mean_jsd"] == pytest.approx(sum(known) / len(known), rel=1e-9)
    by = found["by_position"]
    assert by["rows"] == [sum(len(t.tokens) > i for t in told) for i in range(len(by["rows"]))]
    for i, rows in enumerate(by["rows"]):
        reach = [t for t in told if len(t.tokens) > i]
        assert by["teacher_share"][i] == pytest.approx(sum(t.from_teacher[i] for t in reach) / rows)
        assert by["student_log_prob"][i] == pytest.approx(sum(t.student[i] for t in reach) / rows, rel=1e-9)
        if i:
            ratio = sum(t.teacher[i] - t.student[i] for t in reach) / rows
            assert by["log_likelihood_ratio"][i] == pytest.approx(ratio, rel=1e-9)
    assert by["jsd"][0] is by["teacher_log_prob"][0] is by["log_likelihood_ratio"][0] is None
