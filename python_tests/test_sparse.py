"""Losses on sparse teachers against float64 formulas: every mode, divergence, dtype and kind of row."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, ONE_OF_EACH, TEMPERATURES, pair
from oracle_sparse import check_sparse, draw, keep, shorten

import kdkernels as kd
from kdkernels.divergences import Divergence

pytestmark = pytest.mark.sample(5)

SEPARABLE = tuple(d for d in ONE_OF_EACH if d.separable)
MODES = ("ghost", "renormalize", "truncate")
KINDS = (
    "ordinary", "peaked", "flat", "flat_student", "identical", "near", "masked_student", "finfo_min_student", "shifted",
)  # fmt: skip


@pytest.mark.parametrize(
    ("divergence", "mode", "value"),
    [
        ("forward_kl", "truncate", 0.795841),
        ("forward_kl", "renormalize", 0.296481),
        ("reverse_kl", "renormalize", 0.329961),
        ("forward_kl", "ghost", 0.634897),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_published_numbers(backend: str, divergence: str, mode: str, value: float, dtype: torch.dtype) -> None:
    p, q = (torch.tensor([x], dtype=dtype) for x in ([0.7, 0.2, 0.1], [0.2, 0.3, 0.5]))
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    teacher = kd.SparseLogits(ids, p[:, :2].log(), p[:, 2].log(), 3)
    loss = kd.distillation_loss(q.log(), teacher, divergence, sparse_mode=mode, backend=backend)
    assert abs(float(loss) - value) < 1e-6
    check_sparse(q.log(), teacher, mode, divergence, backend=backend)


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", SEPARABLE, ids=lambda d: d.name)
def test_every_divergence(backend: str, divergence: Divergence, mode: str, kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        student, full = pair(kind, 3, 1100, dtype)
        check_sparse(student, keep(full, 12), mode, divergence, backend=backend, full=full)


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", SEPARABLE, ids=lambda d: d.name)
def test_every_dtype(backend: str, divergence: Divergence, mode: str, dtype: torch.dtype) -> None:
    """Rows of more than one block, with its in-place sweeps and a rest."""
    student, full = pair("ordinary", 2, 2050, dtype)
    check_sparse(student, keep(full, 40, 2.0), mode, divergence, backend=backend, full=full, temperature=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_draws(backend: str, kind: str, dtype: torch.dtype) -> None:
    student, full = pair(kind, 4, 1500, dtype)
    for temperature in (1.0, 0.7):
        teacher = draw(full, 50, temperature)
        check_sparse(student, teacher, "sampled", backend=backend, temperature=temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("mode", MODES)
def test_temperatures(backend: str, mode: str, temperature: float) -> None:
    for kind in ("ordinary", "peaked", "shifted"):
        student, full = pair(kind, 3, 1400, torch.float32)
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            teacher = keep(full, 9, temperature)
            check_sparse(
                student, teacher, mode, divergence, backend=backend, temperature=temperature,
                labels=torch.tensor([3, 1399, 800]), ce_weight=0.4,
            )  # fmt: skip


@pytest.mark.thin(4)
@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 301, 1023, 1024, 1025, 3103])
@pytest.mark.parametrize("mode", MODES)
def test_tails(backend: str, mode: str, vocab: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, full = pair("ordinary", 5, vocab, dtype)
        for k in sorted({1, min(5, vocab), vocab}):
            for divergence in ("forward_kl", "jsd"):
                check_sparse(student, keep(full, k), mode, divergence, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", SEPARABLE, ids=lambda d: d.name)
def test_everything_kept_is_the_dense_loss(backend: str, divergence: Divergence, dtype: torch.dtype) -> None:
    student, full = pair("ordinary", 4, 1300, dtype)
    teacher, labels = keep(full, 1300, 1.5), torch.tensor([5, 1299, -100, 0])
    options = {"temperature": 1.5, "labels": labels, "ce_weight": 0.25, "backend": backend}
    for mode in MODES:
        found = []
        for side in (full, teacher):
            leaf = student.clone().requires_grad_()
            given = {"sparse_mode": mode} if isinstance(side, kd.SparseLogits) else {}
            output = kd.distillation_loss(leaf, side, divergence, return_stats=True, **options, **given)
            output.loss.backward()
            assert leaf.grad is not None
            found.append([output.loss, leaf.grad.double(), *output.stats[:-1]])
        exact = 1e-12 if dtype == torch.float64 else 2e-6
        rounded = {torch.bfloat16: 1e-3, torch.float16: 1e-4}.get(dtype, 0.0)
        dense, sparse = found
        assert (dense[1] - sparse[1]).norm() <= (2 * exact + rounded) * dense[1].norm() > 0
        for x, y in zip([dense[0], *dense[2:]], [sparse[0], *sparse[2:]], strict=True):
            assert (x - y).abs().max() <= exact * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_different_length(backend: str, mode: str) -> None:
    lengths = torch.tensor([16, 1, 7, 15, 2, 16])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        student, full = pair("ordinary", 6, 1090, dtype)
        teacher = shorten(keep(full, 16), lengths)
        for divergence in SEPARABLE:
            check_sparse(student, teacher, mode, divergence, backend=backend, full=full)


@pytest.mark.parametrize("mode", MODES)
def test_whole_blocks_kept_and_none(backend: str, mode: str) -> None:
    """Ids in runs: the first 1024 entries and a few, the last ones, every fourth."""
    student, full = pair("ordinary", 3, 4200, torch.float32)
    lp = full.double().log_softmax(-1)
    for ids in (range(1030), range(3000, 4200), range(0, 4200, 4)):
        index = torch.tensor(list(ids)).expand(3, -1)
        rest = lp.scatter(-1, index, -torch.inf).logsumexp(-1).float()
        teacher = kd.SparseLogits(index.int().contiguous(), lp.gather(-1, index).float(), rest, 4200)
        for side in (student, student.bfloat16()):
            check_sparse(side, teacher, mode, "jsd", backend=backend)
            check_sparse(side, teacher, mode, "forward_kl", backend=backend)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("gap", [1.0, 40.0, 300.0])
def test_a_tail_of_next_to_no_mass_keeps_its_digits(backend: str, gap: float, divergence: str) -> None:
    """The student's kept entries stand `gap` nats above its others: 1 minus their mass would be 0 or noise."""
    student, full = pair("ordinary", 4, 2000, torch.float32)
    teacher = keep(full, 8)
    student = student.clone().scatter_add_(-1, teacher.ids.long(), torch.full((4, 8), gap))
    check_sparse(student, teacher, "ghost", divergence, backend=backend)
    loss = kd.distillation_loss(student, teacher, divergence, backend=backend, reduction="none")
    if divergence == "forward_kl":  # mass tail of the teacher costs about the gap
        assert (loss > teacher.log_tail.exp() * (gap - 20)).all()


