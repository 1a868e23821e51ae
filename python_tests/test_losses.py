"""Loss, statistics and gradients of logits against float64: every divergence, dtype, kind of row, shape and option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, KINDS, ONE_OF_EACH, TEMPERATURES, pair
from oracle import Call, check, compare_gradients, side
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence

LOW_AND_DOUBLE = (torch.bfloat16, torch.float16, torch.float64)


def is_exempt(divergence: Divergence, kind: str) -> bool:
    """Corners that no definition covers."""
    if divergence == kd.AlphaBeta(0.0, 0.0) and kind == "near":
        return True  # its gradient is log q - log p, the rounding of which no natural scale knows
    # the teacher's head ends at an exact tie of its mass with mu
    return kind == "flat" and divergence.name == "adaptive_kl"


@pytest.mark.thin(6)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_float32(backend: str, divergence: Divergence, kind: str) -> None:
    if not is_exempt(divergence, kind):
        student, teacher = pair(kind, 7, 129, torch.float32)
        rest = TEMPERATURES[2:]
        for temperature in (*TEMPERATURES[:2], rest[len(str(divergence) + kind) % len(rest)]):
            check(student, teacher, divergence, backend=backend, temperature=temperature, reduction="none")


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=lambda d: d.name)
def test_finite_logits_are_never_altered(backend: str, divergence: Divergence) -> None:
    """Log-probabilities far below the -1e4 that stands for a mask are themselves."""
    for dtype in (torch.float32, torch.float64):
        student, teacher = (10 * z for z in pair("peaked", 7, 129, dtype))
        check(student, teacher, divergence, backend=backend, temperature=0.05, reduction="none")


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", LOW_AND_DOUBLE, ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=lambda d: d.name)
def test_other_dtypes(backend: str, divergence: Divergence, dtype: torch.dtype) -> None:
    for kind in KINDS:
        if not is_exempt(divergence, kind):
            student, teacher = pair(kind, 3, 67, dtype)
            check(student, teacher, divergence, backend=backend, reduction="none")
            check(student, teacher, divergence, backend=backend, temperature=0.7, reduction="sum")


@pytest.mark.thin(4)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tails(backend: str, vocab: int, rows: int, dtype: torch.dtype) -> None:
    """Vocabularies that no vector width divides, and few rows."""
    labels = torch.arange(rows) * 5 % vocab
    for divergence in ONE_OF_EACH:
        for kind in ("ordinary", "masked_student"):
            student, teacher = pair(kind, rows, vocab, dtype)
            check(student, teacher, divergence, backend=backend, labels=labels, ce_weight=0.5, temperature=2.0)


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [50257, pytest.param(151936, marks=pytest.mark.slow)])
def test_large_vocabularies(backend: str, vocab: int, dtype: torch.dtype) -> None:
    for divergence in ONE_OF_EACH:
        student, teacher = pair("ordinary", 2, vocab, dtype)
        labels = torch.tensor([vocab - 1, 0])
        check(student, teacher, divergence, backend=backend, labels=labels, ce_weight=0.1, temperature=1.5)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "rising": lambda at: 300 * at,
    "falling": lambda at: -300 * at,
    "a spike at the end": lambda at: torch.where(at == 1, 500.0, 0.0),
    "a spike in the middle": lambda at: torch.where((at - 0.45).abs() < 2e-4, 500.0, 0.0),
    "a hole in the middle": lambda at: torch.where((at - 0.45).abs() < 2e-4, -500.0, 0.0),
    "masked at the beginning": lambda at: torch.where(at < 0.5, -torch.inf, 10 * at),
    "masked at the end": lambda at: torch.where(at > 0.3, -torch.inf, 10 * at),
    "steps": lambda at: (at * 4).floor() * 30,
}


@pytest.mark.thin(5)
@pytest.mark.parametrize("student_shape", SHAPES)
def test_the_maximum_moves_along_the_row(backend: str, student_shape: str) -> None:
    """Kernels that go through a row in blocks carry a maximum that later blocks overtake."""
    vocab = 3333
    shapes = (student_shape, "falling") if backend != "eager" else (student_shape,)  # eager has no blocks
    at = torch.linspace(0, 1, vocab, dtype=torch.float64)
    labels = torch.tensor([vocab - 1, vocab // 2, 0])
    for divergence in ONE_OF_EACH:
        for shape in shapes:
            student, teacher = pair("ordinary", 3, vocab, torch.float64)
            student, teacher = student + SHAPES[student_shape](at), teacher + SHAPES[shape](at)
            for dtype, t in ((torch.float32, 1.0), (torch.float32, 4.0), (torch.bfloat16, 0.5)):
                sides = student.to(dtype), teacher.to(dtype)
                check(*sides, divergence, backend=backend, temperature=t, labels=labels, ce_weight=0.5)


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [2048, 2100])
def test_rows_of_several_blocks(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Whole blocks and a rest; labels in each; in place and not, rows that begin anywhere."""
    labels = torch.tensor([5, 1024 + 77, vocab - 1])
    for kind in KINDS[:1] if backend == "eager" else KINDS if vocab == 2100 else KINDS[::3]:
        for divergence in ONE_OF_EACH:
            if is_exempt(divergence, kind):
                continue
            student, teacher = pair(kind, 3, vocab, dtype)
            check(student, teacher, divergence, backend=backend, labels=labels, ce_weight=0.5)
            wide = torch.cat((torch.full((3, 3), torch.nan, dtype=dtype), student), -1)[:, 3:]
            options = {"inplace": True, "reduction": "none", "temperature": 0.7}
            check(wide, teacher, divergence, backend=backend, **options)


