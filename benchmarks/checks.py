"""Every contestant is right before it is timed: the same mathematics on small inputs in fp32 against float64
(golden.py), and the same result as the reference on the inputs that are timed. A red check means no time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.rivals import Contestant
from benchmarks.runner import Runner
from benchmarks.shapes import PARAMETERS, Case
from python_tests import golden

SAME_MATHEMATICS = 1e-5
"""Bound on the errors in fp32 on small ordinary inputs: far above rounding, far below any other formula."""

BOUNDS = {("fp32", "fp32"): 1e-4, ("fp32", "input"): 1e-4, ("bf16", "fp32"): 0.03, ("bf16", "input"): 0.6}
"""(dtype, arithmetic) -> bound against the reference on the timed inputs. The reference's own logits are rounded to
bf16, which alone makes 1 %. Losses computed in bf16 throughout can be tens of per cent off (their error is in the
JSON): their bound only keeps out another loss."""


def small(case: Case, dtype: str = "fp32") -> Case:
    """The same call on 16 x 301 logits, for fused heads in three chunks."""
    if case.op == "dense":
        return replace(case, dtype=dtype, N=16, V=301)
    return replace(case, dtype=dtype, N=16, V=301, H=24, Ht=40, chunk_bytes=6 * 301 * 8)


def expected(case: Case, given: inputs.Inputs) -> golden.Golden:
    """Float64 results of the mean loss on these inputs."""
    if isinstance(given, inputs.DenseInputs):
        student, teacher = golden.Side(given.buffer), golden.Side(given.teacher)
    else:
        student = golden.Side(given.hidden.detach(), given.weight.detach())
        teacher = golden.Side(given.teacher_hidden, given.teacher_weight)
    return golden.distill(student, teacher, case.divergence, *PARAMETERS[case.divergence], w_kd=1.0 / case.N)


def gradient_errors(got: dict[str, Tensor], want: golden.Golden) -> dict[str, float]:
    """The worst row's error of each gradient over its natural scale."""
    known: dict[str, tuple[Any, Any]] = {
        "dlogits": (want.grad, want.scale),
        "dhidden": (want.hidden, want.hidden_scale),
        "dweight": (want.weight, want.weight_scale),
    }
    return {name: golden.gradient_error(g, *known[name]) for name, g in got.items()}


def tiny(contestant: Contestant, case: Case) -> str:
    """Runs a contestant in fp32 on 16 x 301 logits against float64. Returns what is wrong, "" if nothing.

    Compiled ones are not run: the same formula runs uncompiled as another contestant, and `against` checks what the
    compiler made of it.
    """
    if contestant.compiled:
        return ""
    case = small(case)
    given = inputs.make(case, seed=1)
    want = expected(case, given)  # before an in-place contestant overwrites the logits
    value = want.loss.sum()
    if contestant.value == "cross_entropy":
        value = value + want.stats[:, 1].mean()
    runner = Runner(contestant, case, given)
    runner.once()
    found = {"loss": golden.loss_error(torch.tensor(runner.value), value), **gradient_errors(given.gradients(), want)}
    wrong = {name: error for name, error in found.items() if not error <= SAME_MATHEMATICS}
    return f"another loss: errors {wrong} against float64" if wrong else ""


def _distance(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` by blocks of rows, so that nothing of full size is widened."""
    difference = size = 0.0
    for a, b in zip(got.split(64), want.split(64), strict=True):
        wide = b.float()
        difference += float((a.float() - wide).square().sum(dtype=torch.float64))
        size += float(wide.square().sum(dtype=torch.float64))
    return (difference / size) ** 0.5 if size else float(difference > 0)


def against(runner: Runner, gradients: dict[str, Tensor], value: float) -> dict[str, float]:
    """Distance of what a runner just computed from the reference's gradients and loss, relative."""
    got = runner.inputs.gradients()
    errors = {name: _distance(got[name], want) for name, want in gradients.items()}
    if runner.contestant.value == "divergence":
        errors["loss"] = abs(runner.value - value) / abs(value)
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def red(contestant: Contestant, case: Case, errors: dict[str, float]) -> str:
    """What is wrong with these distances, "" if nothing."""
    bound = BOUNDS[case.dtype, contestant.arithmetic]
    if case.divergence == "total_variation":
        bound *= 10  # its gradient jumps where p = q, and of 65 million entries rounding decides some
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    return f"differs from the reference on the timed inputs: {wrong}, bound {bound}" if wrong else ""
