"""The Triton backend through the public function: compiled kernels, executed on CPU tensors by the PTX emulator."""

from __future__ import annotations

from collections.abc import Callable

import cases
import golden
import oracle
import pytest
import torch
from emulated import TARGETS, serve
from ptx import Settings
from ptx.triton_shim import Emulator

import kdkernels as kd
from kdkernels.divergences import Divergence
from kdkernels.ops.rows import RowSpec, Side, divergence_rows_
from kdkernels.triton import forms, host
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


def rows_of_kinds(kinds: tuple[str, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of each kind in one call: every row is a program of its own, and each is compared by itself."""
    pairs = [cases.pair(kind, 2, 301, dtype) for kind in kinds]
    return torch.cat([student for student, _ in pairs]), torch.cat([teacher for _, teacher in pairs])


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
@pytest.mark.parametrize("divergence", QUICK, ids=ids)
@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_a_loss_must_survive(
    target: int, divergence: Divergence, dtype: torch.dtype, served: Serve
) -> None:
    served(target)
    oracle.check(*rows_of_kinds(cases.KINDS, dtype), divergence, backend="triton", reduction="none")


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=ids)
def test_every_divergence(divergence: Divergence, served: Serve) -> None:
    served()
    kinds = ("ordinary", "peaked", "masked", "finfo_min") + (() if divergence == kd.AlphaBeta(0, 0) else ("near",))
    sides = rows_of_kinds(kinds, torch.float32)
    oracle.check(*sides, divergence, backend="triton", temperature=0.7, reduction="none")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [(kd.ForwardKL(), torch.bfloat16), (kd.ReverseKL(), torch.float32), (kd.JSD(), torch.bfloat16),
     (kd.AdaptiveKL(), torch.bfloat16)],
    ids=ids,
)  # fmt: skip
def test_code_that_computes_in_pairs(divergence: Divergence, dtype: torch.dtype, served: Serve) -> None:
    """Blackwell's; whole tiles, tails and labels."""
    emulator = served(100)
    for kind in ("ordinary", "masked"):
        student, teacher = cases.pair(kind, 2, 4104, dtype)
        options = {"labels": torch.tensor([4103, 3]), "ce_weight": 0.5, "temperature": 1.5}
        oracle.check(student, teacher, divergence, backend="triton", **options)
    assert "f32x2" in emulator.compiled[0].ptx


@pytest.mark.parametrize("divergence", [kd.AlphaBeta(0.2, 0.7), kd.AlphaBeta(0.3, 0.7), kd.AlphaBeta(0.6, 0)], ids=ids)
def test_powers_of_large_log_ratios(divergence: Divergence, served: Serve) -> None:
    """Where one power of the compiled form would vanish or overflow before its product does."""
    served()
    gaps = torch.tensor([70.0, 85, 100, 125, 200, 285, 290, 295, 300, 440])
    student = torch.randn(10, 301, generator=torch.Generator().manual_seed(0))
    teacher = student + 0.1
    for side in (student, teacher):
        side[:, 9] = 12.0
    teacher[:, 9] -= gaps
    teacher[:, 3] = 12.0
    oracle.check(student, teacher, divergence, backend="triton")
    oracle.check(teacher, student, divergence, backend="triton")


def test_forms_are_taken_where_they_hold() -> None:
    for kernel, a, b in (
        ("jsd", 0.01, 0.0),
        ("alpha_beta", 0.2, 0.7),
        ("alpha_beta", 0.3, 0.7),
        ("alpha_beta_b0", 1, 0),
    ):
        assert forms.find(kernel, a, b) is not None
    for kernel, a, b in (("skew_kl", 0.1, 0.0), ("alpha_beta", 0.1, 0.7), ("alpha_beta", 0.5, 0.6),
                         ("alpha_beta", 0.2, 0.2),
                         ("alpha_beta_b0", 0.1, 0), ("alpha_beta_a0", 0, 0.5)):  # fmt: skip
        assert forms.find(kernel, a, b) is None


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
def test_the_head_of_a_teacher_with_many_equal_logits(dtype: torch.dtype, served: Serve) -> None:
    """It ends among equals, which enter by lower index; three tiles, the first and the last with a mask."""
    served()
    student, teacher = cases.pair("ordinary", 3, 5003, dtype)
    for mu in (0.37, 0.5, 0.999):
        oracle.check(student, (2 * teacher).round() / 2, kd.AdaptiveKL(mu), backend="triton")
    oracle.check(student, torch.zeros_like(teacher), kd.AdaptiveKL(0.5), backend="triton")


MILD = ("ordinary", "flat", "flat_student", "identical", "shifted")
"""Log-ratios that no probability weighs, squared, leave float16's range elsewhere, on every backend."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "temperature", [t if t in (0.05, 2.0) else pytest.param(t, marks=pytest.mark.soak) for t in cases.TEMPERATURES]
)
@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=ids)
def test_every_divergence_and_temperature(
    divergence: Divergence, dtype: torch.dtype, temperature: float, served: Serve
) -> None:
    served()
    kinds = cases.KINDS
    if divergence == kd.AlphaBeta(0, 0):  # of "near" its gradient, log q - log p, is all rounding, on every backend
        kinds = MILD if dtype == torch.float16 else tuple(kind for kind in kinds if kind != "near")
    sides = rows_of_kinds(kinds, dtype)
    oracle.check(*sides, divergence, backend="triton", temperature=temperature, reduction="none")


@pytest.mark.sample(1)
@pytest.mark.parametrize("gap", [12, 40, 80])
def test_rows_whose_largest_logits_come_late(gap: float, served: Serve) -> None:
    """In the last of several tiles, far above what the first sweep has taken for a reference."""
    served()
    student, teacher = cases.pair("ordinary", 3, 1500, torch.float32)
    late = gap + torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(gap))
    student[:, 1000:1004], teacher[:, 1000:1004] = late
    for divergence in ("forward_kl", "jsd"):
        oracle.check(
            student, teacher, divergence, backend="triton", labels=torch.tensor([1000, 1002, 7]), ce_weight=1.0
        )


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 127, 128, 129, 1023, 1024, 1025, 4104])
@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
def test_tails_labels_weights_and_statistics(dtype: torch.dtype, vocab: int, served: Serve) -> None:
    served()
    student, teacher = cases.pair("ordinary", 4, vocab, dtype)
    options = {
        "labels": torch.tensor([0, vocab - 1, -100, vocab // 2]),
        "ce_weight": 0.5,
        "token_weights": torch.tensor([1.0, 0.5, 2.0, 0.0]),
    }
    for divergence in ("forward_kl", "jsd"):
        oracle.check(student, teacher, divergence, backend="triton", **options)
        oracle.check(student, teacher, divergence, backend="triton", temperature=2.0, inplace=True,
                     temperature_scaling="t2", **options)  # fmt: skip


@pytest.mark.parametrize("options", [{"bias": True}, {"scale": 0.3}, {"softcap": 5.0, "bias": True, "scale": 2.0}],
                         ids=["bias", "scale", "softcap"])  # fmt: skip
@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=ids)
def test_linear_heads(dtype: torch.dtype, options: dict[str, float], served: Serve) -> None:
    """Chunks of logits between two GEMMs, with the gradient in place."""
    emulator = served()
    student = cases.linear(5, 12, 301, dtype, seed=1, **options)
    teacher = cases.linear(5, 20, 301, dtype, seed=2, **options)
    labels = torch.tensor([3, 300, 0, -100, 7])
    for divergence in ("forward_kl", "jsd"):
        oracle.check(student, teacher, divergence, backend="triton", labels=labels, ce_weight=0.4, temperature=1.5,
                     chunk_bytes=2 * 2 * 301 * dtype.itemsize)  # fmt: skip
    assert len(emulator.reports) > 2  # more than one chunk


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("dtype", "cap"), [(torch.bfloat16, 30.0), (torch.float16, 5.0), (torch.float32, 30.0)], ids=ids
)
def test_soft_caps_are_as_good_as_the_stored_logits(dtype: torch.dtype, cap: float, served: Serve) -> None:
    """Every logit by the loss of a label there."""
    served()
    stored = torch.cat([torch.linspace(-4 * cap, 4 * cap, 50), torch.tensor([0.0, 1e-3, -1e-3, 2e4, -6e4])]).to(dtype)
    bias = torch.randn(55, generator=torch.Generator().manual_seed(0))
    student, teacher = stored.repeat(55, 1), torch.zeros(55, 55, dtype=dtype)
    labels, made = torch.arange(55), (torch.empty(55), torch.empty(55, 55, dtype=dtype), torch.empty(55, 6))
    weights = RowWeights(torch.ones(55), torch.ones(55), labels)
    side = Side(student, bias, 0.7, cap)
    divergence_rows_("triton", side, Side(teacher), weights, RowSpec("forward_kl", 0, 0, 1.0, 55), *made)
    z = cap * torch.tanh(0.7 * (stored.double() + bias.double()) / cap)
    nll = z.logsumexp(0) - z
    per_logit = 2**-22 if dtype == torch.float32 else 4e-7
    assert ((made[2][:, 4] - nll).abs() <= 2 * per_logit * cap + 2**-22 * nll).all()
    truth = golden.distill(golden.Side(student, None, bias, 0.7, cap), golden.Side(teacher), "forward_kl",
                           w_kd=torch.ones(55), w_ce=torch.ones(55), labels=labels)  # fmt: skip
    rounded = (truth.grad.to(dtype).double() - truth.grad).norm(dim=-1) * (dtype != torch.float32)
    error = (made[1].double() - truth.grad).norm(dim=-1)
    assert (error <= 2 * rounded + 4 * per_logit * cap * truth.scale).all()
    assert (truth.grad.norm(dim=-1) > 0.04).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_online_and_separable_kernels_agree(divergence: str, served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generic kernel computes forward and reverse KL too."""
    results = []
    for carries, settings in ((host.CARRIES, None), ({}, Settings(seed=9))):
        served(90, settings)
        monkeypatch.setattr(host, "CARRIES", carries)
        student, teacher = cases.pair("ordinary", 2, 5001, torch.float32)
        leaf = student.requires_grad_()
        loss = kd.distillation_loss(leaf, teacher, divergence, backend="triton", reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss_a, grad_a), (loss_b, grad_b) = results
    assert (loss_a - loss_b).abs().max() <= 2e-6
    assert not torch.equal(grad_a, grad_b)
    assert (grad_a - grad_b).norm() <= 1e-6 * grad_a.norm()


def test_no_recompilation_for_another_batch_or_vocabulary(served: Serve) -> None:
    emulator = served()
    for rows, vocab in ((1, 808), (3, 1600), (16, 2008)):
        student, teacher = cases.pair("ordinary", rows, vocab, torch.bfloat16)
        kd.distillation_loss(student.requires_grad_(), teacher, backend="triton")
    assert len({compiled.ptx for compiled in emulator.compiled}) == 1


def test_repeated_runs_are_bit_equal_and_nothing_unwritten_is_read(served: Serve) -> None:
    emulator = served()
    student, teacher = cases.pair("ordinary", 3, 2000, torch.bfloat16)
    results = []
    for _ in range(2):
        with emulator.poison():
            leaf = student.clone().requires_grad_()
            loss = kd.distillation_loss(leaf, teacher, "jsd", backend="triton")
            loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
