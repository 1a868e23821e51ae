"""Checks of a sparse teacher against the call that it is given to."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._checks import fail, values_checked
from kdkernels.eager_sparse import malformed
from kdkernels.logits import LinearLogits
from kdkernels.ops.sparse import SparseRows
from kdkernels.sparse_logits import SparseLogits


def check_mode(
    teacher: Tensor | LinearLogits | SparseLogits, sparse_mode: str, temperature: float, kernel: str
) -> None:
    """Whether the teacher's kind, the mode, the temperature and the divergence go together."""
    if not isinstance(teacher, SparseLogits):
        if sparse_mode != "ghost":
            remedy = "it says how kd.SparseLogits are compared: leave it out"
            fail(ValueError, "sparse_mode", repr(sparse_mode), "'ghost' for a teacher that gives all logits", remedy)
        return
    if teacher.temperature != temperature:
        remedy = f"pass teacher.at_temperature({temperature}), which needs the tail stored at that temperature"
        allowed = f"that of the teacher's log-probabilities, {teacher.temperature}"
        fail(ValueError, "temperature", temperature, allowed, remedy)
    if teacher.ids.shape[-1] == 0:
        fail(ValueError, "teacher.ids shape", list(teacher.ids.shape), "[..., K] with K >= 1")
    if (teacher.kind == "sampled") != (sparse_mode == "sampled"):
        allowed = "'sampled'" if teacher.kind == "sampled" else "'ghost', 'renormalize' or 'truncate'"
        remedy = "draws are frequencies, not probabilities; compress with k= or top_p= for the other modes"
        if teacher.kind != "sampled":
            remedy = "'sampled' takes frequencies of draws: compress with samples="
        fail(ValueError, "sparse_mode", repr(sparse_mode), f"{allowed} for kind={teacher.kind!r}", remedy)
    if sparse_mode == "sampled" and kernel != "forward_kl":
        remedy = "frequencies of draws are an unbiased estimate for forward KL only: compress with k= for others"
        fail(ValueError, "divergence", repr(kernel), "'forward_kl' with sparse_mode='sampled'", remedy)
    if kernel == "adaptive_kl":
        remedy = "its head and tail need the teacher's whole row: use forward_kl, reverse_kl or jsd, or pass logits"
        fail(ValueError, "divergence", repr(kernel), "separable for kd.SparseLogits", remedy)


def check_ids(loss: Tensor, teacher: SparseLogits, counted: Tensor, vocab: int) -> None:
    """The ids of the rows that count, where values may be looked at.

    Kernels make a row of bad ids NaN wherever they run, so only a loss that holds a NaN is worth reading N x K ids for.
    """
    if torch.compiler.is_compiling() or (teacher.device.type != "cpu" and not values_checked()):
        return
    if not loss.isnan().any():
        return
    ids = teacher.ids.reshape(-1, teacher.ids.shape[-1])
    wrong = malformed(SparseRows(ids, ids, ids), vocab) & counted
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        allowed = f"ascending in [0, {vocab}), then -1 to the end (row {row})"
        remedy = "sort ids and log_probs together (kd.compress does), and check that teacher and vocab_size agree"
        fail(ValueError, "teacher.ids", _brief(ids[row]), allowed, remedy)


def _brief(ids: Tensor) -> str:
    some = ids[:8].tolist()
    return f"[{', '.join(map(str, some))}{', ...' if len(ids) > 8 else ''}]"
