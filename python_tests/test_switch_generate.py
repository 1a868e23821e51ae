"""`kd.switch_generate` against a loop without cache, batch and padding; who is run, who speaks, who stops."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import switch_oracle as oracle
import tiny_models as tiny
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.switch import left_padded

STEPS = 12
PROMPTS = [[3, 9, 27, 81, 243, 11], [250, 4], [17, 5, 42, 6]]
OPEN, CLOSED = {"schedule": "constant", "tau0": -1.0}, {"schedule": "constant", "tau0": 1.0}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A student and a teacher in float64, far enough apart for the gate to have something to decide."""
    return tiny.llama(2, seed=1).double().eval(), tiny.llama(4, seed=2).double().eval()


@pytest.fixture(scope="module")
def uniforms() -> Tensor:
    return torch.rand(len(PROMPTS), STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def counted(model: Any) -> tuple[Any, list[tuple[int, int]]]:
    """A copy of a model that notes the shape of the ids of every forward pass."""
    model, shapes = copy.deepcopy(model), []
    model.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    return model, shapes


def batch(prompts: list[list[int]] = PROMPTS) -> tuple[Tensor, Tensor]:
    return left_padded(prompts, 0)


def check(out: kd.SwitchOutput, told: list[oracle.Told], measured: bool = True) -> None:
    """A batch against the loop's rows."""
    n = max(len(t.tokens) for t in told)
    assert out.responses.shape == (len(told), n)
    for row, t in enumerate(told):
        assert t.margin > 1e-9, "draw other uniforms: one lies on an edge"
        length = len(t.tokens)
        assert out.lengths[row] == length
        assert out.responses[row, :length].tolist() == t.tokens
        assert out.from_teacher[row, :length].tolist() == t.from_teacher
        assert not out.from_teacher[row, length:].any()
        columns = [(out.student_log_probs, t.student), (out.teacher_log_probs, t.teacher)]
        for found, expected in [(out.jsd, t.jsd), *columns] if measured else []:
            torch.testing.assert_close(
                found[row, :length], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9
            )
            assert found[row, length:].isnan().all()


# --- the definition ---


@pytest.mark.parametrize("gate", ["closed", "open"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"top_k": 20, "top_p": 0.7, "temperature": 1.3}])
def test_a_gate_that_never_moves_is_plain_sampling(
    pair: tuple[Any, Any], uniforms: Tensor, gate: str, sampling: dict[str, Any]
) -> None:
    tau = CLOSED if gate == "closed" else OPEN
    out = kd.switch_generate(
        *pair, *batch(), max_new_tokens=STEPS, uniforms=uniforms, eos_token_id=[], **tau, **sampling
    )
    told = [
        oracle.generate(*pair, prompt, row.tolist(), lambda _: tau["tau0"], **sampling)
        for prompt, row in zip(PROMPTS, uniforms, strict=True)
    ]
    check(out, told, measured=False)
    assert out.from_teacher.all() if gate == "open" else not out.from_teacher.any()
    assert (out.student_forwards, out.teacher_forwards) == ((0, STEPS) if gate == "open" else (STEPS, 0))
    silent = out.student_log_probs if gate == "open" else out.teacher_log_probs
    assert silent.isnan().all()
    assert out.jsd.isnan().all()


