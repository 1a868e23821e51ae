"""Thin typed wrappers of the native leaves, ``kdkernels_C::*``; `kdkernels.native` knows whether they can be called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import native


def dense_(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    w_kd: Tensor,
    w_ce: Tensor | None,
    labels: Tensor | None,
    kernel: int,
    a: float,
    b: float,
    temperature: float,
    vocab: int,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Rows of a divergence on the CPU; loss, gradient and statistics are written into the last three arguments.

    student, teacher [N, >= vocab] of one dtype (float32, float16, bfloat16, float64), unit stride along the
    vocabulary; biases [vocab], w_kd, w_ce, loss [N] and stats [N, 6] in float32 (float64 for float64 logits);
    labels [N] int64; dlogits like student, which it may be. `kernel` comes from `kernel_id`, a and b are the
    divergence's parameters; csrc/kernels.h says what each argument means. Raises RuntimeError naming the one
    at fault.
    """
    if not native.available():
        raise RuntimeError(f"kdkernels: no native kernels: {native.reason()}")
    torch.ops.kdkernels_C.dense_.default(
        student, teacher, student_bias, teacher_bias,
        student_scale, student_softcap, teacher_scale, teacher_softcap,
        w_kd, w_ce, labels, kernel, a, b, temperature, vocab, loss, dlogits, stats,
    )  # fmt: skip


def sparse_(
    student: Tensor,
    student_bias: Tensor | None,
    student_scale: float,
    student_softcap: float,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    w_kd: Tensor,
    w_ce: Tensor | None,
    labels: Tensor | None,
    kernel: int,
    a: float,
    b: float,
    excess: float,
    mode: int,
    temperature: float,
    vocab: int,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """`dense_` for a teacher of which K entries a row are known.

    ids [N, K] int32, log_probs [N, K] and log_tail [N] in the dtype of the loss, contiguous; mode counts
    `kdkernels.ops.sparse.MODES`, excess is that of the divergence. Other arguments as for `dense_`.
    """
    if not native.available():
        raise RuntimeError(f"kdkernels: no native kernels: {native.reason()}")
    torch.ops.kdkernels_C.sparse_.default(
        student, student_bias, student_scale, student_softcap, ids, log_probs, log_tail,
        w_kd, w_ce, labels, kernel, a, b, excess, mode, temperature, vocab, loss, dlogits, stats,
    )  # fmt: skip


def kl_onchip_(
    student: Tensor,
    teacher: Tensor,
    w_kd: Tensor,
    reverse: bool,
    temperature: float,
    vocab: int,
    cluster: int,
    stages: int,
    loss: Tensor,
    dlogits: Tensor | None,
) -> None:
    """Rows of forward or reverse KL on a GPU of compute capability 9.0 or later; writes ``loss`` and ``dlogits``.

    student, teacher, dlogits [N, >= vocab] of float32, bfloat16 or float16, rows at 16-byte boundaries; w_kd, loss
    float32 [N]. cluster, stages: a `kdkernels.onchip.Plan`. Raises RuntimeError naming the argument at fault.
    """
    torch.ops.kdkernels_C.kl_onchip_.default(
        student, teacher, w_kd, reverse, temperature, vocab, cluster, stages, loss, dlogits
    )


def topk_(
    logits: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    vocab: int,
    k: int,
    other_temperatures: list[float],
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    entropy: Tensor | None,
    other_tails: Tensor | None,
) -> None:
    """The k largest entries of each row and the mass of the others; writes the last five arguments.

    logits [N, >= vocab] (float32, float16, bfloat16, float64), unit stride along the vocabulary; bias [vocab],
    log_probs [N, k], log_tail, entropy [N], other_tails [N, M] in float32 (float64 for float64 logits); ids int32
    [N, k]. csrc/topk.h says what each means. Raises RuntimeError naming the argument at fault.
    """
    torch.ops.kdkernels_C.topk_.default(
        logits, bias, scale, softcap, temperature, vocab, k, other_temperatures,
        ids, log_probs, log_tail, entropy, other_tails,
    )  # fmt: skip


def draw_(
    logits: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    vocab: int,
    uniforms: Tensor,
    ids: Tensor,
) -> None:
    """Draws from each row's distribution at uniforms [N, n] (float64), into ids [N, n] (int32); logits as for `topk_`.
    Fastest where uniforms ascend. CPU only."""
    torch.ops.kdkernels_C.draw_.default(logits, bias, scale, softcap, temperature, vocab, uniforms, ids)


def gate_(
    student: Tensor,
    student_bias: Tensor | None,
    student_scale: float,
    student_softcap: float,
    teacher: Tensor,
    teacher_bias: Tensor | None,
    teacher_scale: float,
    teacher_softcap: float,
    threshold: Tensor,
    uniforms: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    vocab: int,
    token: Tensor,
    from_teacher: Tensor,
    jsd: Tensor,
) -> None:
    """The SWITCH gate on B rows; writes the last three arguments.

    student, teacher [B, >= vocab] (float32, float16, bfloat16, also one of each, or both float64), unit stride along
    the vocabulary; biases [vocab] and jsd [B] in float32 (float64 for float64 logits); threshold and uniforms [B]
    float64; token int64, from_teacher bool [B]. csrc/gate.h says what each means. Raises RuntimeError naming the
    argument at fault.
    """
    torch.ops.kdkernels_C.gate_.default(
        student, student_bias, student_scale, student_softcap, teacher, teacher_bias, teacher_scale, teacher_softcap,
        threshold, uniforms, temperature, top_k, top_p, vocab, token, from_teacher, jsd,
    )  # fmt: skip


def shard_kept_stride(vocab: int) -> int:
    """Numbers a row of what `shard_sums_` keeps: whole blocks of 1024."""
    return -(-vocab // 1024) * 1024


def shard_norms_(*given: Any) -> None:
    """One shard's part of the normalisers of N rows: ``(*rows, share, cold, places)``.

    rows: student, teacher, their biases, scales and soft-caps, w_kd, w_ce, labels (in the whole vocabulary), kernel, a,
    b, temperature, vocab, as `dense_` takes them but for float64, and offset, the first column's place in the whole
    vocabulary. share float32 [N, 10] and places int64 [N, 2] (or None) are written; csrc/shards.h says what they hold.
    Raises RuntimeError naming the argument at fault.
    """
    torch.ops.kdkernels_C.shard_norms_.default(*given)


def shard_sums_(*given: Any) -> None:
    """Sums of term and grad over one shard: ``(*rows, share, merged, again, kept, sums)``.

    rows and share as for `shard_norms_`; merged float64 [N, 8]: `kdkernels.eager_shards.Rows`; again: bool [N], the
    rows to sum with care, others being left out, or None: all, quickly. kept float32 [N, shard_kept_stride(vocab)] or
    None, and sums float32 [N, 2] are written.
    """
    torch.ops.kdkernels_C.shard_sums_.default(*given)


def shard_gradient_(*given: Any) -> None:
    """One shard's columns of the gradient: ``(*rows, share, merged, kept, dlogits)``, as for `shard_sums_`.

    dlogits [N, >= vocab], which may be the student, is written; without kept, grad is computed again.
    """
    torch.ops.kdkernels_C.shard_gradient_.default(*given)
