"""What `kdkernels.distillation_loss` promises, from golden.py and one loop over tokens, and the comparison with it.

`check` runs one call forward and backward and compares loss, statistics and every gradient with float64. Gradients are
measured against the natural scale of golden.py, which shrinks with the weights: a gradient of zeros never passes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import golden
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence

Logits = Tensor | kd.LinearLogits
LOW = (torch.bfloat16, torch.float16)
NEGLIGIBLE = 1e-30  # what the smallest exponential of a masked entry, 1.6e-38, becomes in a product
EXEMPT = 1e-5  # of q: closer than that, rounding decides the sign of p - q (total variation)


class Token(NamedTuple):
    """How much one position counts, and the label that judges it (-1: none)."""

    counts: bool
    weight: float
    label: int


def tokens(leading: tuple[int, ...], options: dict[str, Any]) -> list[Token]:
    """The promise about labels, weights, shift and ignore_index, token by token."""
    labels, weights = options.get("labels"), options.get("token_weights")
    result = []
    for place in itertools.product(*(range(n) for n in leading)):
        judge = place
        if options.get("shift"):
            judge = (*place[:-1], place[-1] + 1)
            if judge[-1] == leading[-1]:
                result.append(Token(False, 0.0, -1))
                continue
        label = -1 if labels is None else int(labels[judge])
        weight = 1.0 if weights is None else float(weights[judge])
        ignored = labels is not None and label == options.get("ignore_index", -100)
        result.append(Token(not ignored and weight != 0, weight, -1 if ignored else label))
    return result


@dataclasses.dataclass
class Call:
    """One call's arguments. `incoming`: the gradient that reaches the loss, a number or [N] (reduction="none")."""

    student: Logits
    teacher: Logits
    divergence: Divergence
    options: dict[str, Any]
    incoming: Tensor | float = 1.0

    def option(self, name: str, default: Any) -> Any:
        return self.options.get(name, default)

    @property
    def vocab(self) -> int:
        return int(self.option("vocab_size", None) or self.student.shape[-1])

    @property
    def temperature(self) -> float:
        return float(self.option("temperature", 1.0))

    def keep(self, rows: Tensor) -> Tensor:
        """[N] as the leading shape of the logits, one position shorter with shift."""
        rows = rows.reshape(self.student.shape[:-1])
        return rows[..., :-1] if self.option("shift", False) else rows

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w_kd and w_ce [N] float64, labels [N] and which rows count [N]."""
        table = tokens(tuple(self.student.shape[:-1]), self.options)
        counted = torch.tensor([t.counts for t in table], dtype=torch.bool)
        weight = torch.tensor([t.weight if t.counts else 0.0 for t in table], dtype=torch.float64)
        if self.option("reduction", "mean") == "mean":
            items = self.option("num_items", None)
            weight = weight / (max(1, int(counted.sum())) if items is None else float(items))
        squared = self.temperature**2 if self.option("temperature_scaling", "none") == "t2" else 1.0
        labels = torch.tensor([t.label for t in table], dtype=torch.int64)
        return weight * self.option("kd_weight", 1.0) * squared, weight * self.option("ce_weight", 0.0), labels, counted

    def golden(self, student: golden.Side, teacher: golden.Side) -> golden.Golden:
        """Float64 rows; gradients include the incoming gradient."""
        w_kd, w_ce, labels, _ = self.weights()
        return golden.distill(
            student,
            teacher,
            self.divergence.name,
            *dataclasses.astuple(self.divergence),
            temperature=self.temperature,
            w_kd=w_kd * self.incoming,
            w_ce=w_ce * self.incoming,
            labels=None if self.option("labels", None) is None else labels,
            vocab=self.vocab,
        )


def side(logits: Logits) -> golden.Side:
    """The same side for golden.py, leading dimensions flattened."""
    if isinstance(logits, Tensor):
        return golden.Side(flat(logits.detach()))
    bias = None if logits.bias is None else logits.bias.detach()
    return golden.Side(flat(logits.hidden.detach()), logits.weight.detach(), bias, logits.scale, logits.softcap)


def flat(x: Tensor) -> Tensor:
    """[..., V] as [N, V]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def check(
    student: Logits,
    teacher: Logits,
    divergence: Divergence | str = "forward_kl",
    *,
    backend: str,
    incoming: Tensor | float = 1.0,
    need: tuple[str, ...] = ("logits", "hidden", "weight", "bias"),
    **options: Any,
) -> None:
    """One call, forward and backward, against float64; `need` says which parts of the student require grad."""
    call = Call(student, teacher, kd.divergences.get(divergence), options, incoming)
    leaves = _leaves(student, need)
    argument = _with_leaves(student, leaves)
    if options.get("inplace") and isinstance(argument, Tensor):
        argument = argument.clone()
    output = kd.distillation_loss(argument, teacher, call.divergence, backend=backend, return_stats=True, **options)
    rows = call.golden(side(student), side(teacher))
    unit = rows
    if isinstance(incoming, Tensor) or incoming != 1:
        unit = dataclasses.replace(call, incoming=1.0).golden(side(student), side(teacher))
    compare_loss(output.loss, unit, call)
    compare_stats(output.stats, unit, call)
    assert output.loss.requires_grad == bool(leaves)
    if leaves:
        arriving = torch.as_tensor(incoming, dtype=output.loss.dtype)
        arriving = call.keep(arriving.expand(len(rows.loss))) if options.get("reduction") == "none" else arriving
        gradients = torch.autograd.grad(output.loss, list(leaves.values()), arriving)
        compare_gradients(dict(zip(leaves, gradients, strict=True)), rows, call)


