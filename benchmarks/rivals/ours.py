"""kdkernels, and the bare matrix products that a fused head cannot do without."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import DenseInputs, Inputs
from benchmarks.rivals import Contestant, Loss
from benchmarks.shapes import MAIN, OTHERS, PARAMETERS, Case

CLASSES = {
    "forward_kl": "ForwardKL",
    "reverse_kl": "ReverseKL",
    "jsd": "JSD",
    "skew_kl": "SkewKL",
    "skew_reverse_kl": "SkewReverseKL",
    "total_variation": "TotalVariation",
    "alpha_beta": "AlphaBeta",
    "adaptive_kl": "AdaptiveKL",
}
ARGUMENTS = {"jsd": 1, "skew_kl": 1, "skew_reverse_kl": 1, "alpha_beta": 2, "adaptive_kl": 1}


def divergence(name: str) -> Any:
    """The divergence object of a case, with the parameters of `shapes.PARAMETERS`."""
    import kdkernels as kd

    return getattr(kd, CLASSES[name])(*PARAMETERS[name][: ARGUMENTS.get(name, 0)])


def _build(inplace: bool) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        import kdkernels as kd

        chosen = divergence(case.divergence)

        def run(inputs: Inputs) -> Tensor:
            if isinstance(inputs, DenseInputs):
                (logits,) = inputs.student()
                return kd.distillation_loss(logits, inputs.teacher, chosen, inplace=inplace)
            student = kd.LinearLogits(inputs.hidden, inputs.weight)
            teacher = kd.LinearLogits(inputs.teacher_hidden, inputs.teacher_weight)
            return kd.distillation_loss(student, teacher, chosen, chunk_bytes=case.chunk_bytes)

        return run

    return build


def chunk_rows(case: Case) -> int:
    """Rows in one of our chunks of a fused-linear case."""
    from kdkernels import chunking

    return chunking.chunk_rows(case.N, 2 * case.V * case.itemsize, case.chunk_bytes)


def bare_products(case: Case, inputs: Inputs) -> Callable[[], float]:
    """Teacher's logits, student's logits, dX and dW by `torch.mm` on our row chunks, into tensors that exist already.

    Returns a sampler: seconds of the four products over all chunks.
    """
    assert not isinstance(inputs, DenseInputs)
    rows = chunk_rows(case)
    student = torch.zeros(rows, case.V, dtype=inputs.hidden.dtype)
    teacher = torch.zeros_like(student)
    dhidden, dweight = torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def run() -> float:
        start = time.perf_counter()
        for begin in range(0, case.N, rows):
            end = min(begin + rows, case.N)
            n = end - begin
            torch.mm(inputs.teacher_hidden[begin:end], inputs.teacher_weight.t(), out=teacher[:n])
            torch.mm(hidden[begin:end], weight.t(), out=student[:n])
            torch.mm(student[:n], weight, out=dhidden[begin:end])
            torch.mm(student[:n].t(), hidden[begin:end], out=dweight)
        return time.perf_counter() - start

    return run


CONTESTANTS = [
    Contestant(
        "ours",
        _build(False),
        "kd.distillation_loss, defaults",
        ops=("dense", "linear"),
        divergences=(*MAIN, *OTHERS),
        packages=("kdkernels",),
    ),
    Contestant(
        "ours:inplace",
        _build(True),
        "kd.distillation_loss(inplace=True)",
        divergences=(*MAIN, *OTHERS),
        packages=("kdkernels",),
        overwrites=True,
    ),
]
