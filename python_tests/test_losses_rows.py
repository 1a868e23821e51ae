"""Logits: rows that are broken or do not count, padding, in place, statistics, losses near convergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ONE_OF_EACH, pair
from oracle import Call, check, compare_gradients, side
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=lambda d: d.name)
def test_a_broken_row_is_nan_and_alone(backend: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """NaN, +inf, nothing but -inf: that row's loss, gradient and statistics are NaN, the others keep every bit."""
    student, teacher = pair("masked", 9, 131, dtype)
    clean = rows_of(student, teacher, divergence, backend)
    for broken in (student, teacher):
        broken[1 if broken is student else 2, 130] = torch.nan
        broken[3 if broken is student else 4, 0] = torch.inf
        broken[5 if broken is student else 6] = -torch.inf
    check(student, teacher, divergence, backend=backend, reduction="none")
    broken_rows = rows_of(student, teacher, divergence, backend)
    good = [0, 7, 8]
    for before, after in zip(clean, broken_rows, strict=True):
        assert torch.equal(before[good], after[good])
        assert after[1:7].isnan().all()


def rows_of(
    student: Tensor, teacher: Tensor, divergence: Divergence, backend: str, **options: Any
) -> tuple[Tensor, ...]:
    """Loss, gradient and statistics of every row."""
    leaf = student.clone().requires_grad_()
    loss, stats = kd.distillation_loss(
        leaf, teacher, divergence, backend=backend, reduction="none", return_stats=True, **options
    )
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, torch.stack(stats[:-3], -1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_count_may_hold_anything(backend: str, dtype: torch.dtype, inplace: bool) -> None:
    """Padding rows of NaN and infinity: exact zeros, and no trace in the mean."""
    student, teacher = pair("ordinary", 6, 129, dtype)
    labels = torch.tensor([1, -100, 3, -100, 128, 6])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    student[1], teacher[1], student[2, 5], teacher[3, 0] = torch.nan, torch.inf, torch.inf, torch.nan
    for divergence in ONE_OF_EACH:
        leaf = student.clone().requires_grad_()
        logits = leaf.clone() if inplace else leaf
        options = {"labels": labels, "token_weights": weights, "ce_weight": 0.5, "inplace": inplace}
        loss = kd.distillation_loss(logits, teacher, divergence, backend=backend, **options)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad[1:4], torch.zeros_like(leaf.grad[1:4]))
        check(student, teacher, divergence, backend=backend, **options)


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padded", ["student", "teacher", "both"])
def test_padding_of_the_vocabulary(backend: str, padded: str, dtype: torch.dtype) -> None:
    """Columns beyond vocab_size have no mass and a gradient of exactly zero, whatever they hold."""
    student, teacher = pair("ordinary", 5, 144, dtype)
    vocab = 130
    if padded != "student":
        student = student[:, :vocab].contiguous() if padded == "teacher" else student
    if padded == "student":
        teacher = teacher[:, :137].contiguous()
    for z in (student, teacher):
        z[:, vocab:] = 50.0  # would take all the mass
    for divergence in ONE_OF_EACH:
        check(student, teacher, divergence, backend=backend, vocab_size=vocab)
        results = []
        for filling in (50.0, torch.nan, -torch.inf):
            for z in (student, teacher):
                z[:, vocab:] = filling
            results.append(rows_of(student, teacher, divergence, backend, vocab_size=vocab))
            gradient = results[-1][1]
            assert torch.equal(gradient[:, vocab:], torch.zeros_like(gradient[:, vocab:]))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_in_place_is_the_same_gradient_in_the_students_memory(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        student, teacher = pair("ordinary", 4, 129, dtype)
        for divergence in ONE_OF_EACH:
            plain = student.clone().requires_grad_()
            kd.distillation_loss(plain, teacher, divergence, reduction="sum", backend=backend).backward()
            leaf = student.clone().requires_grad_()
            logits = leaf.clone()
            loss = kd.distillation_loss(logits, teacher, divergence, reduction="sum", backend=backend, inplace=True)
            assert plain.grad is not None
            assert torch.equal(logits.detach(), plain.grad)
            loss.backward()
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, plain.grad)


