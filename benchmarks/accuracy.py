"""Errors against float64: losses and gradients of dense and fused-linear calls on easy and hard inputs.

    python -m benchmarks.accuracy [--quick]        JSON on standard output

- Loss: the worst row's ``|got - want| / max(1 nat, |want|)``. Gradient: the worst row's ``||got - want|| / natural
  scale`` (DESIGN section 6), and for bf16 beside it the error of the exact gradient rounded once, the best a bf16
  tensor can hold.
- Near convergence: the worst row's ``|got - want| / want`` of the loss, student and teacher a true KL of 1e-7 to 1e-4
  apart.
- Inputs are taken as exact in their dtype; rivals get the same tensors, at temperature 1.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import checks, inputs, rivals
from benchmarks.rivals import Contestant, eager, ours
from benchmarks.runner import Runner
from benchmarks.shapes import MAIN, OTHERS, PARAMETERS, Case
from python_tests import golden

KINDS = ("ordinary", "peaked", "shifted", "cold", "near")
"""Logits of standard deviation 2 and 2.2; those times 100; plus 8192; at T = .05; student = teacher + .02 noise."""
KLS = (1e-7, 1e-6, 1e-5, 1e-4)
ROWS = 4
BY_ROW = ("trl:gkd", "torchtune")
"""Rivals that return a mean only: given one row at a time."""


def pair(kind: str, dtype: str, vocab: int, gap: float = 0.02) -> tuple[Tensor, Tensor, float]:
    """Student and teacher logits ``[ROWS, vocab]`` of a kind, and the temperature."""
    generator = torch.Generator().manual_seed(7)
    teacher = 2 * torch.randn(ROWS, vocab, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, vocab, generator=generator, dtype=torch.float64)
    student = teacher + (gap if kind == "near" else 1.0) * noise
    if kind == "peaked":
        student, teacher = 100 * student, 100 * teacher
    if kind == "shifted":
        student, teacher = student + 8192, teacher + 8192
    wanted = inputs.DTYPES[dtype]
    return student.to(wanted), teacher.to(wanted), 0.05 if kind == "cold" else 1.0


def _ours(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    import kdkernels as kd

    return kd.distillation_loss(student, teacher, ours.divergence(name), temperature=temperature, reduction="none")


def _eager(widen: bool) -> Any:
    def run(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        dtype = torch.float32 if widen else student.dtype
        lq = torch.log_softmax(student.to(dtype) / temperature, -1)
        lp = torch.log_softmax(teacher.to(dtype) / temperature, -1)
        return eager.FORMULAS[name](lp, lq, *PARAMETERS[name])

    return run


def _rival(contestant: Contestant) -> Any:
    def run(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor | None:
        if temperature != 1:
            return None
        rows = []
        for s, t in zip(student.split(1), teacher.split(1), strict=True):
            case = Case("dense", name, "fp32", 1, s.shape[1])
            given = inputs.DenseInputs.of(case, s.detach(), t)
            given.student = lambda chunks=1, s=s: [s]  # type: ignore[method-assign,misc]
            rows.append(contestant.build(case)(given).reshape(1))
        return torch.cat(rows)

    return run


def subjects(divergence: str, dtype: str) -> dict[str, Any]:
    """Functions (name, student, teacher, temperature) -> per-token loss, of those who compute it here."""
    found: dict[str, Any] = {"ours": _ours, "eager": _eager(True)}
    if divergence in MAIN:
        if dtype == "bf16":
            found["eager:bf16"] = _eager(False)
        case = Case("dense", divergence, dtype, 1, 8)
        for contestant in rivals.contestants(case):
            if contestant.name in BY_ROW and contestant.value == "divergence" and not contestant.missing():
                found[contestant.name] = _rival(contestant)
    return found


def dense(divergence: str, dtype: str, kind: str, vocab: int) -> dict[str, Any]:
    """Errors of everyone on one kind of input."""
    student, teacher, temperature = pair(kind, dtype, vocab)
    parameters = PARAMETERS[divergence]
    want = golden.distill(student, teacher, divergence, *parameters, temperature=temperature)
    found: dict[str, Any] = {"divergence": divergence, "dtype": dtype, "kind": kind}
    found["true"] = float(want.loss.mean())
    found["rounded"] = golden.gradient_error(want.grad.to(student.dtype), want.grad, want.scale)
    exempt = None
    if divergence == "total_variation":  # its gradient jumps at p = q: entries that rounding decides do not count
        lp, lq = (torch.log_softmax(x.double() / temperature, -1) for x in (teacher, student))
        exempt = (lp.exp() - lq.exp()).abs() < 1e-5 * lq.exp()
    for name, call in subjects(divergence, dtype).items():
        leaf = student.clone().requires_grad_()
        loss = call(divergence, leaf, teacher, temperature)
        if loss is None:
            continue
        loss.sum().backward()
        assert leaf.grad is not None
        got = leaf.grad if exempt is None else torch.where(exempt, want.grad.to(leaf.dtype), leaf.grad)
        errors = golden.loss_error(loss.detach(), want.loss), golden.gradient_error(got, want.grad, want.scale)
        found[name] = {"loss": errors[0], "gradient": errors[1]}
    return found


def near_convergence(divergence: str, kl: float, vocab: int) -> dict[str, Any]:
    """Relative error of the fp32 loss where the true KL is about `kl`."""
    student, teacher, _ = pair("near", "fp32", vocab, gap=(2 * kl) ** 0.5)
    want = golden.distill(student, teacher, divergence, *PARAMETERS[divergence])
    found: dict[str, Any] = {"divergence": divergence, "kl": kl, "true": float(want.loss.mean())}
    for name, call in subjects(divergence, "fp32").items():
        loss = call(divergence, student, teacher, 1.0)
        found[name] = float(((loss.double() - want.loss).abs() / want.loss).max())
    return found


def linear(divergence: str, dtype: str) -> dict[str, Any]:
    """Errors of hidden and weight gradients over four chunks, and of the exact ones rounded once."""
    case = Case(
        "linear", divergence, dtype, 256, 4096, H=128, Ht=192, chunk_bytes=64 * 2 * 4096 * (4 if dtype == "fp32" else 2)
    )
    given = inputs.make(case)
    want = checks.expected(case, given)
    assert want.hidden is not None
    assert want.weight is not None
    exact = {"dhidden": want.hidden, "dweight": want.weight}
    rounded = {name: g.to(inputs.DTYPES[dtype]) for name, g in exact.items()}
    found: dict[str, Any] = {"divergence": divergence, "dtype": dtype, "rounded": checks.gradient_errors(rounded, want)}
    for contestant in rivals.contestants(case):
        if not contestant.compiled and not contestant.missing():
            given.reset()
            runner = Runner(contestant, case, given)
            runner.once()
            errors = checks.gradient_errors(given.gradients(), want)
            found[contestant.name] = {"loss": abs(runner.value / float(want.loss.sum()) - 1), **errors}
            if contestant.value != "divergence":
                del found[contestant.name]["loss"]
    return found


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def measure(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """All errors."""
    vocab, names = (4096, ("forward_kl", "jsd")) if quick else (32000, (*MAIN, *OTHERS))
    dtypes = ("fp32", "bf16")
    found = {
        "dense": [dense(name, dtype, kind, vocab) for dtype in dtypes for name in names for kind in KINDS],
        "near_convergence": [near_convergence(name, kl, vocab) for name in names for kl in KLS],
        "linear": [linear(name, dtype) for dtype in dtypes for name in ("forward_kl", "jsd")],
    }
    return {part: [_short(entry) for entry in entries] for part, entries in found.items()}


if __name__ == "__main__":
    print(json.dumps(measure("--quick" in sys.argv)))
