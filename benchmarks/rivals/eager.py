"""The formulas written down in PyTorch, each the best simple way we know.

KLs: ``F.kl_div(..., log_target=True)`` over ``F.log_softmax`` (PyTorch's documentation of KLDivLoss recommends log
targets "for numerical stability"). JSD: once through ``logaddexp`` (right everywhere) and once through ``log((p + q)
/ 2)``, which is faster and right unless p and q both underflow. bf16 logits are widened by
``log_softmax(dtype=float32)``: without it the JSD is 20 % off; `:bf16` does without, for the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import DenseInputs, Inputs
from benchmarks.rivals import Contestant, Loss
from benchmarks.shapes import MAIN, OTHERS, PARAMETERS, Case

Formula = Callable[[Tensor, Tensor, float, float], Tensor]
"""(log p of the teacher, log q of the student, parameters a, b) -> per-token divergence [N]."""


def _kl(of: Tensor, against: Tensor) -> Tensor:
    return F.kl_div(against, of, reduction="none", log_target=True).sum(-1)


def forward_kl(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """KL(teacher‖student)."""
    return _kl(lp, lq)


def reverse_kl(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """KL(student‖teacher)."""
    return _kl(lq, lp)


def jsd(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """a KL(p‖m) + (1 - a) KL(q‖m), m through logaddexp."""
    lm = torch.logaddexp(lp + math.log(a), lq + math.log1p(-a))
    return a * _kl(lp, lm) + (1 - a) * _kl(lq, lm)


def jsd_mean(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """The same through log(m); entries where both probabilities underflow would be 0 * inf without the clamp."""
    p, q = lp.exp(), lq.exp()
    lm = (a * p + (1 - a) * q).clamp_min(torch.finfo(lp.dtype).tiny).log()
    return (a * p * (lp - lm) + (1 - a) * q * (lq - lm)).sum(-1)


def skew_kl(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """KL(p‖a p + (1 - a) q)."""
    return _kl(lp, torch.logaddexp(lp + math.log(a), lq + math.log1p(-a)))


def skew_reverse_kl(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """KL(q‖(1 - a) p + a q)."""
    return _kl(lq, torch.logaddexp(lp + math.log1p(-a), lq + math.log(a)))


def total_variation(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """Half the L1 distance."""
    return 0.5 * (lp.exp() - lq.exp()).abs().sum(-1)


def alpha_beta(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """ABKD's divergence, a and b both positive."""
    s = a + b
    return -(((a * lp + b * lq).exp() - a / s * (s * lp).exp() - b / s * (s * lq).exp()).sum(-1)) / (a * b)


def adaptive_kl(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """Forward and reverse KL weighted by their disagreement on the teacher's head and tail."""
    with torch.no_grad():
        p = lp.exp()
        gap = (p - lq.exp()).abs()
        order = p.sort(stable=True, dim=-1, descending=True)
        head = torch.zeros_like(p, dtype=torch.bool)
        head.scatter_(-1, order.indices, order.values.cumsum(-1) - order.values < a)
        in_head = (gap * head).sum(-1)
        in_tail = gap.sum(-1) - in_head
    return (in_head * _kl(lp, lq) + in_tail * _kl(lq, lp)) / (in_head + in_tail)


FORMULAS: dict[str, Formula] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
}


def mean_loss(formula: Formula, a: float, b: float, widen: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """(student logits, teacher logits) -> mean over tokens; `widen`: softmax in fp32 whatever the logits' dtype."""
    dtype = torch.float32 if widen else None

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        lq = F.log_softmax(student, dim=-1, dtype=dtype)
        lp = F.log_softmax(teacher, dim=-1, dtype=dtype)
        return formula(lp, lq, a, b).mean()

    return loss


def linear_loss(dense: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same from hidden states and heads; the teacher's side without a graph."""

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(teacher_hidden, teacher_weight)
        return dense(F.linear(hidden, weight), teacher)

    return loss


def builder(
    formulas: dict[str, Formula], widen: bool, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> Callable[[Case], Loss]:
    """Builds a contestant from formulas; `wrap` is the identity, or torch.compile."""

    def build(case: Case) -> Loss:
        dense = mean_loss(formulas[case.divergence], *PARAMETERS[case.divergence], widen)
        call = wrap(dense if case.op == "dense" else linear_loss(dense))

        def run(inputs: Inputs) -> Tensor:
            if isinstance(inputs, DenseInputs):
                return call(*inputs.student(), inputs.teacher)
            return call(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight)

        return run

    return build


def as_it_is(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """No wrapping."""
    return call


SOURCE = "torch.nn.KLDivLoss (log_target), torch.nn.functional.log_softmax(dtype=...)"
BOTH = ("dense", "linear")

CONTESTANTS = [
    Contestant("eager", builder(FORMULAS, True, as_it_is), SOURCE, ops=BOTH, divergences=(*MAIN, *OTHERS)),
    Contestant("eager:mean", builder({"jsd": jsd_mean}, True, as_it_is), SOURCE, ops=BOTH, divergences=("jsd",)),
    Contestant(
        "eager:bf16", builder(FORMULAS, False, as_it_is), SOURCE, ops=BOTH, dtypes=("bf16",), arithmetic="input"
    ),
]
