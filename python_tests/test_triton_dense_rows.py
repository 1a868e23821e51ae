"""The dense Triton kernels: where rows begin and end, what they may hold, how far apart they lie."""

from __future__ import annotations

from collections.abc import Callable

import cases
import oracle
import pytest
import torch
from emulated import TARGETS, serve
from ptx.triton_shim import Emulator

import kdkernels as kd
from kdkernels.ops.rows import RowSpec, Side, divergence_rows_
from kdkernels.triton import host
from kdkernels.weights import RowWeights

pytestmark = [pytest.mark.sample(3), pytest.mark.thin(6)]

LOW_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)
QUICK = (kd.ForwardKL(), kd.ReverseKL(), kd.JSD(), kd.SkewReverseKL())
Serve = Callable[..., Emulator]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return lambda target=90, settings=None: serve(monkeypatch, target, settings)


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def rows_of(student: torch.Tensor, teacher: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides in memory that is laid out otherwise."""
    rows, vocab = student.shape
    if how == "wide rows":
        space = [torch.full((rows, vocab + pad), 9.0, dtype=student.dtype) for pad in (24, 40)]
    elif how == "odd rows":
        space = [torch.full((rows, vocab + 3), 9.0, dtype=student.dtype) for _ in range(2)]
    else:
        space = [torch.full((rows, vocab + pad), 9.0, dtype=student.dtype) for pad in (1, 2)]
    begin = 1 if how == "unlike starts" else 0
    views = [s[:, i * begin : i * begin + vocab] for i, s in enumerate(space)]
    return views[0].copy_(student), views[1].copy_(teacher)


@pytest.mark.parametrize(("how", "vocab", "expected"),
                         [("wide rows", 1032, host.WHOLE), ("odd rows", 1029, host.SHIFTED),
                          ("odd rows", 3001, host.SHIFTED), ("unlike starts", 1029, host.LOOSE)])  # fmt: skip
@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
def test_rows_that_begin_anywhere(how: str, vocab: int, expected: int, dtype: torch.dtype, served: Serve) -> None:
    """Wide rows read whole vectors; contiguous rows of an odd vocabulary do so from the boundary before each row."""
    served()
    student, teacher = rows_of(*cases.pair("ordinary", 5, vocab, dtype), how)
    assert host.layout(vocab, [student, teacher]) == expected
    labels = torch.tensor([0, vocab - 1, 5, 6, 7])
    for divergence in ("reverse_kl", "skew_kl"):
        oracle.check(student, teacher, divergence, backend="triton", labels=labels, ce_weight=0.3)


def test_padding_of_the_vocabulary_is_cut(served: Serve) -> None:
    served()
    student, teacher = cases.pair("ordinary", 3, 600, torch.bfloat16)
    teacher = torch.cat([teacher, torch.full_like(teacher[:, :8], 50.0)], 1)
    student[:, 500:] = torch.nan
    for divergence in ("forward_kl", "jsd"):
        oracle.check(student, teacher, divergence, backend="triton", vocab_size=500)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_bad_rows_leave_others_alone(divergence: str, served: Serve) -> None:
    served()
    student, teacher = cases.pair("ordinary", 7, 301, torch.float32)
    student[1, 17] = torch.nan
    teacher[2, 300] = torch.nan
    student[3, 0] = torch.inf
    teacher[4] = -torch.inf
    student[5] = torch.nan  # does not count
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0, 1])
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, divergence, token_weights=weights, reduction="none", backend="triton")
    loss.sum().backward()
    bad = torch.tensor([0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert leaf.grad is not None
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(leaf.grad.isnan(), bad[:, None].expand_as(student))
    assert loss[5] == 0
    assert (leaf.grad[5] == 0).all()
    assert leaf.grad[[0, 6]].abs().sum() > 0


def test_a_label_out_of_range_makes_its_row_nan(served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the values are not looked at beforehand."""
    served()
    monkeypatch.setattr(kd.weights, "_check_values", lambda *_: None)
    student, teacher = cases.pair("ordinary", 3, 301, torch.float32)
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, labels=torch.tensor([5, 301, 7]), ce_weight=1.0, reduction="none",
                                backend="triton")  # fmt: skip
    loss.sum().backward()
    assert leaf.grad is not None
    assert loss.isnan().tolist() == [False, True, False]
    assert leaf.grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
def test_vectors_of_16_bytes(dtype: torch.dtype, served: Serve) -> None:
    """Nearly every byte, with and without a rest; of rows of an odd vocabulary all but the first and last tiles."""
    emulator = served()
    for vocab, least in ((32768, 0.99), (33000, 0.99), (32769, 0.85)):
        student, teacher = cases.pair("ordinary", 2, vocab, dtype)
        for divergence in ("forward_kl", "jsd"):
            kd.distillation_loss(student.detach().requires_grad_(), teacher, divergence, backend="triton")
            report = emulator.reports[-1]
            assert report.width_share("load") >= least, (divergence, vocab)
            assert report.width_share("store") >= least, (divergence, vocab)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [50257, 151936, 262144])
@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
def test_large_vocabularies(dtype: torch.dtype, vocab: int, served: Serve) -> None:
    for target in TARGETS:
        served(target)
        student, teacher = cases.pair("ordinary", 2, vocab, dtype)
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            oracle.check(student, teacher, divergence, backend="triton", labels=torch.tensor([0, vocab - 1]),
                         ce_weight=0.5)  # fmt: skip


def rows_far_apart(rows: int, vocab: int) -> torch.Tensor:
    """bfloat16, 2^30 entries from one row to the next; only pages that are touched exist."""
    return torch.empty((rows - 1) * 2**30 + vocab, dtype=torch.bfloat16).as_strided((rows, vocab), (2**30, 1))


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_rows_beyond_2_to_the_31_elements(divergence: str, served: Serve) -> None:
    served()
    student, teacher = cases.pair("ordinary", 4, 1000, torch.bfloat16)
    far = [rows_far_apart(4, 1000).copy_(x) for x in (student, teacher)]
    near_loss = kd.distillation_loss(student, teacher, divergence, backend="triton", reduction="none")
    far_loss = kd.distillation_loss(far[0], far[1], divergence, backend="triton", reduction="none")
    assert torch.equal(near_loss, far_loss)


@pytest.mark.sample(1)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_gradients_beyond_2_to_the_31_elements(divergence: str, inplace: bool, served: Serve) -> None:
    """Into rows 2^30 entries apart, of the student itself or not; a padded row gets zeros there too."""
    served()
    student, teacher = cases.pair("ordinary", 4, 1000, torch.bfloat16)
    weights = RowWeights(torch.tensor([1.0, 0.5, 0.0, 2.0]), torch.ones(4), torch.tensor([0, 991, 5, 7]))
    made = []
    for rows in (torch.empty(4, 1000, dtype=torch.bfloat16), rows_far_apart(4, 1000)):
        rows.copy_(student if inplace else torch.full_like(student, 7.0))
        loss, stats = torch.empty(4), torch.empty(4, 6)
        sides = Side(rows if inplace else student), Side(teacher)
        divergence_rows_("triton", *sides, weights, RowSpec(divergence, 0.5, 0.0, 1.0, 992), loss, rows, stats)
        made.append((loss, stats, rows.clone(memory_format=torch.contiguous_format)))
    assert all(torch.equal(near, far) for near, far in zip(*made, strict=True))
    assert (made[1][2][:, :992].float().norm(dim=-1) > 0.01).all()
    assert (made[1][2][:, 992:] == 0).all()