def _leaves(student: Logits, need: tuple[str, ...]) -> dict[str, Tensor]:
    if isinstance(student, Tensor):
        parts = {"logits": student}
    else:
        parts = {"hidden": student.hidden, "weight": student.weight, "bias": student.bias}
    return {k: v.detach().requires_grad_() for k, v in parts.items() if k in need and v is not None}


def _with_leaves(student: Logits, leaves: dict[str, Tensor]) -> Logits:
    if isinstance(student, Tensor):
        return leaves.get("logits", student)
    return dataclasses.replace(student, **leaves)


def loss_tolerance(dtype: torch.dtype) -> float:
    """Of max(1 nat, D)."""
    return 1e-11 if dtype == torch.float64 else 1e-6


def gradient_tolerance(call: Call) -> float:
    """Of the natural scale. Logits made by a GEMM carry its rounding errors, a few eps each."""
    tolerance = 5e-6 if call.divergence.name == "total_variation" else 1e-6
    if call.divergence == kd.AlphaBeta(0.0, 0.0):
        tolerance *= 3  # its gradient is log q - log p, with the rounding errors of logarithms of size 400 at T = .05
    if not isinstance(call.student, Tensor) or not isinstance(call.teacher, Tensor):
        tolerance *= 3
    return tolerance * 1e-5 if call.student.dtype == torch.float64 else tolerance


def compare_loss(actual: Tensor, rows: golden.Golden, call: Call) -> None:
    """Value, dtype and shape; NaN where and only where it is due."""
    assert actual.dtype == (torch.float64 if call.student.dtype == torch.float64 else torch.float32)
    w_kd, w_ce, _, _ = call.weights()
    value, nll = rows.stats[:, 0], rows.stats[:, 4]
    losses = torch.where(w_kd == 0, 0.0, w_kd * value) + torch.where(w_ce == 0, 0.0, w_ce * nll)
    sizes = w_kd * value.abs().clamp(min=1) + w_ce * nll.clamp(min=1)
    if call.option("reduction", "mean") == "none":
        losses, sizes = call.keep(losses), call.keep(sizes)
    else:
        losses, sizes = losses.sum(), sizes.sum()
    assert actual.shape == losses.shape
    assert_within("loss", actual.detach(), losses, loss_tolerance(call.student.dtype) * _made_by_gemm(call) * sizes)


def compare_stats(actual: kd.DistillationStats, rows: golden.Golden, call: Call) -> None:
    """Figures of the tokens that count; zeros elsewhere."""
    tolerance = 2 * loss_tolerance(call.student.dtype) * _made_by_gemm(call)
    assert torch.equal(actual.counted, call.keep(call.weights()[3]))
    for name, value, column in zip(actual._fields, actual[:-1], rows.stats.unbind(-1), strict=False):
        reference = call.keep(column)
        assert value.shape == reference.shape, name
        assert not value.requires_grad, name
        assert_within(name, value, reference, tolerance * reference.abs().clamp(min=1))


