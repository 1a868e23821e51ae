"""The distillation loss: the public function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from kdkernels import arguments, arguments_sparse, backends, divergences
from kdkernels.calls import Call
from kdkernels.divergences import Divergence, Kernel
from kdkernels.logits import LinearLogits
from kdkernels.ops.rows import RowSpec, accumulation_dtype
from kdkernels.sparse_logits import SparseLogits
from kdkernels.weights import TokenOptions, row_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.options import LossOptions


class DistillationStats(NamedTuple):
    """Per-token figures ``[...]`` (leading shape of the logits; one shorter with shift), detached, unweighted.

    A token that does not count (see ``counted``) has 0 in every column. Natural logarithm throughout.
    """

    divergence: Tensor
    """D(teacher, student) at the temperature, without T^2, nats."""
    teacher_entropy: Tensor
    """Entropy of the teacher at the temperature, nats. A sparse teacher's own ``entropy`` where it has one, else
    that of what the mode compares with: kept entries and tail, kept entries renormalised, or draws' frequencies."""
    student_entropy: Tensor
    """Entropy of the student at the temperature, nats."""
    top1_agreement: Tensor
    """1 where teacher and student have the same most likely token (ties: the lower id; of a sparse teacher among the
    kept), else 0."""
    nll: Tensor
    """Negative log-likelihood of the label under the student at temperature 1, nats; 0 without labels."""
    accuracy: Tensor
    """1 where the student's most likely token is the label, else 0; 0 without labels."""
    counted: Tensor
    """bool: the tokens that count; divide sums by ``counted.sum()``."""


class DistillationOutput(NamedTuple):
    """What `distillation_loss` returns with ``return_stats=True``."""

    loss: Tensor
    stats: DistillationStats


@overload
def distillation_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogits,
    divergence: str | Divergence = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogits,
    divergence: str | Divergence = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> DistillationOutput: ...
@overload
def distillation_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogits,
    divergence: str | Divergence = ...,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | DistillationOutput: ...