def test_the_teacher_speaks_where_the_divergence_exceeds_the_threshold(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    out = kd.switch_generate(
        *pair, *batch(), max_new_tokens=STEPS, uniforms=uniforms, eos_token_id=[], measure="always", decay=0.15
    )
    told = [
        oracle.generate(*pair, prompt, row.tolist(), lambda t: math.exp(-0.15 * t))
        for prompt, row in zip(PROMPTS, uniforms, strict=True)
    ]
    check(out, told)
    assert 0.1 < out.from_teacher.double().mean() < 0.9  # both have spoken
    expected = torch.tensor([math.exp(-0.15 * t) for t in range(STEPS)], dtype=torch.float64)
    torch.testing.assert_close(out.threshold, expected.expand(3, -1), atol=1e-15, rtol=0)
    assert torch.equal(out.from_teacher, out.jsd > out.threshold)
    assert (out.student_forwards, out.teacher_forwards) == (STEPS, STEPS)


def test_greedy_takes_the_most_likely_token_of_whoever_speaks(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    out = kd.switch_generate(
        *pair, *batch(), max_new_tokens=STEPS, do_sample=False, eos_token_id=[], schedule="constant", tau0=0.36
    )
    told = [oracle.generate(*pair, p, [0.5] * STEPS, lambda _: 0.36, sample=False) for p in PROMPTS]
    for t in told:
        t.margin = 1.0  # no draws
    check(out, told)
    assert out.from_teacher.any()
    assert not out.from_teacher.all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_batch_is_its_prompts_one_by_one(pair: tuple[Any, Any], uniforms: Tensor, cache: str) -> None:
    stops = [i for i in range(0, 300, 7)]
    options = {"max_new_tokens": STEPS, "eos_token_id": stops, "schedule": "constant", "tau0": 0.36, "cache": cache}
    whole = kd.switch_generate(*pair, *batch(), uniforms=uniforms, **options)
    assert len(set(whole.lengths.tolist())) > 1
    for row, prompt in enumerate(PROMPTS):
        alone = kd.switch_generate(*pair, torch.tensor([prompt]), uniforms=uniforms[row : row + 1], **options)
        n = int(alone.lengths[0])
        assert n == whole.lengths[row]
        assert torch.equal(alone.responses[0], whole.responses[row, :n])
        for name in ("jsd", "student_log_probs", "teacher_log_probs"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[row, :n], atol=1e-9, rtol=1e-9)


def test_equal_seeds_give_equal_sequences(pair: tuple[Any, Any]) -> None:
    def run(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return kd.switch_generate(*pair, *batch(), max_new_tokens=8, eos_token_id=[], generator=generator).sequences

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(3)
    first = run(None)
    torch.manual_seed(3)
    assert torch.equal(first, run(None))


# --- work that cannot matter ---


def test_what_is_skipped_changes_nothing_and_is_caught_up_at_once(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    def thresholds(step: int, state: Any) -> float:
        return 1.0 if step < 4 or step == 9 else -1.0 if step in (5, 6) else 0.36

    (student, asked_student), (teacher, asked_teacher) = map(counted, pair)
    options = {"max_new_tokens": STEPS, "uniforms": uniforms, "eos_token_id": [], "schedule": thresholds}
    needed = kd.switch_generate(student, teacher, *batch(), **options)
    always = kd.switch_generate(*pair, *batch(), measure="always", **options)
    assert torch.equal(needed.sequences, always.sequences)
    assert torch.equal(needed.from_teacher, always.from_teacher)
    length = max(map(len, PROMPTS))
    # the student reads the prompt, then a token a step; at steps 5 and 6 it is not asked, at 7 it reads three tokens
    assert [n for _, n in asked_student] == [length, 1, 1, 1, 1, 3, 1, 1, 1, 1]
    # the teacher is first asked at step 4: the prompt and four tokens in one pass; step 9 is skipped
    assert [n for _, n in asked_teacher] == [length + 4, 1, 1, 1, 1, 2, 1]
    assert (needed.student_forwards, needed.teacher_forwards) == (len(asked_student), len(asked_teacher))
    unknown = torch.tensor([t < 4 or t == 9 or t in (5, 6) for t in range(STEPS)])
    assert torch.equal(needed.jsd.isnan(), unknown.expand(3, -1))
    torch.testing.assert_close(needed.jsd[:, ~unknown], always.jsd[:, ~unknown], atol=1e-9, rtol=1e-9)
    assert not always.jsd.isnan().any()


def test_a_model_runs_as_soon_as_one_row_needs_it(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    rows = torch.tensor([-1.0, 1.0, 0.36])
    options = {"max_new_tokens": STEPS, "uniforms": uniforms, "eos_token_id": []}
    out = kd.switch_generate(*pair, *batch(), schedule=lambda *_: rows, **options)
    assert (out.student_forwards, out.teacher_forwards) == (STEPS, STEPS)
    for row, tau in enumerate(rows.tolist()):
        alone = kd.switch_generate(*pair, *batch(), schedule="constant", tau0=tau, **options)
        assert torch.equal(out.sequences[row], alone.sequences[row])


# --- the end of a row ---


def test_rows_end_at_a_stop_token_of_either_model(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    options = {"max_new_tokens": STEPS, "uniforms": uniforms, "schedule": "constant", "tau0": 0.36}
    free = kd.switch_generate(*pair, *batch(), eos_token_id=[], **options)
    student, teacher = map(copy.deepcopy, pair)
    student.generation_config.eos_token_id = int(free.responses[0, 3])
    teacher.generation_config.eos_token_id = [int(free.responses[1, 6]), 303]
    student.generation_config.pad_token_id = None
    teacher.generation_config.pad_token_id = 299
    told = [
        oracle.generate(
            *pair, p, u.tolist(), lambda _: 0.36, stops=(int(free.responses[0, 3]), int(free.responses[1, 6]), 303)
        )
        for p, u in zip(PROMPTS, uniforms, strict=True)
    ]
    out = kd.switch_generate(student, teacher, *batch(), **options)
    check(out, told)
    assert len(told[0].tokens) <= 4
    assert len(told[1].tokens) <= 7
    assert out.stopped.tolist() == [len(t.tokens) < STEPS or t.tokens[-1] in (303,) for t in told]
    for row in range(3):
        assert (out.responses[row, out.lengths[row] :] == 299).all()
        assert out.threshold[row, out.lengths[row] :].isnan().all()
    assert out.summary()["tokens"] == int(out.lengths.sum())


def test_rows_that_ended_are_no_longer_computed(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    options = {"max_new_tokens": STEPS, "uniforms": uniforms, "schedule": "constant", "tau0": 0.36}
    free = kd.switch_generate(*pair, *batch(), eos_token_id=[], **options)
    stops = [int(free.responses[0, 1]), int(free.responses[1, 3])]
    (student, asked), (teacher, _) = map(counted, pair)
    out = kd.switch_generate(student, teacher, *batch(), eos_token_id=stops, **options)
    assert sorted({rows for rows, _ in asked}) == [1, 3]  # three rows until two have ended, then the last one alone
    n = int(out.lengths[2])
    assert torch.equal(out.responses[2, :n], free.responses[2, :n])
    torch.testing.assert_close(out.jsd[2, :n], free.jsd[2, :n], atol=1e-9, rtol=1e-9)


def test_generation_stops_when_every_row_has_ended(pair: tuple[Any, Any], uniforms: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    options = {"max_new_tokens": STEPS, "uniforms": uniforms, "progress": lambda *a: seen.append(a)}
    out = kd.switch_generate(*pair, *batch(), eos_token_id=list(range(304)), pad_token_id=0, **options)
    assert out.responses.shape == (3, 1)
    assert out.stopped.all()
    assert seen == [(1, STEPS)]


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