def test_in_place_with_padding_and_strided_rows(backend: str) -> None:
    student, teacher = pair("ordinary", 4, 150, torch.float32)
    leaf = student.clone().requires_grad_()
    storage = leaf.clone()
    logits = storage[:, :140]
    loss = kd.distillation_loss(logits, teacher[:, :133], "jsd", backend=backend, vocab_size=133, inplace=True)
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[:, 133:], torch.zeros(4, 17))
    assert torch.equal(storage.detach()[:, 140:], student[:, 140:])  # beyond the student's columns nothing is written
    plain = student[:, :140].clone().requires_grad_()
    kd.distillation_loss(plain, teacher[:, :133], "jsd", backend=backend, vocab_size=133).backward()
    assert plain.grad is not None
    assert torch.equal(leaf.grad[:, :140], plain.grad)


def test_in_place_beside_another_use_of_the_logits_is_an_error(backend: str) -> None:
    """Autograd's version counter tells whoever needs the overwritten logits."""
    leaf = torch.randn(4, 11, requires_grad=True)
    logits = leaf.exp()  # needs its own result in backward
    loss = kd.distillation_loss(logits, torch.randn(4, 11), backend=backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_without_gradient_leaves_the_logits_alone(backend: str) -> None:
    student, teacher = pair("ordinary", 4, 11, torch.float32)
    before = student.clone()
    kd.distillation_loss(student, teacher, backend=backend, inplace=True)
    with torch.no_grad():
        kd.distillation_loss((student * 1).requires_grad_(), teacher, backend=backend, inplace=True)
    assert torch.equal(student, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_statistics_are_of_the_logits_not_of_their_gradient(backend: str, dtype: torch.dtype, inplace: bool) -> None:
    """Where the gradient overwrites the logits, agreement and accuracy are taken before; here both are 1 somewhere."""
    student, teacher = pair("near", 7, 129, dtype)
    labels = student.argmax(-1)
    labels[0] = (labels[0] + 1) % 129
    for divergence in ONE_OF_EACH:
        check(student, teacher, divergence, backend=backend, inplace=inplace, labels=labels, ce_weight=0.5)
        check(student, teacher, divergence, backend=backend, inplace=inplace, labels=labels, temperature=2.0)


def test_top1_ties_go_to_the_lower_id(backend: str) -> None:
    student = torch.zeros(3, 40)
    teacher = torch.zeros(3, 40)
    student[0, [17, 33]], teacher[0, [17, 20]] = 5.0, 3.0
    student[1, [17, 33]], teacher[1, [16, 33]] = 5.0, 3.0
    stats = kd.distillation_loss(
        student, teacher, labels=torch.tensor([17, 33, 0]), backend=backend, return_stats=True
    ).stats  # fmt: skip
    assert stats.top1_agreement.tolist() == [1, 0, 1]
    assert stats.accuracy.tolist() == [1, 0, 1]


@pytest.mark.parametrize("gap", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=lambda d: d.name)
def test_near_convergence_the_loss_keeps_three_digits(backend: str, divergence: Divergence, gap: float) -> None:
    """KL of 1e-8 to 1e-4 nats: relative error, where max(1, D) would accept 0."""
    generator = torch.Generator().manual_seed(1)
    teacher = 3 * torch.randn(8, 1024, generator=generator)
    student = teacher + gap * torch.randn(8, 1024, generator=generator)
    call = Call(student, teacher, divergence, {"reduction": "none"})
    truth = call.golden(side(student), side(teacher)).loss
    loss = kd.distillation_loss(student, teacher, divergence, backend=backend, reduction="none").double()
    relative = ((loss - truth) / truth).abs().max()
    assert truth.min() > 0
    assert relative < (1e-3 if gap > 1e-4 else 1e-2), relative


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "halved": lambda g: g / 2,
    "another sign": torch.neg,
    "one in a thousand too large": lambda g: 1.001 * g,
    "a constant too much": lambda g: g + 1e-4 * g.abs().max(),
    "one entry missing": lambda g: g.scatter(-1, g.abs().argmax(-1, keepdim=True), 0.0),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_tolerance_fails_wrong_gradients(reduction: str, how: str) -> None:
    """Gradients of a mean over 4096 tokens and 1000 entries are near 1e-7; absolute tolerances accept zeros there."""
    student, teacher = pair("ordinary", 64, 1000, torch.float32)
    options = {"reduction": reduction} | ({"num_items": 4096} if reduction == "mean" else {})
    for divergence in ONE_OF_EACH:
        call = Call(student, teacher, divergence, options)
        rows = call.golden(side(student), side(teacher))
        compare_gradients({"logits": rows.grad.float()}, rows, call)
        with pytest.raises(AssertionError, match="gradient of logits"):
            compare_gradients({"logits": SPOILED[how](rows.grad).float()}, rows, call)
