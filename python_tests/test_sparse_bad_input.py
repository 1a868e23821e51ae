"""Sparse teachers that do not fit the call: errors that say what to do, and NaN rows where values are not looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_sparse import draw, keep

import kdkernels as kd

Z = torch.zeros(2, 9)
KEPT = keep(torch.arange(18.0).view(2, 9), 3)


def spoiled(ids: list[int]) -> kd.SparseLogits:
    return dataclasses.replace(KEPT, ids=torch.tensor([[0, 1, 2], ids], dtype=torch.int32))


BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "temperature": (lambda: kd.distillation_loss(Z, KEPT, temperature=2.0), ("2.0", "1.0", "at_temperature")),
    "sampled on top-k": (
        lambda: kd.distillation_loss(Z, KEPT, sparse_mode="sampled"), ("sparse_mode = 'sampled'", "topk", "samples="),
    ),
    "ghost on draws": (
        lambda: kd.distillation_loss(Z, draw(Z, 3)), ("sparse_mode = 'ghost'", "'sampled'", "frequencies"),
    ),
    "reverse on draws": (
        lambda: kd.distillation_loss(Z, draw(Z, 3), "reverse_kl", sparse_mode="sampled"), ("forward_kl", "k="),
    ),
    "adaptive": (lambda: kd.distillation_loss(Z, KEPT, "adaptive_kl"), ("adaptive_kl", "separable")),
    "mode without a sparse teacher": (
        lambda: kd.distillation_loss(Z, Z, sparse_mode="truncate"), ("sparse_mode", "leave it out"),
    ),
    "unknown mode": (lambda: kd.distillation_loss(Z, KEPT, sparse_mode="gost"), ("did you mean 'ghost'",)),
    "vocabulary": (lambda: kd.distillation_loss(torch.zeros(2, 8), KEPT), ("student 8, teacher 9", "vocab_size")),
    "rows": (lambda: kd.distillation_loss(torch.zeros(3, 9), KEPT), ("[2, 9]", "[3]")),
    "as a student": (lambda: kd.distillation_loss(KEPT, Z), ("student", "SparseLogits")),  # type: ignore[call-overload]
    "descending": (lambda: kd.distillation_loss(Z, spoiled([5, 4, 6])), ("teacher.ids", "[5, 4, 6]", "row 1", "sort")),
    "twice": (lambda: kd.distillation_loss(Z, spoiled([4, 4, 6])), ("[4, 4, 6]",)),
    "out of range": (lambda: kd.distillation_loss(Z, spoiled([4, 6, 9])), ("[4, 6, 9]", "[0, 9)")),
    "below": (lambda: kd.distillation_loss(Z, spoiled([-2, 6, 8])), ("[-2, 6, 8]",)),
    "after the end": (lambda: kd.distillation_loss(Z, spoiled([4, -1, 8])), ("[4, -1, 8]",)),
    "beyond vocab_size": (lambda: kd.distillation_loss(Z, KEPT, vocab_size=8), ("teacher.ids", "[0, 8)")),
    "gradient": (
        lambda: kd.distillation_loss(Z, dataclasses.replace(KEPT, log_probs=KEPT.log_probs.clone().requires_grad_())),
        ("teacher.log_probs", "detach"),
    ),
    "no entries": (
        lambda: kd.distillation_loss(
            Z, dataclasses.replace(KEPT, ids=KEPT.ids[:, :0], log_probs=KEPT.log_probs[:, :0])
        ),
        ("teacher.ids", "K >= 1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, parts = BAD[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), caught.value


def test_ids_of_rows_that_do_not_count_may_be_anything(backend: str) -> None:
    teacher = spoiled([9, 9, -5])
    loss = kd.distillation_loss(Z, teacher, token_weights=torch.tensor([1.0, 0.0]), backend=backend)
    assert loss.isfinite()


@pytest.mark.parametrize("ids", [[5, 4, 6], [4, 4, 6], [4, 6, 9], [-2, 6, 8], [4, -1, 8], [-1, -1, 4]], ids=str)
def test_kernels_make_malformed_ids_a_nan_row(backend: str, ids: list[int]) -> None:
    """Where the caller may not look at values (a compiled graph), nothing is read out of bounds."""
    teacher = spoiled(ids)
    for dtype in (torch.float32, torch.float64):
        lp, tail = teacher.log_probs.to(dtype), teacher.log_tail.to(dtype)
        arguments = (Z.to(dtype), teacher.ids, lp, tail, torch.ones(2, dtype=dtype), None, None)
        loss, gradient, _ = torch.ops.kdkernels.sparse(
            *arguments, "forward_kl", 0.0, 0.0, 1.0, 9, "ghost", backend, True, True, False
        )
        assert loss.isnan().tolist() == [False, True]
        assert gradient.isnan().all(-1).tolist() == [False, True]
