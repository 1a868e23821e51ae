"""Sparse teachers through every way of calling: options, fused heads, broken rows, autograd, compile, bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, linear, pair
from oracle_sparse import check_sparse, draw, keep, shorten
from torch import Tensor

import kdkernels as kd
from kdkernels.ops import gemm

pytestmark = pytest.mark.sample(3)

ALL_MODES = ("ghost", "renormalize", "truncate", "sampled")
LABELS = torch.tensor([3, 0, -100, 128, 7, 7])
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum", "labels": LABELS, "ce_weight": 0.5},
    "none": {"reduction": "none", "labels": LABELS, "ce_weight": 0.5},
    "cold label": {"temperature": 2.5, "labels": LABELS, "ce_weight": 0.5, "kd_weight": 0.3},
    "weights": {"token_weights": torch.tensor([1.0, 0.0, 2.5, 0.125, 1.0, 3.0]), "num_items": 3},
    "T squared": {"temperature": 3.0, "temperature_scaling": "t2"},
    "cross-entropy only": {"kd_weight": 0.0, "labels": LABELS, "ce_weight": 1.5},
    "in place": {"inplace": True, "labels": LABELS, "ce_weight": 0.5},
    "num_items tensor": {"num_items": torch.tensor(7.0)},
}


def teacher_for(mode: str, full: Tensor, temperature: float = 1.0, k: int = 12) -> kd.SparseLogits:
    return draw(full, k, temperature) if mode == "sampled" else keep(full, k, temperature)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: str, name: str, mode: str) -> None:
    options = OPTIONS[name]
    for dtype in DTYPES:
        student, full = pair("ordinary", 6, 1300, dtype)
        teacher = teacher_for(mode, full, options.get("temperature", 1.0))
        incoming = torch.tensor([1.0, 0.5, -2.0, 0.0, 4.0, 1.0]) if options.get("reduction") == "none" else -0.75
        check_sparse(student, teacher, mode, backend=backend, incoming=incoming, **options)


@pytest.mark.parametrize("mode", ["ghost", "sampled"])
def test_shift_and_leading_shape(backend: str, mode: str) -> None:
    student, full = (z.view(2, 3, 140) for z in pair("ordinary", 6, 140, torch.float32))
    labels = torch.tensor([[5, 7, -100], [0, 139, 2]])
    for reduction in ("mean", "none"):
        teacher = teacher_for(mode, full)
        check_sparse(
            student, teacher, mode, backend=backend, shift=True, labels=labels, ce_weight=0.5, reduction=reduction
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_rows_and_padding(backend: str, dtype: torch.dtype) -> None:
    """The student a slice of a wider tensor, with columns beyond the vocabulary."""
    student, full = pair("ordinary", 5, 1200, dtype)
    wide = torch.full((5, 1500), 50.0, dtype=dtype)
    wide[:, :1200] = student
    wide[:, 1200:] = torch.nan
    teacher = keep(full, 20)
    for mode in ("ghost", "renormalize", "truncate"):
        check_sparse(wide[:, :1210], teacher, mode, backend=backend, vocab_size=1200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(backend: str, dtype: torch.dtype) -> None:
    for student in (torch.empty(0, 9, dtype=dtype, requires_grad=True), linear(0, 4, 9, dtype)):
        teacher = keep(torch.empty(0, 9, dtype=dtype), 3)
        for mode in ("ghost", "renormalize", "truncate"):
            loss = kd.distillation_loss(student, teacher, sparse_mode=mode, backend=backend)
            assert float(loss) == 0
    no_rows = torch.empty(2, 0, 9, dtype=dtype)
    loss = kd.distillation_loss(no_rows, keep(no_rows, 3), backend=backend, reduction="none")
    assert loss.shape == (2, 0)


def broken(teacher: kd.SparseLogits, how: str) -> kd.SparseLogits:
    """Row 1 spoiled."""
    ids, lp, tail = (x.clone() for x in (teacher.ids, teacher.log_probs, teacher.log_tail))
    if how == "nothing kept":
        ids[1], lp[1], tail[1] = -1, -torch.inf, 0
    elif how == "kept without mass":
        lp[1], tail[1] = -torch.inf, 0
    elif how == "no mass":
        lp[1], tail[1] = -torch.inf, -torch.inf
    elif how == "tail":
        tail[1] = torch.nan
    else:
        lp[1, 2] = torch.nan if how == "nan" else torch.inf
    return dataclasses.replace(teacher, ids=ids, log_probs=lp, log_tail=tail)


@pytest.mark.parametrize("how", ["nan", "inf", "tail", "no mass"])
@pytest.mark.parametrize("mode", ["ghost", "renormalize", "truncate"])
def test_a_broken_teacher_row_is_nan_and_alone(backend: str, mode: str, how: str) -> None:
    for dtype in (torch.float32, torch.float64):
        student, full = pair("ordinary", 3, 1100, dtype)
        clean = keep(full, 6)
        check_sparse(student, broken(clean, how), mode, backend=backend, reduction="none")
        weights = torch.tensor([1.0, 0.0, 1.0])
        check_sparse(student, broken(clean, how), mode, backend=backend, token_weights=weights)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("how", ["nothing kept", "kept without mass"])
def test_a_row_with_all_its_mass_in_the_tail(backend: str, how: str, mode: str) -> None:
    """A distribution where the mode takes the tail: it asks nothing of the student. Else NaN, and alone."""
    for dtype in DTYPES:
        student, full = pair("ordinary", 3, 1100, dtype)
        clean = draw(full, 6) if mode == "sampled" else keep(full, 6)
        teacher, labels = broken(clean, how), torch.tensor([3, 800, 1099])
        leaf = student.clone().requires_grad_()
        output = kd.distillation_loss(
            leaf, teacher, "forward_kl", sparse_mode=mode, backend=backend, reduction="none", return_stats=True
        )
        gradient = torch.autograd.grad(output.loss.sum(), leaf)[0].double()
        assert output.stats.top1_agreement[1].nan_to_num() == 0
        if mode in ("ghost", "truncate") and how == "nothing kept":
            assert output.loss[1].abs() < 1e-6
            assert gradient[1].abs().sum() < 1e-6 < gradient[0].abs().sum()
        elif mode in ("renormalize", "sampled"):
            assert output.loss.isnan().tolist() == [False, True, False]
            assert gradient.isnan().any(-1).tolist() == [False, True, False]
        for divergence in ("forward_kl",) if mode == "sampled" else ("forward_kl", "reverse_kl", "jsd"):
            check_sparse(student, teacher, mode, divergence, backend=backend, reduction="none")
            check_sparse(student, teacher, mode, divergence, backend=backend, labels=labels, ce_weight=0.3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["kept", "tail", "all"])
def test_a_broken_student_row_is_nan_and_alone(backend: str, where: str, value: float) -> None:
    for dtype in DTYPES:
        student, full = pair("ordinary", 3, 1300, dtype)
        teacher = keep(full, 6)
        index = {"kept": teacher.ids[1, 3:4].long(), "tail": teacher.ids[1, 3:4].long() + 1, "all": slice(None)}[where]
        student[1, index] = value
        for mode in ("ghost", "renormalize", "truncate"):
            check_sparse(student, teacher, mode, "jsd", backend=backend, reduction="none")


def test_a_student_masked_on_one_side_of_the_split(backend: str) -> None:
    """All kept entries at -inf, or all others."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        student, full = pair("ordinary", 3, 1300, dtype)
        teacher = keep(full, 6)
        kept = torch.zeros(3, 1300, dtype=torch.bool).scatter(-1, teacher.ids.long(), True)
        for mask in (kept, ~kept):
            side = student.masked_fill(mask, -torch.inf)
            for mode in ("ghost", "renormalize", "truncate"):
                check_sparse(side, teacher, mode, backend=backend, reduction="none")


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fused_heads(backend: str, dtype: torch.dtype, mode: str) -> None:
    """With bias, soft-cap and scale; in chunks; all reductions; rows that do not count."""
    student = linear(6, 24, 131, dtype, seed=1, bias=True, softcap=5.0, scale=0.7)
    teacher = teacher_for(mode, linear(6, 24, 131, torch.float64, seed=2).materialize().to(dtype), 1.5)
    for chunk_bytes in (None, 131 * dtype.itemsize * 3, 1):
        for reduction in ("mean", "none"):
            check_sparse(
                student, teacher, mode, backend=backend, temperature=1.5, chunk_bytes=chunk_bytes, labels=LABELS,
                ce_weight=0.5, reduction=reduction,
            )  # fmt: skip


