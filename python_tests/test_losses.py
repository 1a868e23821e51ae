"""Loss, statistics and gradients of logits against float64: every divergence, dtype, kind of row, shape and option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, KINDS, ONE_OF_EACH, TEMPERATURES, pair
from oracle import check
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