LABELS = torch.tensor([3, 0, -100, 128, 7, 7, 64])
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.125, 1.0, 3.0, 1.0])

OPTIONS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"labels": LABELS, "ce_weight": 0.7},
    "cross-entropy at T": {"labels": LABELS, "ce_weight": 0.7, "temperature": 3.0},
    "cross-entropy only": {"labels": LABELS, "ce_weight": 2.0, "kd_weight": 0.0, "temperature": 3.0},
    "labels only say what counts": {"labels": LABELS},
    "T squared": {"temperature": 4.0, "temperature_scaling": "t2", "labels": LABELS, "ce_weight": 1.0},
    "kd_weight": {"kd_weight": 0.25},
    "token weights": {"token_weights": WEIGHTS, "labels": LABELS, "ce_weight": 0.5},
    "bool token weights": {"token_weights": WEIGHTS > 0.5},
    "float64 token weights": {"token_weights": WEIGHTS.double()},
    "ignore_index": {"labels": LABELS.masked_fill(LABELS == -100, 1), "ignore_index": 7, "ce_weight": 0.5},
    "int32 labels": {"labels": LABELS.int(), "ce_weight": 0.5},
    "sum": {"reduction": "sum", "labels": LABELS, "ce_weight": 0.5, "token_weights": WEIGHTS},
    "none": {"reduction": "none", "labels": LABELS, "ce_weight": 0.5, "token_weights": WEIGHTS},
    "num_items int": {"num_items": 1000, "labels": LABELS, "token_weights": WEIGHTS},
    "num_items float": {"num_items": 0.5},
    "num_items tensor": {"num_items": torch.tensor(13), "labels": LABELS},
    "vocab_size": {"vocab_size": 100, "labels": LABELS % 100, "ce_weight": 0.5, "ignore_index": 5},
    "all at once": {
        "temperature": 1.3, "temperature_scaling": "t2", "labels": LABELS, "ce_weight": 0.3, "kd_weight": 0.6,
        "token_weights": WEIGHTS, "num_items": 5, "vocab_size": 129,
    },
}  # fmt: skip


@pytest.mark.thin(4)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: str, name: str, dtype: torch.dtype, inplace: bool) -> None:
    student, teacher = pair("ordinary", 7, 129, dtype)
    incoming = torch.tensor([1.0, 0.5, -2.0, 0.0, 4.0, 1.0, 3.0]) if OPTIONS[name].get("reduction") == "none" else 0.5
    for divergence in ("forward_kl", "jsd", "adaptive_kl"):
        for arriving in (1.0, incoming):
            check(
                student, teacher, divergence, backend=backend, incoming=arriving, inplace=inplace, **OPTIONS[name]
            )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 4), (2, 3, 2), (1, 1), (0,), (3, 0)])
def test_leading_dimensions_and_shift(backend: str, leading: tuple[int, ...], reduction: str) -> None:
    """Any leading shape; with shift each sequence loses its last position, and labels and weights move along."""
    rows = torch.Size(leading).numel()
    student, teacher = (z.reshape(*leading, 31) for z in pair("ordinary", rows, 31, torch.float32))
    labels = (torch.arange(rows) * 7 % 31).masked_fill(torch.arange(rows) % 5 == 3, -100).reshape(leading)
    weights = ((torch.arange(rows) + 1) % 4 / 2).reshape(leading)
    for shift in (False, True):
        if shift and (not leading or leading[-1] == 0):
            continue
        options = {"labels": labels, "ce_weight": 0.5, "token_weights": weights, "shift": shift}
        check(student, teacher, "reverse_kl", backend=backend, reduction=reduction, **options)
        check(student, teacher, "jsd", backend=backend, reduction=reduction, shift=shift)


def strided(layout: str) -> tuple[Tensor, Tensor]:
    """Student and teacher [2, 3, 37] of the same numbers however they lie in memory."""
    student, teacher = (z.reshape(2, 3, 37) for z in pair("ordinary", 6, 37, torch.float32))
    if layout == "wide rows":
        return tuple(torch.cat((z, torch.full((2, 3, 11), torch.nan)), -1)[..., :37] for z in (student, teacher))  # type: ignore[return-value]
    if layout == "every second row":
        return tuple(torch.stack((z, z * torch.nan), 2)[:, :, 0] for z in (student, teacher))  # type: ignore[return-value]
    if layout == "batch second":
        return student.transpose(0, 1).contiguous().transpose(0, 1), teacher
    if layout == "vocabulary first":
        return student.permute(2, 0, 1).contiguous().permute(1, 2, 0), teacher
    if layout == "every second entry":
        return torch.stack((student, student * torch.nan), -1)[..., 0], teacher
    if layout == "one teacher for all":
        return student, teacher[:1, :1].expand(2, 3, 37)
    assert layout == "offset"
    return torch.cat((torch.zeros(1), student.flatten()))[1:].view(2, 3, 37), teacher


LAYOUTS = (
    "wide rows", "every second row", "batch second", "vocabulary first", "every second entry", "one teacher for all",
    "offset",
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend: str, layout: str) -> None:
    student, teacher = strided(layout)
    labels = torch.tensor([[1, 2, 3], [4, 5, 36]])
    check(student, teacher, "jsd", backend=backend, labels=labels, ce_weight=0.5, reduction="none")
    check(teacher, student, "forward_kl", backend=backend, labels=labels, shift=True)


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
