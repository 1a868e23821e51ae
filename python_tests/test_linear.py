"""LinearLogits on either side against float64: gradients of hidden states, head and bias; what is not computed."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cases import ONE_OF_EACH, linear
from oracle import Logits, check
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence

H, V = 24, 131
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = torch.tensor([3, 0, -100, 128, 7, 7, 64])
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "negative scale": {"scale": -1.5},
    "everything": {"bias": True, "softcap": 4.0, "scale": 1.7},
}


def sides(form: str, rows: int, dtype: torch.dtype, **student: Any) -> tuple[Logits, Logits]:
    """Student and teacher as "linear" (hidden states of different widths) or "logits"."""
    ours, theirs = form.split("/")
    s = linear(rows, H, V, dtype, seed=1, **student)
    t = linear(rows, 2 * H, V, dtype, seed=2, bias=True, softcap=6.0, scale=0.9)
    return (s if ours == "linear" else s.materialize()), (t if theirs == "linear" else t.materialize())


FORMS = ("linear/linear", "linear/logits", "logits/linear")


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=lambda d: d.name)
def test_every_divergence(backend: str, divergence: Divergence, form: str, dtype: torch.dtype) -> None:
    student, teacher = sides(form, 7, dtype)
    for chunk_bytes in (None, 2 * V * dtype.itemsize * 3):  # one chunk; chunks of three, three and one row
        check(student, teacher, divergence, backend=backend, temperature=1.5, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_bias_softcap_and_scale(backend: str, name: str, dtype: torch.dtype) -> None:
    student, teacher = sides("linear/linear", 7, dtype, **TRANSFORMS[name])
    for chunk_bytes in (None, 1):
        for divergence in ("forward_kl", "jsd"):
            check(
                student, teacher, divergence, backend=backend, chunk_bytes=chunk_bytes,
                labels=LABELS, ce_weight=0.5, temperature=2.0, incoming=0.5,
            )  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum", "labels": LABELS, "ce_weight": 0.5},
    "none": {"reduction": "none", "labels": LABELS, "ce_weight": 0.5},
    "weights": {"token_weights": torch.tensor([1.0, 0.0, 2.5, 0.125, 1.0, 3.0, 1.0]), "num_items": 3},
    "padding": {"vocab_size": 120, "labels": LABELS % 120, "ce_weight": 0.3},
    "T squared": {"temperature": 3.0, "temperature_scaling": "t2", "kd_weight": 0.3},
    "cross-entropy only": {"kd_weight": 0.0, "labels": LABELS, "ce_weight": 1.5, "temperature": 3.0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: str, name: str, form: str) -> None:
    per_row = torch.tensor([1.0, 0.5, -2.0, 0.0, 4.0, 1.0, 3.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        student, teacher = sides(form, 7, dtype, bias=True, softcap=5.0)
        incoming = per_row if OPTIONS[name].get("reduction") == "none" else -0.75
        for chunk_bytes in (None, 1):
            check(student, teacher, "jsd", backend=backend, incoming=incoming, chunk_bytes=chunk_bytes, **OPTIONS[name])


@pytest.mark.parametrize("form", FORMS)
def test_padded_heads(backend: str, form: str) -> None:
    """Heads of different padding: no mass and exactly no gradient beyond vocab_size, whatever stands there."""
    ours, theirs = form.split("/")
    student, teacher = linear(5, H, 140, torch.float32, seed=1, bias=True), linear(5, H, 133, torch.float32, seed=2)
    student.weight[V:] = 100.0
    student.bias[V:] = torch.nan  # type: ignore[index]
    teacher.weight[V:] = 100.0
    s = student if ours == "linear" else student.materialize()
    t = teacher if theirs == "linear" else teacher.materialize()
    for reduction, chunk_bytes in (("mean", None), ("mean", 1), ("none", 3000)):
        check(s, t, "jsd", backend=backend, vocab_size=V, reduction=reduction, chunk_bytes=chunk_bytes)
    weight = student.weight.clone().requires_grad_()
    loss = kd.distillation_loss(dataclasses.replace(student, weight=weight), t, backend=backend, vocab_size=V)
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad[V:], torch.zeros(140 - V, H))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_few_rows(backend: str, form: str, rows: int) -> None:
    for reduction in ("mean", "none"):
        student, teacher = sides(form, rows, torch.float32, bias=True)
        check(student, teacher, "reverse_kl", backend=backend, reduction=reduction)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_leading_dimensions_and_shift(backend: str, form: str, reduction: str) -> None:
    student, teacher = sides(form, 12, torch.float32, bias=True)
    labels = (torch.arange(12) * 7 % V).masked_fill(torch.arange(12) % 5 == 3, -100)
    for leading in ((2, 6), (2, 3, 2)):
        s, t = (_reshaped(x, leading) for x in (student, teacher))
        options = {"labels": labels.reshape(leading), "ce_weight": 0.5, "reduction": reduction, "shift": True}
        for chunk_bytes in (None, 3000):
            check(s, t, "jsd", backend=backend, chunk_bytes=chunk_bytes, **options)


def _reshaped(x: Logits, leading: tuple[int, ...]) -> Logits:
    if isinstance(x, Tensor):
        return x.reshape(*leading, x.shape[-1])
    return dataclasses.replace(x, hidden=x.hidden.reshape(*leading, x.hidden.shape[-1]))


@pytest.mark.parametrize("layout", ["batch second", "wide rows", "transposed head", "every second entry"])
def test_strides(backend: str, layout: str) -> None:
    student, teacher = sides("linear/linear", 6, torch.float32, bias=True)
    assert isinstance(student, kd.LinearLogits)
    assert isinstance(teacher, kd.LinearLogits)
    hidden, weight = student.hidden.reshape(2, 3, H), student.weight
    if layout == "batch second":
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "wide rows":
        hidden = torch.cat((hidden, torch.full((2, 3, 5), torch.nan)), -1)[..., :H]
        weight = torch.cat((weight, torch.full((V, 5), torch.nan)), -1)[:, :H]
    elif layout == "transposed head":
        weight = weight.t().contiguous().t()
    else:
        hidden = torch.stack((hidden, hidden * torch.nan), -1)[..., 0]
    s = dataclasses.replace(student, hidden=hidden, weight=weight)
    t = dataclasses.replace(teacher, hidden=teacher.hidden.reshape(2, 3, -1))
    for reduction in ("mean", "none"):
        check(s, t, "jsd", backend=backend, reduction=reduction, chunk_bytes=3000)


@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_rows_that_do_not_count_may_hold_anything(backend: str, chunk_bytes: int | None) -> None:
    """They leave no trace in the head's gradient, where 0 * NaN would."""
    student, teacher = sides("linear/linear", 7, torch.float32, bias=True)
    assert isinstance(student, kd.LinearLogits)
    assert isinstance(teacher, kd.LinearLogits)
    student.hidden[2], teacher.hidden[2] = torch.nan, torch.inf  # LABELS[2] is ignored
    for reduction in ("mean", "none"):
        check(
            student, teacher, "jsd", backend=backend, labels=LABELS, ce_weight=0.5,
            reduction=reduction, chunk_bytes=chunk_bytes,
        )  # fmt: skip


