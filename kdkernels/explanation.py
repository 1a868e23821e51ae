"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from kdkernels import arguments, backends, divergences
from kdkernels.divergences import Divergence
from kdkernels.logits import LinearLogits
from kdkernels.modules import PER_CALL, DistillationLoss
from kdkernels.sparse_logits import SparseLogits


class Explanation(NamedTuple):
    """The backend that serves a call, and the verdict on each; prints as a table."""

    backend: str
    verdicts: list[backends.Verdict]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        lines += [f"  {v.backend:<7}{'serves' if v.serves else 'no':<8}{v.reason}" for v in self.verdicts]
        return "\n".join(lines)


def explain(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogits | None = None,
    divergence: str | Divergence = "forward_kl",
    *,
    backend: str = "auto",
    **options: Any,
) -> Explanation:
    """Say which backend `kdkernels.distillation_loss` would take for these arguments, and why.

    Args:
        student: logits or `LinearLogits`; only device and dtype matter.
        teacher: only whether it is `SparseLogits` matters.
        divergence: name or object.
        backend: as in `kdkernels.distillation_loss`; an explicit choice that cannot serve raises here too.
        options: the call's other options; they are checked, and none of them changes the choice.

    Returns:
        An `Explanation`: ``print(kd.explain(student, teacher, "jsd"))``.
    """
    arguments.check_side("student", student)
    DistillationLoss(divergence, backend=backend, **{k: v for k, v in options.items() if k not in PER_CALL})
    student = arguments.under_autocast(student)
    kernel = divergences.get(divergence).kernel().name
    call = (student.device, student.dtype, kernel, isinstance(teacher, SparseLogits))
    return Explanation(backends.choose(backend, *call), backends.survey(*call))