def assert_within(name: str, actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Numbers of one shape, NaN where and only where it is due; the message shows the worst."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN at {actual.isnan()}, due at {expected.isnan()}"
    error = (actual.double() - expected).abs().nan_to_num()
    wrong = error > allowed.nan_to_num()
    if wrong.any():
        worst = (error / allowed.clamp(min=1e-300)).nan_to_num().argmax()
        numbers = (float(x.expand(wrong.shape).flatten()[worst]) for x in (actual, expected, error, allowed))
        text = "{:.9g} instead of {:.9g}, off by {:.3g}, allowed {:.3g}".format(*numbers)
        raise AssertionError(f"{name}: {text}; {int(wrong.sum())} of {wrong.numel()} wrong")


def _made_by_gemm(call: Call) -> float:
    """Logits that a GEMM rounds to bf16 or fp16 are themselves that far off; in float32 a few eps."""
    if isinstance(call.student, Tensor) and isinstance(call.teacher, Tensor):
        return 1.0
    return {torch.bfloat16: 2e4, torch.float16: 2.5e3}.get(call.student.dtype, 4.0)


def compare_gradients(actual: dict[str, Tensor], rows: golden.Golden, call: Call) -> None:
    """Within the tolerance of the natural scale; low precision within twice the error of a correct rounding."""
    low = call.student.dtype in LOW
    if isinstance(call.student, Tensor):
        truth = {"logits": (rows.grad, rows.scale)}
        rounded = {"logits": rows.grad.to(call.student.dtype)} if low else {}
    else:
        truth = {
            "hidden": (rows.hidden, rows.hidden_scale),
            "weight": (rows.weight, rows.weight_scale),
            "bias": (rows.bias, rows.bias_scale),
        }
        rounded = _plain_gradients(call, call.student) if low else {}
    for name, gradient in actual.items():
        reference, scale = truth[name]
        value = gradient if name == "bias" else flat(gradient)
        assert value.dtype == call.student.dtype
        assert value.shape == reference.shape, name
        due = reference.isnan()
        assert torch.equal(value.isnan(), due), f"gradient of {name}: {value.isnan().sum()} NaN, due {due.sum()}"
        error, tolerance = _norm(value.double() - reference), gradient_tolerance(call) * scale + NEGLIGIBLE
        if name in rounded:
            unavoidable = _norm(rounded[name].double() - reference)
            if name in ("hidden", "weight"):  # rows of a product are now lucky, now not: all of it within twice
                slack = _chunk_rounding(name, rows, call)
                limit = 2 * unavoidable.norm() + (tolerance + slack / 2).norm()
                assert error.norm() <= limit, f"gradient of {name}: error {error.norm()}, allowed {limit}"
                unavoidable = unavoidable + slack
            tolerance = tolerance + 2 * unavoidable
            if _rounded_twice(call):  # one of the two may be unlucky
                tolerance = tolerance.maximum(torch.finfo(call.student.dtype).eps * _norm(reference))
        if name == "logits":
            tolerance = tolerance + _sign_slack(call, rows)
        assert_within(f"norm of the error in the gradient of {name}", error, torch.zeros_like(error), tolerance)


def _chunk_rounding(name: str, rows: golden.Golden, call: Call) -> Tensor:
    """What rounding each chunk's product of the head's gradient adds, with chunks of one row: errors in quadrature."""
    eps = torch.finfo(call.student.dtype).eps
    if name == "hidden":
        return eps / 2 * _norm(rows.hidden)
    return eps * _norm((rows.grad.square().T @ side(call.student).x.nan_to_num().double().square()).sqrt())


def _rounded_twice(call: Call) -> bool:
    """An arriving gradient other than 1 multiplies what is stored, and so does float16's divisor of the mean."""
    divided = call.student.dtype == torch.float16 and call.option("reduction", "mean") == "mean"
    return divided or not isinstance(call.incoming, float) or call.incoming != 1


def _norm(x: Tensor) -> Tensor:
    return x.nan_to_num().norm(dim=-1)


def _sign_slack(call: Call, rows: golden.Golden) -> Tensor | float:
    """Total variation: how far the entries whose sign is decided by rounding may move a row's gradient, [N]."""
    if call.divergence.name != "total_variation":
        return 0.0
    logits = [x if isinstance(x, Tensor) else x.materialize() for x in (call.student, call.teacher)]
    q, p = (flat(z.detach().double())[:, : call.vocab].div(call.temperature).softmax(-1) for z in logits)
    exempt = torch.where((p - q).abs() < EXEMPT * q, q, 0.0)
    moved = exempt + q * exempt.sum(-1, keepdim=True)
    return (_norm(moved) * rows.scale / (p + q).norm(dim=-1)).nan_to_num()


def _plain_gradients(call: Call, student: kd.LinearLogits) -> dict[str, Tensor]:
    """What careful torch gets in this dtype: logits rounded, a perfect divergence, its gradient rounded, two GEMMs."""
    parts = side(student)
    assert parts.weight is not None
    x = parts.x.nan_to_num()
    stored = golden.Side(x @ parts.weight.T, None, *parts[2:])
    teacher = side(call.teacher)
    if teacher.weight is not None:
        teacher = golden.Side(teacher.x.nan_to_num() @ teacher.weight.T, None, *teacher[2:])
    grad = call.golden(stored, teacher).grad.to(student.dtype)
    return {"hidden": grad @ parts.weight, "weight": grad.T @ x, "bias": grad.double().sum(0).to(student.dtype)}
