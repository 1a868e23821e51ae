"""Labels, weights, shift, reduction and num_items become two weights per row; statistics say which rows count."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cases import pair
from hypothesis import given, settings
from oracle import Call, check

import kdkernels as kd
from kdkernels.weights import RowWeights, TokenOptions, row_weights

VOCAB = 9


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Leading shape and the options that speak about tokens."""
    leading = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    n = torch.Size(leading).numel()
    options: dict[str, Any] = {"ignore_index": draw(st.sampled_from([-100, 0, 5]))}
    if draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, VOCAB - 1) | st.just(options["ignore_index"]), min_size=n, max_size=n))
        options["labels"] = torch.tensor(ids, dtype=torch.int64).reshape(leading)
        options["ce_weight"] = draw(st.sampled_from([0.0, 0.5]))
    if draw(st.booleans()):
        weights = draw(st.lists(st.sampled_from([0.0, 1.0, 0.125, 3.0]), min_size=n, max_size=n))
        options["token_weights"] = torch.tensor(weights).reshape(leading)
    options["shift"] = bool(leading) and draw(st.booleans())
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if options["reduction"] == "mean":
        options["num_items"] = draw(st.sampled_from([None, 7, 2.5, torch.tensor(3)]))
    options["kd_weight"] = draw(st.sampled_from([0.0, 1.0, 0.3]))
    options["temperature"], options["temperature_scaling"] = 3.0, draw(st.sampled_from(["none", "t2"]))
    return {"leading": leading, **options}


def made(
    leading: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, divide_last: bool
) -> tuple[RowWeights, torch.Tensor]:
    scaling = 9.0 if options["temperature_scaling"] == "t2" else 1.0
    told = TokenOptions(
        options.get("labels"), options.get("token_weights"), options["shift"], options["ignore_index"],
        options["kd_weight"], options.get("ce_weight", 0.0), options["reduction"], options.get("num_items"), scaling,
        divide_last,
    )  # fmt: skip
    weights, counted, divisor = row_weights(told, torch.Size(leading), torch.device("cpu"), dtype, VOCAB)
    assert (divisor is not None) == (divide_last and options["reduction"] == "mean")
    if divisor is not None:
        weights = weights._replace(kd=weights.kd / divisor, ce=None if weights.ce is None else weights.ce / divisor)
    return weights, counted


@settings(max_examples=150)
@given(calls())
def test_token_by_token(call: dict[str, Any]) -> None:
    leading = call.pop("leading")
    logits = torch.zeros(*leading, VOCAB)
    w_kd, w_ce, labels, counted = Call(logits, logits, kd.ForwardKL(), call).weights()
    for dtype, digits, last in ((torch.float64, 1e-15, False), (torch.float32, 1e-6, True)):
        weights, counts = made(leading, call, dtype, last)
        assert torch.equal(counts, counted)
        assert weights.kd.dtype == dtype
        assert torch.allclose(weights.kd.double(), w_kd, rtol=digits, atol=0)
        if call.get("ce_weight"):
            assert weights.ce is not None
            assert torch.allclose(weights.ce.double(), w_ce, rtol=digits, atol=0)
        else:
            assert weights.ce is None
        if "labels" in call:
            assert weights.labels is not None
            assert weights.labels.dtype == torch.int64
            assert torch.equal(weights.labels[counted], labels[counted])
        else:
            assert weights.labels is None


def test_the_mean_is_over_tokens_not_weights(backend: str) -> None:
    student, teacher = pair("ordinary", 4, VOCAB, torch.float32)
    single = kd.distillation_loss(student, teacher, reduction="none", backend=backend)
    weights = torch.tensor([4.0, 0.0, 1.0, 1.0])
    loss = kd.distillation_loss(student, teacher, token_weights=weights, backend=backend)
    torch.testing.assert_close(loss, (weights * single).sum() / 3)


def test_shift_is_the_usual_slicing(backend: str) -> None:
    """What every training loop writes: logits[:, :-1] against labels[:, 1:]."""
    student, teacher = (z.view(2, 5, VOCAB) for z in pair("ordinary", 10, VOCAB, torch.float32))
    labels = torch.tensor([[1, 2, -100, 3, 4], [5, -100, 6, 7, 8]])
    weights = torch.rand(2, 5)
    options: dict[str, Any] = {"ce_weight": 0.5, "temperature": 2.0, "backend": backend}
    for reduction in ("mean", "none"):
        shifted = kd.distillation_loss(
            student, teacher, labels=labels, token_weights=weights, shift=True, reduction=reduction, **options
        )
        sliced = kd.distillation_loss(
            student[:, :-1], teacher[:, :-1], labels=labels[:, 1:], token_weights=weights[:, 1:], reduction=reduction,
            **options,
        )  # fmt: skip
        assert torch.equal(shifted, sliced)


def test_shift_without_labels_drops_the_last_position(backend: str) -> None:
    student, teacher = (z.view(2, 5, VOCAB) for z in pair("ordinary", 10, VOCAB, torch.float32))
    student[:, -1] = torch.nan
    for reduction in ("mean", "sum", "none"):
        check(student, teacher, "jsd", shift=True, reduction=reduction, backend=backend)


@pytest.mark.parametrize("options", [{}, {"labels": torch.tensor([[1, -100, 2], [3, 4, 5]]), "shift": True}])
def test_statistics_are_detached_and_of_the_leading_shape(backend: str, options: dict[str, Any]) -> None:
    student, teacher = (z.view(2, 3, VOCAB) for z in pair("ordinary", 6, VOCAB, torch.float32))
    leaf = student.clone().requires_grad_()
    output = kd.distillation_loss(leaf, teacher, "jsd", return_stats=True, backend=backend, **options)
    assert isinstance(output, kd.DistillationOutput)
    loss, stats = output
    shape = (2, 2) if options else (2, 3)
    assert stats._fields == (
        "divergence", "teacher_entropy", "student_entropy", "top1_agreement", "nll", "accuracy", "counted",
    )  # fmt: skip
    assert all(x.shape == shape and not x.requires_grad for x in stats)
    assert all(x.dtype == torch.float32 for x in stats[:-1])
    assert stats.counted.dtype == torch.bool
    assert all((x[~stats.counted] == 0).all() for x in stats[:-1])
    torch.testing.assert_close(stats.divergence.sum() / stats.counted.sum(), loss.detach())
    if not options:
        assert not stats.nll.any()
        assert not stats.accuracy.any()
    plain = kd.distillation_loss(leaf, teacher, "jsd", backend=backend, **options)
    assert torch.equal(plain, loss)  # asking for statistics changes no bit of the loss
    assert torch.equal(torch.autograd.grad(plain, leaf)[0], torch.autograd.grad(loss, leaf)[0])


def test_statistics_do_not_depend_on_weights_and_reduction(backend: str) -> None:
    student, teacher = pair("ordinary", 6, VOCAB, torch.float32)
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    plain = kd.distillation_loss(student, teacher, "jsd", labels=labels, return_stats=True, backend=backend).stats
    weighted = kd.distillation_loss(
        student, teacher, "jsd", labels=labels, ce_weight=3.0, kd_weight=0.1, token_weights=torch.arange(1, 7) / 2,
        reduction="sum", return_stats=True, backend=backend,
    ).stats  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))