def test_a_broken_row_is_nan_and_alone(backend: str) -> None:
    """Its own loss and hidden gradient; a head's gradient is a sum over rows and is lost."""
    student, teacher = sides("linear/linear", 7, torch.float32)
    assert isinstance(student, kd.LinearLogits)
    assert isinstance(teacher, kd.LinearLogits)
    student.hidden[1, 3] = torch.nan
    teacher.hidden[4] = torch.inf
    for chunk_bytes in (None, 1):
        for reduction in ("none", "sum"):
            check(
                student, teacher, "jsd", backend=backend, need=("hidden",), reduction=reduction, chunk_bytes=chunk_bytes
            )


def test_masked_vocabulary_through_the_bias(backend: str) -> None:
    """-inf in a head's bias masks an entry; on both sides it costs nothing."""
    for dtype, scale in itertools.product(DTYPES, (None, 0.5)):
        student, teacher = linear(7, H, V, dtype, 1, bias=True, scale=scale), linear(7, 2 * H, V, dtype, 2, bias=True)
        for side in (student, teacher):
            assert side.bias is not None
            side.bias[10:20] = -torch.inf
        for divergence in ONE_OF_EACH:
            check(student, teacher, divergence, backend=backend, labels=LABELS, ce_weight=0.5, temperature=2.0)


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
WIDTH = {"student": 24, "teacher": 40}


