"""`kd.DistillationLoss`: the function with its options held."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import pair
from torch import Tensor

import kdkernels as kd

LABELS = torch.tensor([[3, 0, -100], [10, 7, 7]])


def small(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(z.reshape(2, 3, 11) for z in pair("ordinary", 6, 11, dtype))  # type: ignore[return-value]


def module(backend: str) -> kd.DistillationLoss:
    return kd.DistillationLoss(kd.JSD(beta=0.3), temperature=2.0, ce_weight=0.5, shift=True, backend=backend)


def test_the_module_is_the_function(backend: str) -> None:
    student, teacher = small(torch.float32)
    options = {"temperature": 2.0, "ce_weight": 0.5, "shift": True, "backend": backend, "labels": LABELS}
    weights = torch.tensor([[1.0, 0.5, 2.0]] * 2)
    expected = kd.distillation_loss(
        student, teacher, kd.JSD(beta=0.3), token_weights=weights, num_items=7, **options
    )  # fmt: skip
    assert torch.equal(module(backend)(student, teacher, LABELS, token_weights=weights, num_items=7), expected)
    assert "JSD(beta=0.3)" in repr(module(backend))
    assert "temperature=2.0" in repr(module(backend))
    assert not list(module(backend).parameters())
    assert not module(backend).state_dict()
    by_name = kd.DistillationLoss("reverse_kl", reduction="none", return_stats=True)
    output = by_name(student, teacher)
    assert isinstance(output, kd.DistillationOutput)
    assert output.loss.shape == (2, 3)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_the_module_can_be_copied(backend: str, duplicate: Callable[[Any], Any]) -> None:
    student, teacher = small(torch.float32)
    original = module(backend)
    same = duplicate(original)
    assert same.divergence == original.divergence
    assert torch.equal(same(student, teacher, LABELS), original(student, teacher, LABELS))
    assert repr(same) == repr(original)
