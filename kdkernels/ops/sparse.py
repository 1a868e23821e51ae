"""``kdkernels::sparse``: the divergence of N rows of logits from teachers of which K entries a row are known.

Bytes per row: the student's logits read twice (the second time from cache) and its gradient written once, 8 K for the
teacher. No dense teacher row is ever built.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import divergences, eager_sparse, leaves
from kdkernels.ops.dense import fake, outputs
from kdkernels.ops.library import EVERY_DEVICE, LIBRARY, register_row_autograd, summed
from kdkernels.ops.rows import RowSpec, Side, kernel_id
from kdkernels.weights import RowWeights

MODES = ("ghost", "renormalize", "truncate", "sampled")


class SparseRows(NamedTuple):
    """C rows of a teacher: ids ascending, -1 after the last; its distribution at the loss's temperature."""

    ids: Tensor
    """int32 ``[C, K]``, contiguous as all three are."""
    log_probs: Tensor
    """``[C, K]``, dtype of the loss; what stands at an id of -1 is never read."""
    log_tail: Tensor
    """``[C]``, dtype of the loss; -inf with mode "sampled"."""


def sparse_rows_(
    backend: str,
    student: Side,
    teacher: SparseRows,
    weights: RowWeights,
    spec: RowSpec,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fill ``loss [C]``, ``dlogits [C, >= vocab]`` (may be ``student.x``) and ``stats [C, 6]`` with one backend.

    ``spec.mode`` is one of `MODES`; ``spec.kernel`` is separable, and ``"forward_kl"`` with mode "sampled". A row that
    counts becomes NaN if its ids do not ascend, leave ``[0, vocab)`` or follow a -1, or if either side holds NaN or
    +inf. So does one that keeps no entry with mass, unless the mode is "ghost" or "truncate" and its mass is in the
    tail: its divergence is 0 then and moves nothing. Statistics as for logits, the agreement 0 where no entry with mass
    is kept; the teacher's entropy is that of what the mode compares with: the
    kept entries and the tail as one more, the kept entries renormalised, or the drawn frequencies.
    """
    if backend == "cpp":
        leaves.sparse_(
            student.x, student.bias, student.scale, student.softcap, *teacher, *weights,
            kernel_id(spec.kernel), spec.a, spec.b, divergences.elements(spec.kernel).excess(spec.a, spec.b),
            MODES.index(spec.mode), spec.temperature, spec.vocab, loss, dlogits, stats,
        )  # fmt: skip
        return
    if backend == "triton":
        from kdkernels.triton import host  # imports triton

        host.sparse_rows_(student, teacher, weights, spec, loss, dlogits, stats)
        return
    eager_sparse.sparse_rows_(student, teacher, weights, spec, loss, dlogits, stats)


LIBRARY.define(
    "sparse(Tensor student, Tensor ids, Tensor log_probs, Tensor log_tail, Tensor w_kd, Tensor? w_ce, Tensor? labels, "
    "str kernel, float a, float b, float temperature, SymInt vocab, str mode, str backend, bool per_row, "
    "bool need_grad, bool need_stats) -> (Tensor loss, Tensor dlogits, Tensor stats)"
)


def sparse(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    w_kd: Tensor,
    w_ce: Tensor | None,
    labels: Tensor | None,
    kernel: str,
    a: float,
    b: float,
    temperature: float,
    vocab: int,
    mode: str,
    backend: str,
    per_row: bool,
    need_grad: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, its gradient, statistics: as ``kdkernels::dense``, with the teacher as in `SparseRows`."""
    loss, dlogits, stats = outputs(student, need_grad, need_stats)
    sparse_rows_(
        backend,
        Side(student),
        SparseRows(ids, log_probs, log_tail),
        RowWeights(w_kd, w_ce, labels),
        RowSpec(kernel, a, b, temperature, vocab, mode),
        loss,
        dlogits if need_grad else None,
        stats if need_stats else None,
    )
    return loss if per_row else summed(loss), dlogits, stats


LIBRARY.impl("sparse", sparse, EVERY_DEVICE)


torch.library.register_fake("kdkernels::sparse", fake, lib=LIBRARY)
register_row_autograd("kdkernels::sparse", count=17, backend=13)
