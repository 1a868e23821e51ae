"""Different roads to the same loss: linear and dense, chunks, backends, threads, instruction sets, repeated runs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, KINDS, ONE_OF_EACH, linear, pair
from torch import Tensor

import kdkernels as kd
from kdkernels import native
from kdkernels.divergences import Divergence

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def of_logits(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """Loss and gradient."""
    leaf = student.detach().clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, *args, **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad]


def of_linear(student: kd.LinearLogits, teacher: Any, *args: Any, **options: Any) -> list[Tensor]:
    """Loss and gradients of hidden states, weight and bias."""
    names = [name for name in ("hidden", "weight", "bias") if getattr(student, name) is not None]
    leaves = {name: getattr(student, name).detach().clone().requires_grad_() for name in names}
    loss = kd.distillation_loss(dataclasses.replace(student, **leaves), teacher, *args, **options)
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def near(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    return all((x - y).double().norm() <= tolerance * y.double().norm() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=lambda d: d.name)
def test_linear_is_dense(backend: str, divergence: Divergence, reduction: str) -> None:
    """The fused head and the plain one, differentiated by torch, in float64: all digits."""
    student = linear(9, 12, 37, torch.float64, 1, bias=True, softcap=4.0, scale=0.7)
    teacher = linear(9, 20, 37, torch.float64, 2)
    labels = torch.arange(9) * 4
    options: dict[str, Any] = {"labels": labels, "ce_weight": 0.4, "temperature": 1.7, "reduction": reduction}
    fused = of_linear(student, teacher, divergence, chunk_bytes=3000, backend=backend, **options)
    leaves = [x.clone().requires_grad_() for x in (student.hidden, student.weight, student.bias) if x is not None]
    plain = kd.LinearLogits(leaves[0], leaves[1], leaves[2], softcap=4.0, scale=0.7).materialize()
    loss = kd.distillation_loss(plain, teacher.materialize(), divergence, backend=backend, **options)
    reference = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
    assert near(fused, reference, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chunk_size_is_irrelevant(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """Losses of rows are the same bits; sums over rows differ by rounding."""
    student, teacher = linear(10, 12, 37, dtype, 1, bias=True), linear(10, 20, 37, dtype, 2)
    row = 2 * 37 * dtype.itemsize
    options = {"reduction": reduction, "labels": torch.arange(10), "ce_weight": 0.5, "backend": backend}
    whole = of_linear(student, teacher, "jsd", **options)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps)
    for rows in (1, 2, 3, 5, 9, 10, 11):
        chunked = of_linear(student, teacher, "jsd", chunk_bytes=rows * row, **options)
        assert near(chunked, whole, tolerance), rows


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_cpp_is_eager(backend: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """Every kind of row; both are within a tolerance of float64, and so of each other."""
    if backend == "eager":
        return
    for kind in KINDS:
        if divergence == kd.AlphaBeta(0.0, 0.0) and (kind in ("near", "identical") or dtype == torch.float16):
            continue  # nothing but the rounding of logarithms; gradients of 1e4 an entry overflow
        student, teacher = pair(kind, 5, 83, dtype)
        ours, reference = (
            of_logits(student, teacher, divergence, temperature=2.0, reduction="sum", backend=name)
            for name in (backend, "eager")
        )
        assert (ours[0] - reference[0]).abs() <= 1e-5 * reference[0].abs().clamp(min=1)
        eps = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
        p_and_q = torch.cat((student, teacher)).double().div(2).softmax(-1).norm()
        scale = p_and_q + reference[1].double().norm()
        flips = 1e-3 if divergence.name == "total_variation" else 1e-5
        assert (ours[1].double() - reference[1].double()).norm() <= (eps + flips) * scale, kind


RUNS: dict[str, Callable[..., list[Tensor]]] = {
    "logits": lambda dtype, **o: of_logits(*pair("ordinary", 64, 1031, dtype), "jsd", **o),
    "forward_kl": lambda dtype, **o: of_logits(*pair("ordinary", 64, 1031, dtype), "forward_kl", **o),
    "adaptive_kl": lambda dtype, **o: of_logits(*pair("ordinary", 64, 1031, dtype), "adaptive_kl", **o),
    "linear": lambda dtype, **o: of_linear(
        linear(64, 32, 1031, dtype, 1, bias=True), linear(64, 16, 1031, dtype, 2), "jsd", chunk_bytes=10**5, **o
    ),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("run", RUNS)
def test_repeated_runs_give_the_same_bits(backend: str, run: str, threads: Callable[[int], None]) -> None:
    options = {"backend": backend, "labels": torch.arange(64), "ce_weight": 0.5}
    for n in (2, 1):
        threads(n)
        for dtype in (torch.float32, torch.bfloat16):
            first = RUNS[run](dtype, **options)
            assert all(same(RUNS[run](dtype, **options), first) for _ in range(2))


@pytest.mark.thin(3)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_number_of_threads_does_not_change_losses_of_logits(
    backend: str, reduction: str, threads: Callable[[int], None]
) -> None:
    """A row belongs to one thread and the sum over rows is taken in float64: loss and gradient keep every bit. Plain
    torch splits rows where it likes, so for eager this is a matter of digits."""
    exact = backend != "eager"
    runs = [(d, dtype) for d in ONE_OF_EACH for dtype in (DTYPES if exact else DTYPES[:2])][:: 1 if exact else 5]
    options: dict[str, Any] = {"reduction": reduction, "temperature": 1.3, "backend": backend}
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append([of_logits(*pair("ordinary", 67, 1031, dtype), d, **options) for d, dtype in runs])
    for several in results[1:]:
        for (_, dtype), ours, one in zip(runs, several, results[0], strict=True):
            eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
            assert same(ours, one) if exact else near(ours, one, eps)


def test_more_threads_than_rows(backend: str, threads: Callable[[int], None]) -> None:
    threads(4)
    for rows in (0, 1, 3):
        student, teacher = pair("ordinary", rows, 301, torch.float32)
        several = of_logits(student, teacher, "jsd", backend=backend)
        threads(1)
        assert near(several, of_logits(student, teacher, "jsd", backend=backend), 1e-6)
        threads(4)


def test_rows_of_leading_dimensions_are_the_rows(backend: str) -> None:
    student, teacher = pair("ordinary", 12, 83, torch.float32)
    flat = of_logits(student, teacher, "jsd", reduction="none", backend=backend)
    shaped = of_logits(student.view(2, 3, 2, 83), teacher.view(2, 3, 2, 83), "jsd", reduction="none", backend=backend)
    assert same([x.reshape(y.shape) for x, y in zip(shaped, flat, strict=True)], flat)


def test_mean_and_sum_are_those_of_none(backend: str) -> None:
    student, teacher = pair("ordinary", 12, 83, torch.float32)
    labels = torch.arange(12).masked_fill(torch.arange(12) % 4 == 0, -100)
    options = {"labels": labels, "ce_weight": 0.5, "backend": backend}
    single = of_logits(student, teacher, "jsd", reduction="none", **options)
    for reduction, factor in (("sum", 1.0), ("mean", 1 / 9)):
        loss, gradient = of_logits(student, teacher, "jsd", reduction=reduction, **options)
        assert near([loss, gradient], [factor * single[0].sum(), factor * single[1]], 1e-6)


def test_gradient_accumulation_is_the_large_batch(backend: str) -> None:
    """num_items: micro-batches of unequal length, each divided by the tokens of all."""
    student, teacher = pair("ordinary", 12, 83, torch.float32)
    labels = torch.arange(12).masked_fill(torch.arange(12) % 4 == 0, -100)
    options: dict[str, Any] = {"ce_weight": 0.5, "backend": backend}
    whole = of_logits(student, teacher, "jsd", labels=labels, **options)
    items = (labels != -100).sum()
    parts = [
        of_logits(student[i], teacher[i], "jsd", labels=labels[i], num_items=items, **options)
        for i in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    assert near([sum(p[0] for p in parts), torch.cat([p[1] for p in parts])], whole, 1e-6)  # type: ignore[list-item]


def test_online_kls_are_the_generic_ones(backend: str) -> None:
    """Forward and reverse KL have a path of their own; JSD's limits and alpha-beta reach the same by other names."""
    for kind in KINDS:
        for dtype in DTYPES:
            student, teacher = pair(kind, 5, 301, dtype)
            for kl, others in (
                (kd.ForwardKL(), (kd.JSD(beta=0.0), kd.AlphaBeta(1.0, 0.0), "forward_kl")),
                (kd.ReverseKL(), (kd.JSD(beta=1.0), kd.AlphaBeta(0.0, 1.0), "reverse_kl")),
            ):
                one = of_logits(student, teacher, kl, backend=backend)
                assert all(same(of_logits(student, teacher, other, backend=backend), one) for other in others)


