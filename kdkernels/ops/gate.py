"""``kdkernels::gate``: who speaks at the next position, the student or its teacher, and what it says.

Both rows are read from memory once. Nothing here has an autograd: no gradient passes through a choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import eager_gate, leaves, memory
from kdkernels.ops.head import Source, _without_autocast
from kdkernels.ops.library import EVERY_DEVICE, LIBRARY
from kdkernels.ops.rows import Side

LIBRARY.define(
    "gate(Tensor student, Tensor? student_weight, Tensor? student_bias, float student_scale, float student_softcap, "
    "Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, float teacher_softcap, "
    "Tensor threshold, Tensor? uniforms, float temperature, SymInt top_k, float top_p, SymInt vocab, str backend) "
    "-> (Tensor token, Tensor from_teacher, Tensor jsd)"
)


class SwitchDecision(NamedTuple):
    """What the gate says about each of B rows."""

    token: Tensor
    """int64 ``[B]``; -1 where there is none, which only devices whose values are not looked at return."""
    from_teacher: Tensor
    """bool ``[B]``: jsd > threshold."""
    jsd: Tensor
    """float32 ``[B]`` (float64 for float64 logits): Jensen-Shannon divergence in bits, in [0, 1]."""


class Sampling(NamedTuple):
    """How a token is drawn; the divergence knows nothing of it."""

    uniforms: Tensor | None
    """float64 ``[B]`` in [0, 1); None: the most likely entry, of equal ones the lowest id."""
    temperature: float = 1.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0


def gate_rows_(
    backend: str, student: Side, teacher: Side, threshold: Tensor, sampling: Sampling, vocab: int, out: SwitchDecision
) -> None:
    """Fill ``out`` with one backend. csrc/gate.h says what each number means.

    Args:
        backend: one that serves `kdkernels.backends.GATE`.
        student, teacher: B rows each; dtypes may differ, but both are float64 or neither.
        threshold: float64 ``[B]``, in bits.
        sampling: of the token.
        vocab: entries that exist.
        out: token -1, from_teacher False and jsd NaN for a row of which a side has NaN, +inf or nothing but -inf, or
            whose threshold is NaN; token -1 alone where the uniform number is not in [0, 1).
    """
    if backend == "eager":
        eager_gate.gate_rows_(student, teacher, threshold, sampling, vocab, out)
        return
    if backend == "triton":
        from kdkernels.triton import gate_host  # imports triton

        gate_host.gate_rows_(student, teacher, threshold, sampling, vocab, out)
        return
    leaves.gate_(*student, *teacher, threshold, *sampling, vocab, *out)


def _outputs(student: Tensor, teacher: Tensor) -> SwitchDecision:
    rows, device = student.shape[0], student.device
    wide = torch.float64 in (student.dtype, teacher.dtype)
    return SwitchDecision(
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
        torch.empty(rows, dtype=torch.float64 if wide else torch.float32, device=device),
    )


def _side(source: Source, vocab: int, wide: bool) -> Side:
    """The rows' logits; those of a head are made here, all at once: a step of generation has few rows."""
    like = source.input
    shape = source.chunk_shape(like.shape[0], vocab)
    side = source.chunk(like, vocab, None if shape is None else memory.empty(shape, like.dtype, like.device))
    if wide and side.x.dtype != torch.float64:
        return side._replace(x=side.x.double(), bias=None if side.bias is None else side.bias.double())
    return side


def gate(
    student: Tensor, student_weight: Tensor | None, student_bias: Tensor | None, student_scale: float,
    student_softcap: float, teacher: Tensor, teacher_weight: Tensor | None, teacher_bias: Tensor | None,
    teacher_scale: float, teacher_softcap: float, threshold: Tensor, uniforms: Tensor | None, temperature: float,
    top_k: int, top_p: float, vocab: int, backend: str,
) -> SwitchDecision:  # fmt: skip
    """The gate on B rows.

    Args:
        student, student_weight, student_bias, student_scale, student_softcap: hidden states ``[B, H]`` and the head
            or, where the weight is None, logits ``[B, >= vocab]``, unit stride along the vocabulary; scale (1: none),
            softcap (0: none).
        teacher, teacher_weight, teacher_bias, teacher_scale, teacher_softcap: likewise.
        threshold: float64 ``[B]``, bits.
        uniforms: float64 ``[B]``, or None for the most likely entry.
        temperature, top_k, top_p: of the draw; top_k 0 and top_p 1 mean all.
        vocab: entries that exist; columns beyond are padding.
        backend: one that serves (see `kdkernels.backends`).
    """
    out = _outputs(student, teacher)
    ours = Source(student, student_weight, student_bias, student_scale, student_softcap)
    theirs = Source(teacher, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    sampling = Sampling(uniforms, temperature, top_k, top_p)
    if student.dtype == teacher.dtype and ours[1:] == theirs[1:] == _PLAIN:
        gate_rows_(backend, Side(student), Side(teacher), threshold, sampling, vocab, out)
        return out
    wide = out.jsd.dtype == torch.float64
    with _without_autocast(student.device.type):
        sides = _side(ours, vocab, wide), _side(theirs, vocab, wide)
        gate_rows_(backend, *sides, threshold, sampling, vocab, out)
    return out


_PLAIN = (None, None, 1.0, 0.0)
"""The head of logits that are given as they are."""


LIBRARY.impl("gate", gate, EVERY_DEVICE)


@torch.library.register_fake("kdkernels::gate", lib=LIBRARY)
def _fake_gate(student: Tensor, *args: Any) -> SwitchDecision:
    return _outputs(student, args[4])
