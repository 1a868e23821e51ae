"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from kdkernels import arguments, backends, divergences
from kdkernels._checks import fail
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
        divergence: name or object; ``"switch_gate"`` asks for `kdkernels.switch_gate` instead, and
            then there are no ``options``.
        backend: as in `kdkernels.distillation_loss`; an explicit choice that cannot serve raises here too.
        options: the call's other options; they are checked. ``group`` (or DTensors) asks for rows in vocabulary shards,
            which fewer backends compute; none of the others changes the choice.

    Returns:
        An `Explanation`: ``print(kd.explain(student, teacher, "jsd"))``.
    """
    if divergence == "switch_gate":
        return _explain_gate(student, backend, options)
    sharded = options.get("group") is not None or arguments.holds_dtensors(student, teacher)
    if sharded:
        from kdkernels import vocab_parallel  # brings torch.distributed

        student = vocab_parallel.with_columns(student)
    arguments.check_side("student", student)
    DistillationLoss(divergence, backend=backend, **{k: v for k, v in options.items() if k not in PER_CALL})
    student = arguments.under_autocast(student)
    kernel = divergences.get(divergence).kernel().name
    call = (student.device, student.dtype, kernel, isinstance(teacher, SparseLogits))
    if sharded:
        return Explanation(vocab_parallel.serving_backend(backend, *call), vocab_parallel.survey(*call))
    return Explanation(backends.choose(backend, *call), backends.survey(*call))


def _explain_gate(student: Tensor | LinearLogits, backend: str, options: dict[str, Any]) -> Explanation:
    if options:
        fail(ValueError, "options", sorted(options), "none for 'switch_gate'", "leave them away")
    arguments.check_side("student", student)
    student = arguments.under_autocast(student)
    call = (student.device, student.dtype, backends.GATE)
    return Explanation(backends.choose(backend, *call), backends.survey(*call))