def test_skews_and_jsd_at_their_limits(backend: str) -> None:
    """beta (1 - beta)-scaled JSD tends to KL; skew 0 is KL; alpha-beta is continuous at 0."""
    student, teacher = pair("ordinary", 5, 83, torch.float64)

    def value(divergence: Divergence) -> Tensor:
        return kd.distillation_loss(student, teacher, divergence, reduction="none", backend=backend)

    forward, reverse = value(kd.ForwardKL()), value(kd.ReverseKL())
    assert torch.allclose(value(kd.JSD(beta=1e-9)) / 1e-9, forward, rtol=1e-3)
    assert torch.allclose(value(kd.JSD(beta=1 - 1e-9)) / 1e-9, reverse, rtol=1e-3)
    assert torch.allclose(value(kd.SkewKL(alpha=1e-10)), forward, rtol=1e-4)
    assert torch.allclose(value(kd.SkewReverseKL(alpha=1e-10)), reverse, rtol=1e-4)
    assert torch.allclose(value(kd.AlphaBeta(0.05, 0.7)), value(kd.AlphaBeta(0.0, 0.7)), rtol=0.3)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert torch.allclose(value(kd.AlphaBeta(0.5, 0.5)), 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1))
    assert torch.allclose(value(kd.AlphaBeta(1.0, 1.0)), ((p - q) ** 2).sum(-1) / 2)