def distillation_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogits,
    divergence: str | Divergence = "forward_kl",
    *,
    temperature: float = 1.0,
    temperature_scaling: str = "none",
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    shift: bool = False,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    group: object | None = None,
    sparse_mode: str = "ghost",
    chunk_bytes: int | None = None,
    backend: str = "auto",
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | DistillationOutput:
    """``kd_weight * D(teacher, student) + ce_weight * CE(student, labels)`` per token, reduced.

    Args:
        student: logits ``[..., V]`` (float32, bfloat16, float16, float64) or `LinearLogits`. The gradient reaches the
            logits, or the hidden states, head weight and bias, each only if it requires grad.
        teacher: logits or `LinearLogits` of the same leading shape, dtype and device, or `SparseLogits` of the same
            leading shape and device at this temperature; a constant (a teacher that requires grad is an error; its
            head's weight and bias are treated as constants).
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_kl``, ``skew_reverse_kl``, ``total_variation``,
            ``alpha_beta``, ``adaptive_kl``, or an object such as ``kd.JSD(beta=0.1)``. Natural logarithm.
        temperature: T in [1e-5, 1e6]; the divergence compares ``softmax(z / T)``. float32 keeps its six digits from
            T = 1e-3. Cross-entropy is always at temperature 1.
        temperature_scaling: ``"t2"`` multiplies D by T^2 (Hinton et al. 2015), ``"none"`` does not.
        labels: token ids, integer ``[...]``, for the cross-entropy, and to say which tokens count.
        ce_weight: weight of the cross-entropy, >= 0; needs labels unless 0.
        kd_weight: weight of the divergence, >= 0; not 0 together with ``ce_weight``.
        ignore_index: tokens with this label count for nothing, in the divergence too.
        token_weights: weight of each token ``[...]``, >= 0; a token of weight 0 counts for nothing.
        shift: causal language model: position i of the logits is judged by label and weight i + 1; the last position
            of each sequence and the first label drop out. Prefer it to ``logits[:, :-1]``, whose rows are not evenly
            spaced, so that both sides have to be copied.
        reduction: ``"mean"`` over the tokens that count (their number, not the sum of their weights), ``"sum"``, or
            ``"none"``: ``[...]``, one shorter with shift. When no token counts, mean and sum are 0 with zero gradients.
        num_items: divisor for ``"mean"`` instead of the tokens that count here: pass the tokens of the whole
            accumulated batch. Int, float or 0-dim tensor, > 0.
        vocab_size: entries of the (whole) vocabulary that exist; padding beyond them on either side gets no mass
            and zero gradient. Needed where student and teacher differ in padding.
        group: ranks that hold the vocabulary in shards, in rank order and of any sizes: a ProcessGroup or a
            one-dimensional DeviceMesh; logits and heads (weight, bias) are then this rank's columns, everything else is
            the same on every rank, `SparseLogits` too. DTensors sharded over the vocabulary need no group. See
            `kdkernels.vocab_parallel` for what travels between ranks.
        sparse_mode: how `SparseLogits` are compared, S being the entries kept: ``"ghost"`` (S and one entry more, in
            which each side's others are added up; at K = V the dense loss), ``"renormalize"`` (both sides normalised
            on S, no gradient elsewhere), ``"truncate"`` (the divergence's formula summed over S alone: biased, may be
            negative; for comparison with papers), or ``"sampled"`` (forward KL as the cross-entropy
            ``-sum target log q``, whose gradient is unbiased; for ``kind="sampled"``, and only that).
        chunk_bytes: with `LinearLogits`, memory for the logits of one chunk of rows, bytes (default 256 MiB).
        backend: ``"auto"``, ``"eager"``, ``"cpp"``, ``"triton"``, ``"cuda"``; `explain` says which serves and why.
        inplace: write the gradient over the student's logits, which saves a tensor of their size; they must not be
            used afterwards and must not be a leaf that requires grad. Without effect where either side is
            `LinearLogits`, and under torch.compile.
        return_stats: also return `DistillationStats` from the same sweep.

    Returns:
        The loss (float32; float64 for float64 logits), or `DistillationOutput`.

    Raises:
        TypeError, ValueError: naming the argument, its value, what is allowed and what to do. On a GPU and under
            torch.compile values are not looked at: a label out of range or a negative weight makes its row NaN
            (``KDKERNELS_CHECK=1`` raises on a GPU).

    `SparseLogits` whose ids are out of range or do not ascend are an error where values are looked at, else NaN rows.
    The divergence has to be separable (not ``adaptive_kl``). Log-probabilities are not checked to be normalised.
    A row whose student or teacher holds NaN or +inf, or nothing but -inf, has a NaN loss and gradient and leaves other
    rows alone. A -inf logit is a masked entry: it has no mass, and mass on the other side, or a label, costs
    log-probability -1e4; so does finfo.min (any log-probability below -1e20). The masked entry's own gradient is that
    of the mass it lacks (forward KL: -p). Other finite logits are never altered.
    A backward of a retained graph may run again; a second derivative is an error.

    Source: Hinton et al. 2015 (arXiv 1503.02531); for each divergence the docstring of its class.
    """
    arguments.check_modes(group, sparse_mode)
    if group is not None or arguments.holds_dtensors(student, teacher):
        from kdkernels import vocab_parallel  # brings torch.distributed

        asked = vocab_parallel.Options(
            temperature, temperature_scaling, labels, ce_weight, kd_weight, ignore_index, token_weights, shift,
            reduction, num_items, vocab_size, chunk_bytes, backend, inplace, return_stats, sparse_mode,
        )  # fmt: skip
        made: vocab_parallel.Outcome = vocab_parallel.loss_of(group, student, teacher, divergence, asked)
        if return_stats:
            made = made._replace(stats=_with_known_entropy(made.stats, teacher, made.counted))
        return _output(*made, reduction, shift, return_stats)
    arguments.check_scalars(
        temperature, temperature_scaling, kd_weight, ce_weight, chunk_bytes, vocab_size, ignore_index
    )
    arguments.check_reduction(reduction, num_items)
    arguments.check_switches(shift=shift, inplace=inplace, return_stats=return_stats)
    arguments.check_not_transformed(student)
    student, teacher = arguments.under_autocast(student), arguments.under_autocast(teacher)
    vocab = arguments.check_pair(student, teacher, vocab_size)
    leading = student.shape[:-1]
    arguments.check_tokens(leading, student.device, labels, token_weights, shift, ce_weight)
    options = TokenOptions(
        labels, token_weights, shift, ignore_index, kd_weight, ce_weight, reduction, num_items,
        temperature**2 if temperature_scaling == "t2" else 1.0, student.dtype == torch.float16,
    )  # fmt: skip
    weights, counted, divisor = row_weights(options, leading, student.device, accumulation_dtype(student.dtype), vocab)
    sparse = isinstance(teacher, SparseLogits)
    kernel, serving = _resolve(divergence, backend, student.device.type, student.dtype, sparse)
    arguments_sparse.check_mode(teacher, sparse_mode, temperature, kernel.name)
    spec = RowSpec(kernel.name, kernel.a, kernel.b, float(temperature), vocab, sparse_mode if sparse else "")
    call = Call(spec, weights, serving, reduction == "none", return_stats)
    loss, stats = call.run(student, teacher, inplace, chunk_bytes)
    if isinstance(teacher, SparseLogits):
        arguments_sparse.check_ids(loss, teacher, counted, vocab)
    if return_stats:
        stats = _with_known_entropy(stats, teacher, counted)
    return _output(loss, stats, counted, divisor, leading, reduction, shift, return_stats)


def _with_known_entropy(stats: Tensor, teacher: object, counted: Tensor) -> Tensor:
    """Statistics ``[N, 6]`` with a sparse teacher's own entropy, if it has one, where rows are not NaN."""
    if not isinstance(teacher, SparseLogits) or teacher.entropy is None:
        return stats
    known = torch.where(counted, teacher.entropy.detach().reshape(-1).to(stats.dtype), 0.0)
    own = stats[:, 1:2]
    return torch.cat((stats[:, :1], torch.where(own.isnan(), own, known[:, None]), stats[:, 2:]), 1)


def _output(
    loss: Tensor,
    stats: Tensor,
    counted: Tensor,
    divisor: Tensor | None,
    leading: torch.Size,
    reduction: str,
    shift: bool,
    return_stats: bool,
) -> Tensor | DistillationOutput:
    """What the caller gets of losses (``[N]`` or their sum) and statistics ``[N, 6]``."""
    if divisor is not None:
        loss = loss / divisor
    if reduction == "none":
        loss = _unflatten(loss, leading, shift)
    if not return_stats:
        return loss
    columns = [*stats.unbind(-1), counted]
    return DistillationOutput(loss, DistillationStats(*(_unflatten(c, leading, shift) for c in columns)))


def _resolve(
    divergence: str | Divergence, backend: str, device: str, dtype: torch.dtype, sparse: bool
) -> tuple[Kernel, str]:
    """Element functions and backend of a call: the same for every call of a compiled graph, so not traced."""
    kernel = divergences.get(divergence).kernel()
    return kernel, backends.choose(backend, torch.device(device), dtype, kernel.name, sparse)


# What torch.compiler.assume_constant_result does, which imports the compiler: a second and a half for everyone.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unflatten(x: Tensor, leading: torch.Size, shift: bool) -> Tensor:
    x = x.reshape(leading)
    return x[..., :-1] if shift else x
