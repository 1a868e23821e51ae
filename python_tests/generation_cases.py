"""What the tests of `kdkernels.switch_generate` share: a pair of tiny models, prompts, uniform numbers."""

from __future__ import annotations

import copy
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