def test_the_maximum_moves_along_the_row(backend: str) -> None:
    """The largest of the tail and the largest kept entry in every order of blocks."""
    ids = torch.tensor([[700, 5100]], dtype=torch.int32)
    teacher = kd.SparseLogits(ids, torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0.1]).log(), 6000)
    for dtype in (torch.float32, torch.bfloat16):
        for at in (3, 699, 2500, 5500, 5999):
            for height in (5.0, 60.0, 200.0):
                student = pair("ordinary", 1, 6000, dtype)[0]
                student[0, at] = height
                for mode in MODES:
                    check_sparse(student, teacher, mode, backend=backend)


def test_ties(backend: str) -> None:
    """Equal logits: the agreement goes by the lower id on both sides."""
    ids = torch.tensor([[2, 5], [2, 5]], dtype=torch.int32)
    teacher = kd.SparseLogits(ids, torch.full((2, 2), 0.4).log(), torch.full((2,), 0.2).log(), 8)
    student = torch.zeros(2, 8)
    student[0, 2] = student[0, 5] = student[1, 5] = 3.0
    stats = kd.distillation_loss(student, teacher, backend=backend, return_stats=True).stats
    assert stats.top1_agreement.tolist() == [1.0, 0.0]
    check_sparse(student, teacher, "ghost", backend=backend)


def test_a_teacher_without_a_tail_is_as_one_with_masked_logits(backend: str) -> None:
    """log_tail = -inf with entries left over: what -inf logits cost in the dense loss."""
    student, full = pair("ordinary", 3, 300, torch.float64)
    kept = keep(full, 4)
    masked = torch.full_like(full, -torch.inf).scatter(-1, kept.ids.long(), kept.log_probs)
    mass = kept.log_probs.logsumexp(-1, keepdim=True)
    teacher = kd.SparseLogits(kept.ids, kept.log_probs - mass, torch.full((3,), -torch.inf, dtype=torch.float64), 300)
    for divergence in ("forward_kl", "jsd", "total_variation", "skew_kl"):  # linear in q where p is 0
        ghost = kd.distillation_loss(student, teacher, divergence, backend=backend)
        dense = kd.distillation_loss(student, masked, divergence, backend=backend)
        assert abs(float(ghost - dense)) < 1e-9 * max(1.0, float(dense)), divergence


def test_draws_are_unbiased(backend: str) -> None:
    """The mean gradient of many samplings comes to the dense one, at the rate of one over the root of their number."""
    student, full = pair("ordinary", 1, 30, torch.float64)
    student.requires_grad_()
    (dense,) = torch.autograd.grad(kd.distillation_loss(student, full, backend=backend), student)
    total, times, n = torch.zeros_like(dense), 400, 25
    for seed in range(times):
        loss = kd.distillation_loss(student, draw(full, n, seed=seed), sparse_mode="sampled", backend=backend)
        total += torch.autograd.grad(loss, student)[0]
    spread = math.sqrt(float((full.softmax(-1) * (1 - full.softmax(-1))).sum()) / (n * times))
    assert (total / times - dense).norm() < 3 * spread


@pytest.mark.parametrize("name", [n for n in kd.divergences.names() if kd.divergences.DIVERGENCES[n].separable])
def test_every_registered_divergence(name: str) -> None:
    """Newcomers too, of which nothing is known but `term` and `grad`: gradients by differences, K = V as dense."""
    student, full = pair("ordinary", 2, 12, torch.float64)
    for mode in MODES:

        def loss(z: torch.Tensor, mode: str = mode) -> torch.Tensor:
            return kd.distillation_loss(z, keep(full, 4), name, sparse_mode=mode)

        torch.autograd.gradcheck(loss, [student.clone().requires_grad_()], fast_mode=True)
        whole = kd.distillation_loss(student, keep(full, 12), name, sparse_mode=mode)
        assert abs(float(whole - kd.distillation_loss(student, full, name))) < 1e-10