INSTRUCTION_SET_PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import torch
from cases import ONE_OF_EACH, pair
from oracle import check
import kdkernels as kd
from kdkernels import native
from kdkernels.arguments import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
torch.set_num_threads(1)
assert native.available(), native.reason()
assert native.isa() == {isa!r}, native.isa()
for divergence in ONE_OF_EACH:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("ordinary", "masked", "shifted"):
            for vocab in (1, 67, 301):
                student, teacher = pair(kind, 3, vocab, dtype)
                labels = torch.arange(3) % vocab
                check(student, teacher, divergence, backend="cpp", labels=labels, ce_weight=0.5, temperature=2.0)
    for temperature in (LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = pair("ordinary", 5, 301, dtype)
            found, expected = (
                kd.distillation_loss(student, teacher, divergence, backend=b, temperature=temperature, reduction="none")
                for b in ("cpp", "eager")
            )
            assert bool(found.isfinite().all()) and torch.allclose(found, expected, rtol=1e-3, atol=1e-7), divergence
print("good")
"""


@pytest.mark.slow
def test_every_instruction_set_of_this_machine(backend: str) -> None:
    """The library chooses at load; each choice this processor allows is right."""
    if backend != "cpp":
        return
    folder = os.path.dirname(__file__)
    served = 0
    for isa in native.facts()["instruction_sets"]:
        program = INSTRUCTION_SET_PROGRAM.format(folder=folder, isa=isa)
        env = {**os.environ, "KDKERNELS_ISA": isa}
        ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
        if "KDKERNELS_ISA" in ran.stderr:  # refused: this processor has no such instructions
            continue
        assert ran.stdout.strip() == "good", ran.stderr[-2000:]
        served += 1
    assert served >= 1
