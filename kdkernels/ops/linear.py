"""``kdkernels::linear`` and ``kdkernels::linear_sparse``: the divergence from hidden states and LM heads."""

from __future__ import annotations

from torch import Tensor

from kdkernels.ops import head
from kdkernels.ops.head import Plan, Source, Wanted
from kdkernels.ops.library import EVERY_DEVICE, LIBRARY
from kdkernels.ops.rows import RowSpec
from kdkernels.ops.sparse import SparseRows
from kdkernels.weights import RowWeights

_STUDENT = "Tensor student, Tensor? student_weight, Tensor? student_bias, float student_scale, float student_softcap, "
_WEIGHTS = "Tensor w_kd, Tensor? w_ce, Tensor? labels, str kernel, float a, float b, float temperature, SymInt vocab, "
_REST = (
    "SymInt chunk_rows, str backend, bool per_row, bool need_input, bool need_weight, bool need_bias, bool need_stats) "
    "-> (Tensor loss, Tensor d_student, Tensor d_weight, Tensor d_bias, Tensor stats)"
)
LIBRARY.define(
    f"linear({_STUDENT}Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, "
    f"float teacher_softcap, {_WEIGHTS}{_REST}"
)
LIBRARY.define(f"linear_sparse({_STUDENT}Tensor ids, Tensor log_probs, Tensor log_tail, {_WEIGHTS}str mode, {_REST}")


def linear(
    student: Tensor, student_weight: Tensor | None, student_bias: Tensor | None,
    student_scale: float, student_softcap: float,
    teacher: Tensor, teacher_weight: Tensor | None, teacher_bias: Tensor | None,
    teacher_scale: float, teacher_softcap: float,
    w_kd: Tensor, w_ce: Tensor | None, labels: Tensor | None,
    kernel: str, a: float, b: float, temperature: float, vocab: int, chunk_rows: int, backend: str,
    per_row: bool, need_input: bool, need_weight: bool, need_bias: bool, need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, gradients and statistics from hidden states and heads.

    Args:
        student, teacher: hidden states ``[N, H]`` (H may differ) or, where the head is None, logits ``[N, >= vocab]``.
        student_weight, teacher_weight: heads ``[V, H]``; biases ``[V]``; scale (1: none); softcap (0: none).
        w_kd, w_ce, labels, kernel, a, b, temperature, vocab: as in ``kdkernels::dense``.
        chunk_rows: rows whose logits exist at a time.
        backend: one that serves.
        per_row: ``loss`` is ``[N]`` and the gradients are left to the backward, which computes the logits again with
            the gradient that arrives there; otherwise ``loss`` is the sum ``[]`` and the gradients come with it.
        need_input, need_weight, need_bias: which gradients are wanted.
        need_stats: whether ``stats [N, 6]`` is wanted.

    Returns:
        ``loss``, and ``d_student``, ``d_weight``, ``d_bias``, ``stats`` where wanted now, else empty ``[0]``.
    """
    plan = Plan(
        Source(student, student_weight, student_bias, student_scale, student_softcap),
        Source(teacher, teacher_weight, teacher_bias, teacher_scale, teacher_softcap),
        RowWeights(w_kd, w_ce, labels),
        RowSpec(kernel, a, b, temperature, vocab),
        backend,
        chunk_rows,
    )
    return head.run(plan, per_row, Wanted(need_input, need_weight, need_bias), need_stats)


def linear_sparse(
    student: Tensor, student_weight: Tensor | None, student_bias: Tensor | None,
    student_scale: float, student_softcap: float,
    ids: Tensor, log_probs: Tensor, log_tail: Tensor,
    w_kd: Tensor, w_ce: Tensor | None, labels: Tensor | None,
    kernel: str, a: float, b: float, temperature: float, vocab: int, mode: str, chunk_rows: int, backend: str,
    per_row: bool, need_input: bool, need_weight: bool, need_bias: bool, need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`linear` with the teacher of ``kdkernels::sparse``: its rows are sliced, nothing is multiplied."""
    plan = Plan(
        Source(student, student_weight, student_bias, student_scale, student_softcap),
        SparseRows(ids, log_probs, log_tail),
        RowWeights(w_kd, w_ce, labels),
        RowSpec(kernel, a, b, temperature, vocab, mode),
        backend,
        chunk_rows,
    )
    return head.run(plan, per_row, Wanted(need_input, need_weight, need_bias), need_stats)


LIBRARY.impl("linear", linear, EVERY_DEVICE)
LIBRARY.impl("linear_sparse", linear_sparse, EVERY_DEVICE)
head.register("linear", inputs=25, w_kd=10)
head.register("linear_sparse", inputs=24, w_kd=8)