def multiplications(need: tuple[str, ...], rows: int, labels: Tensor | None = None, **options: Any) -> float:
    """Of all GEMMs of one call forward and backward, in products of [rows, H] and [H, V] (the teacher's: 40 / 24)."""
    student, teacher = (linear(rows, WIDTH[name], V, torch.float32, bias=True) for name in WIDTH)
    parts = {name: getattr(student, name).clone().requires_grad_(name in need) for name in ("hidden", "weight", "bias")}
    with torch.profiler.profile(record_shapes=True) as profile:
        loss = kd.distillation_loss(dataclasses.replace(student, **parts), teacher, labels=labels, **options)
        if need:
            loss.sum().backward()
    total = 0
    for event in profile.events():
        if event.name in PRODUCTS:
            shapes = [s for s in event.input_shapes if len(s) >= 2]
            left, right = shapes[-2:]
            total += left[0] * left[1] * (right[0] if event.name.startswith("mkldnn") else right[1])
    return total / (rows * V * WIDTH["student"])


FORWARD = 1 + 40 / 24


@pytest.mark.parametrize("chunk_bytes", [None, 2 * 4 * V * 2])
def test_what_is_frozen_costs_no_gemm(backend: str, chunk_bytes: int | None) -> None:
    """One product makes each side's logits; each gradient is one more, and only where it is wanted."""
    options = {"backend": backend, "chunk_bytes": chunk_bytes}
    assert multiplications(("hidden", "weight", "bias"), 8, **options) == pytest.approx(FORWARD + 2)
    assert multiplications(("hidden",), 8, **options) == pytest.approx(FORWARD + 1)
    assert multiplications(("weight",), 8, **options) == pytest.approx(FORWARD + 1)
    assert multiplications(("bias",), 8, **options) == pytest.approx(FORWARD)
    assert multiplications((), 8, **options) == pytest.approx(FORWARD)


def test_tokens_that_do_not_count_cost_no_gemm(backend: str) -> None:
    labels = torch.tensor([1, -100, -100, 2, -100, 3, -100, -100])
    need = ("hidden", "weight")
    assert multiplications(need, 8, labels, backend=backend) == pytest.approx(3 / 8 * (FORWARD + 2))
    assert multiplications(need, 8, torch.full((8,), -100), backend=backend) == 0


def test_reduction_none_computes_gradients_in_backward(backend: str) -> None:
    """Forward: logits only; backward: logits again, then the gradients that are wanted."""
    options = {"backend": backend, "reduction": "none"}
    assert multiplications((), 8, **options) == pytest.approx(FORWARD)
    assert multiplications(("hidden",), 8, **options) == pytest.approx(2 * FORWARD + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sums_keep_their_digits(backend: str, dtype: torch.dtype) -> None:
    """512 chunks of one row each: summed in float32, the head's gradient is as good as from one chunk."""
    student, teacher = linear(512, 6, 7, dtype, 1, bias=True), linear(512, 9, 7, dtype, 2)
    for reduction in ("sum", "none"):
        check(student, teacher, "jsd", backend=backend, reduction=reduction, chunk_bytes=1)
        check(student, teacher, "jsd", backend=backend, reduction=reduction)


def test_tied_embeddings_add_up(backend: str) -> None:
    """One matrix as embedding and as head receives both gradients."""
    student, teacher = sides("linear/linear", 7, torch.float32)
    assert isinstance(student, kd.LinearLogits)
    tied = student.weight.clone().requires_grad_()
    ids = torch.tensor([1, 5, 5, 9, 130, 0, 2])

    def run(make: Any) -> Tensor:
        logits = make(torch.nn.functional.embedding(ids, tied).tanh(), tied)
        return torch.autograd.grad(kd.distillation_loss(logits, teacher, backend=backend), tied)[0]

    fused, plain = run(kd.LinearLogits), run(torch.nn.functional.linear)
    assert (fused - plain).norm() <= 1e-5 * plain.norm()


def test_the_teachers_head_is_a_constant(backend: str) -> None:
    student, teacher = sides("linear/linear", 7, torch.float32)
    assert isinstance(student, kd.LinearLogits)
    assert isinstance(teacher, kd.LinearLogits)
    head = teacher.weight.clone().requires_grad_()
    hidden = student.hidden.clone().requires_grad_()
    s, t = dataclasses.replace(student, hidden=hidden), dataclasses.replace(teacher, weight=head)
    for reduction in ("mean", "none"):
        loss = kd.distillation_loss(s, t, reduction=reduction, backend=backend).sum()
        assert torch.autograd.grad(loss, (hidden, head), allow_unused=True)[1] is None
    assert not kd.distillation_loss(student, t, backend=backend).requires_grad
