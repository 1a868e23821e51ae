"""`kd.switch_generate` against a loop without cache, batch and padding; who is run, who speaks, who stops."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import switch_oracle as oracle
import torch
from generation_cases import PROMPTS, STEPS, batch, check, counted, pair, uniforms
from torch import Tensor

import kdkernels as kd

__all__ = ["pair", "uniforms"]  # fixtures

OPEN, CLOSED = {"schedule": "constant", "tau0": -1.0}, {"schedule": "constant", "tau0": 1.0}


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
