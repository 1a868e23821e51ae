"""Forward and reverse KL on chip, through the public function: compiled CUDA C++ executed by the PTX emulator."""

from __future__ import annotations

from typing import Any

import cases
import oracle
import pytest
import torch
from emulated_onchip import TARGETS, OnChip, Serve, serve, with_clusters
from ptx.compile import nvcc
from torch import Tensor

import kdkernels as kd
from kdkernels import onchip

pytestmark = [pytest.mark.slow, pytest.mark.sample(3), pytest.mark.skipif(nvcc() is None, reason="no nvcc here")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("forward_kl", "reverse_kl")


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return lambda target=90, settings=None: serve(monkeypatch, target, settings)


def padded(x: Tensor, fill: float = 50.0, extra: int = 0) -> Tensor:
    """Rows at 16-byte boundaries: columns behind the vocabulary are there, and count for nothing."""
    width = x.shape[1] + -x.shape[1] % (16 // x.element_size()) + extra
    wide = torch.full((x.shape[0], width), fill, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide


def check(emulator: OnChip, student: Tensor, teacher: Tensor, divergence: str, **options: Any) -> None:
    """One call on chip, forward and backward, against float64."""
    launches = len(emulator.reports)
    leaf = student.detach().requires_grad_()
    given = leaf.clone() if options.get("inplace") else leaf
    loss = kd.distillation_loss(given, teacher, divergence, backend="cuda", **options)
    assert len(emulator.reports) == launches + 1
    call = oracle.Call(student, teacher, kd.divergences.get(divergence), options)
    rows = call.golden(oracle.side(student), oracle.side(teacher))
    oracle.compare_loss(loss, rows, call)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    oracle.compare_gradients({"logits": gradient}, rows, call)


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_inputs_that_a_loss_must_survive(
    divergence: str, dtype: torch.dtype, served: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = served()
    with_clusters(monkeypatch, 2)
    for kind in cases.KINDS:
        student, teacher = (padded(x) for x in cases.pair(kind, 2, 301, dtype))
        check(emulator, student, teacher, divergence, vocab_size=301, temperature=0.7)


@pytest.mark.soak
@pytest.mark.parametrize("temperature", cases.TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_inputs_at_every_temperature(
    target: int, divergence: str, dtype: torch.dtype, temperature: float, served: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = served(target)
    for cluster, vocab in ((1, 17), (4, 301), (8, 20001), (2, 70000)):
        with_clusters(monkeypatch, cluster, cluster % 3)
        for kind in cases.KINDS:
            student, teacher = (padded(x) for x in cases.pair(kind, 3, vocab, dtype))
            check(emulator, student, teacher, divergence, vocab_size=vocab, temperature=temperature)


@pytest.mark.thin(4)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 1023, 1025, 8192, 8193])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_tails_and_rows_that_do_not_count(
    dtype: torch.dtype, vocab: int, served: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = served()
    student, teacher = (padded(x, torch.nan) for x in cases.pair("ordinary", 6, vocab, dtype))
    student[3], teacher[5] = torch.nan, torch.inf
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 0.0])
    for cluster, spare, divergence in ((1, 3, "forward_kl"), (2, 0, "reverse_kl"), (8, 1, "forward_kl")):
        with_clusters(monkeypatch, cluster, spare)
        check(emulator, student, teacher, divergence, vocab_size=vocab, token_weights=weights, inplace=spare == 0,
              temperature=1.0 + spare, temperature_scaling="t2")  # fmt: skip


@pytest.mark.parametrize("gap", [12, 40, 80])
def test_rows_whose_largest_logits_come_late(gap: float, served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far above what the warps have taken for a reference."""
    emulator = served()
    with_clusters(monkeypatch, 1)
    student, teacher = cases.pair("ordinary", 3, 9000, torch.float32)
    late = gap + torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(gap))
    student[:, 7000:7004], teacher[:, 7000:7004] = late
    for divergence in DIRECTIONS:
        check(emulator, student, teacher, divergence)


def test_rows_with_gaps_between_them(served: Serve) -> None:
    emulator = served()
    for dtype in DTYPES:
        student, teacher = (
            padded(x, extra=pad) for x, pad in zip(cases.pair("ordinary", 4, 1027, dtype), (24, 40), strict=True)
        )
        check(emulator, student, teacher[:, : student.shape[1]], "forward_kl", vocab_size=1027)


@pytest.mark.parametrize("cluster", [1, 4])
def test_bad_rows_leave_others_alone(cluster: int, served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served()
    with_clusters(monkeypatch, cluster)
    student, teacher = cases.pair("ordinary", 7, 3000, torch.float32)
    student[1, 2999] = torch.nan
    teacher[2, 1700] = torch.nan
    student[3, 0] = torch.inf
    teacher[4] = -torch.inf
    student[5] = torch.nan  # does not count
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0, 1])
    bad = torch.tensor([0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    for divergence in DIRECTIONS:
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, teacher, divergence, token_weights=weights, reduction="none", backend="cuda")
        loss.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(loss.isnan(), bad)
        assert torch.equal(leaf.grad.isnan(), bad[:, None].expand_as(student))
        assert loss[5] == 0
        assert (leaf.grad[5] == 0).all()
        assert leaf.grad[[0, 6]].abs().sum() > 0


def test_masks_that_fill_the_part_of_one_warp(served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp's reference is the largest logit of its first vectors: -inf, hopeless, or far from the row's maximum."""
    emulator = served()
    with_clusters(monkeypatch, 2)
    for value in (-torch.inf, -3e38, -1e25, -200.0, 70.0, 300.0):
        for divergence in DIRECTIONS:
            student, teacher = cases.pair("ordinary", 3, 8192, torch.float32)
            student[0, 512:1024] = value  # one chunk, one warp's only
            teacher[1, 512:1024] = value
            student[2, 512:600] = teacher[2, 512:600] = value
            check(emulator, student, teacher, divergence)


def test_linear_heads_take_the_gradient_in_place(served: Serve) -> None:
    emulator = served()
    student, teacher = (cases.linear(5, 12, 304, torch.bfloat16, seed=seed) for seed in (1, 2))
    oracle_loss = kd.distillation_loss(student, teacher, "forward_kl", backend="eager")
    loss = kd.distillation_loss(student, teacher, "forward_kl", backend="cuda", chunk_bytes=4 * 2 * 2 * 304)
    assert len(emulator.reports) > 1
    torch.testing.assert_close(loss, oracle_loss, rtol=1e-4, atol=0)


def test_repeated_runs_are_bit_equal(served: Serve) -> None:
    served()
    student, teacher = cases.pair("ordinary", 3, 2000, torch.bfloat16)
    results = []
    for _ in range(2):
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, teacher, "reverse_kl", backend="cuda", reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_rows_beyond_2_to_the_31_elements(served: Serve) -> None:
    """Only pages that are touched exist: the rows are 2^30 entries apart."""
    emulator = served()
    student, teacher = cases.pair("ordinary", 4, 1000, torch.bfloat16)
    far = []
    for x in (student, teacher):
        rows = torch.empty(3 * 2**30 + 1000, dtype=torch.bfloat16).as_strided((4, 1000), (2**30, 1))
        far.append(rows.copy_(x))
    near_loss = kd.distillation_loss(student, teacher, backend="cuda", reduction="none")
    far_loss = kd.distillation_loss(far[0], far[1], backend="cuda", reduction="none")
    assert torch.equal(near_loss, far_loss)
    assert len(emulator.reports) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.soak)], ids=ids)
@pytest.mark.parametrize("divergence", ["forward_kl", pytest.param("reverse_kl", marks=pytest.mark.soak)])
@pytest.mark.parametrize("target", TARGETS)
def test_large_vocabularies(target: int, divergence: str, dtype: torch.dtype, served: Serve) -> None:
    check(served(target), *cases.pair("ordinary", 2, 151936, dtype), divergence)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1024, 8193, 32000, 128256, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_on_a_gpu(divergence: str, dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels, launched by the native library."""
    why = onchip.obstacle(torch.device("cuda"), dtype, divergence)
    if why:
        pytest.skip(why)
    monkeypatch.setattr(onchip, "gains", lambda *_: True)
    launches = []
    launched = onchip.start
    monkeypatch.setattr(onchip, "start", lambda launch: (launches.append(launch), launched(launch)))
    for kind in cases.KINDS:
        student, teacher = (padded(x) for x in cases.pair(kind, 300, vocab, dtype))
        leaf = student.cuda().requires_grad_()
        loss = kd.distillation_loss(leaf, teacher.cuda(), divergence, backend="cuda", vocab_size=vocab)
        call = oracle.Call(student, teacher, kd.divergences.get(divergence), {"vocab_size": vocab})
        rows = call.golden(oracle.side(student), oracle.side(teacher))
        oracle.compare_loss(loss.cpu(), rows, call)
        (gradient,) = torch.autograd.grad(loss, leaf)
        oracle.compare_gradients({"logits": gradient.cpu()}, rows, call)
    assert len(launches) == len(cases.KINDS)