def test_chunks_do_not_matter(backend: str) -> None:
    student = linear(9, 16, 300, torch.float32)
    teacher = keep(linear(9, 16, 300, torch.float32, seed=3).materialize(), 10)
    losses = [
        kd.distillation_loss(student, teacher, backend=backend, chunk_bytes=c, reduction="none")
        for c in (None, 1, 5000)
    ]
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=2e-6, atol=1e-6)


def test_what_is_frozen_costs_no_gemm(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the teacher, which has no head."""
    calls: list[str] = []
    for name in ("logits_", "input_gradient_", "add_weight_gradient_"):
        inner: Callable[..., None] = getattr(gemm, name)

        def counted(*args: Any, name: str = name, inner: Callable[..., None] = inner) -> None:
            calls.append(name)
            inner(*args)

        monkeypatch.setattr(gemm, name, counted)
    side = linear(5, 8, 40, torch.float32)
    teacher = keep(side.materialize(), 4)
    for need, expected in {
        (): ["logits_"],
        ("hidden",): ["logits_", "input_gradient_"],
        ("weight",): ["logits_", "add_weight_gradient_"],
    }.items():
        calls.clear()
        parts = {n: getattr(side, n).clone().requires_grad_(n in need) for n in ("hidden", "weight")}
        loss = kd.distillation_loss(dataclasses.replace(side, **parts), teacher, backend=backend)
        if need:
            loss.backward()
        assert calls == expected


@pytest.mark.parametrize("mode", ALL_MODES)
def test_gradcheck(backend: str, mode: str) -> None:
    student, full = pair("ordinary", 3, 14, torch.float64)
    teacher = teacher_for(mode, full, 1.3, 5)
    side = linear(3, 4, 14, torch.float64, bias=True)
    divergences = ("forward_kl",) if mode == "sampled" else ("forward_kl", "reverse_kl", "jsd", "skew_kl")
    options = {"sparse_mode": mode, "temperature": 1.3, "labels": torch.tensor([1, -100, 7]), "ce_weight": 0.3}
    for divergence in divergences:
        for reduction in ("mean", "none"):

            def loss(*x: Tensor, divergence: str = divergence, reduction: str = reduction) -> Tensor:
                given = x[0] if len(x) == 1 else kd.LinearLogits(*x, softcap=4.0)
                return kd.distillation_loss(given, teacher, divergence, backend=backend, reduction=reduction, **options)  # type: ignore[call-overload]

            torch.autograd.gradcheck(loss, [student.clone().requires_grad_()], fast_mode=True)
            assert side.bias is not None
            leaves = [x.clone().requires_grad_() for x in (side.hidden, side.weight, side.bias)]
            torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_a_kept_graph_and_a_second_derivative(backend: str) -> None:
    student, full = pair("ordinary", 3, 14, torch.float32)
    student.requires_grad_()
    loss = kd.distillation_loss(student, keep(full, 4), backend=backend) * 2
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    again = torch.autograd.grad(loss, student, create_graph=True)[0]
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="cannot differentiate it again"):
        again.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_and_threads_give_the_same_bits(
    backend: str, threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    student, full = pair("ordinary", 33, 2100, dtype)
    teacher = keep(full, 20)
    found = []
    for count in (1, 2, 2):
        threads(count)
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, teacher, "jsd", backend=backend, reduction="none")
        loss.sum().backward()
        assert leaf.grad is not None
        found.append((loss.detach(), leaf.grad))
    if backend == "eager":
        found = found[1:]
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_the_teachers_own_entropy_and_dtypes(backend: str) -> None:
    """Stored entropy goes into the statistics; the teacher's dtype may differ from the loss's."""
    student, full = pair("ordinary", 4, 50, torch.float32)
    lp = full.log_softmax(-1)
    teacher = dataclasses.replace(keep(full, 5), entropy=-(lp.exp() * lp).sum(-1))
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    check_sparse(student, teacher, "ghost", backend=backend, token_weights=weights)
    double = keep(full.double(), 5)
    for side in (student, student.bfloat16(), student.double()):
        for given in (keep(full, 5), double):
            check_sparse(side, given, "ghost", "jsd", backend=backend)


def test_autocast(backend: str) -> None:
    side = linear(4, 16, 40, torch.float32)
    teacher = keep(side.materialize(), 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd.distillation_loss(side, teacher, "reverse_kl", backend=backend)
    low = kd.LinearLogits(side.hidden.bfloat16(), side.weight.bfloat16())
    assert torch.equal(loss, kd.distillation_loss(low, teacher, "reverse_kl", backend=backend))


def test_a_module_and_an_explanation(backend: str) -> None:
    student, full = pair("ordinary", 3, 14, torch.float32)
    loss = kd.DistillationLoss("reverse_kl", sparse_mode="renormalize", backend=backend)
    teacher = keep(full, 4)
    direct = kd.distillation_loss(student, teacher, "reverse_kl", sparse_mode="renormalize", backend=backend)
    assert torch.equal(loss(student, teacher), direct)  # type: ignore[arg-type]
    assert kd.explain(student, teacher, backend=backend).backend == backend


def test_shorter_rows_equal_shorter_tensors(backend: str) -> None:
    """Padding with -1 is padding: the same bits as without it, whatever the log-probabilities there hold."""
    student, full = pair("ordinary", 3, 300, torch.float32)
    short = keep(full, 5)
    long = shorten(keep(full, 9), torch.full((3,), 5))
    ids = torch.cat((short.ids, torch.full((3, 4), -1, dtype=torch.int32)), -1)
    filled = torch.cat((short.log_probs, torch.full((3, 4), torch.nan)), -1)
    padded = dataclasses.replace(long, ids=ids, log_probs=filled, log_tail=short.log_tail)
    for mode in ("ghost", "renormalize", "truncate"):
        one, other = (kd.distillation_loss(student, t, sparse_mode=mode, backend=backend) for t in (short, padded))
        assert torch.equal(one, other) if backend == "cpp" else abs(float(one - other)) < 1e-6
