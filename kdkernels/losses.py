"""The distillation loss: the public function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from kdkernels import arguments, backends, divergences
from kdkernels._checks import fail
from kdkernels.chunking import chunk_rows
from kdkernels.divergences import Divergence, Kernel
from kdkernels.logits import LinearLogits
from kdkernels.ops.dense import DenseInPlace
from kdkernels.ops.rows import RowSpec, accumulation_dtype
from kdkernels.weights import RowWeights, TokenOptions, row_weights

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
    """Entropy of the teacher at the temperature, nats."""
    student_entropy: Tensor
    """Entropy of the student at the temperature, nats."""
    top1_agreement: Tensor
    """1 where teacher and student have the same most likely token (ties: the lower id), else 0."""
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
    teacher: Tensor | LinearLogits,
    divergence: str | Divergence = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits,
    divergence: str | Divergence = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> DistillationOutput: ...
@overload
def distillation_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits,
    divergence: str | Divergence = ...,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | DistillationOutput: ...
def distillation_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits,
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
        teacher: logits or `LinearLogits` of the same leading shape, dtype and device; a constant (a teacher that
            requires grad is an error; its head's weight and bias are treated as constants).
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_kl``, ``skew_reverse_kl``, ``total_variation``,
            ``alpha_beta``, ``adaptive_kl``, or an object such as ``kd.JSD(beta=0.1)``. Natural logarithm.
        temperature: T in [1e-6, 1e6]; the divergence compares ``softmax(z / T)``. float32 keeps its six digits from
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
        vocab_size: entries of the vocabulary that exist; padding beyond them on either side gets no mass and zero
            gradient. Needed where student and teacher differ in padding.
        group: vocabulary shards; not in this version, must be None.
        sparse_mode: how a sparse teacher is compared; not in this version, must be "ghost".
        chunk_bytes: with `LinearLogits`, memory for the logits of one chunk of rows, bytes (default 256 MiB).
        backend: ``"auto"``, ``"eager"``, ``"cpp"``; `explain` says which serves and why.
        inplace: write the gradient over the student's logits, which saves a tensor of their size; they must not be
            used afterwards and must not be a leaf that requires grad. Without effect on `LinearLogits` and under
            torch.compile.
        return_stats: also return `DistillationStats` from the same sweep.

    Returns:
        The loss (float32; float64 for float64 logits), or `DistillationOutput`.

    Raises:
        TypeError, ValueError: naming the argument, its value, what is allowed and what to do. On a GPU and under
            torch.compile values are not looked at: a label out of range or a negative weight makes its row NaN
            (``KDKERNELS_CHECK=1`` raises on a GPU).

    A row whose student or teacher holds NaN or +inf, or nothing but -inf, has a NaN loss and gradient and leaves other
    rows alone. A -inf logit is a masked entry: it has no mass, and mass on the other side, or a label, costs
    log-probability -1e4; so does finfo.min (any log-probability below -1e20). Other finite logits are never altered.
    A backward of a retained graph may run again; a second derivative is an error.

    Source: Hinton et al. 2015 (arXiv 1503.02531); for each divergence the docstring of its class.
    """
    arguments.check_scalars(
        temperature, temperature_scaling, kd_weight, ce_weight, chunk_bytes, vocab_size, ignore_index
    )
    arguments.check_reduction(reduction, num_items)
    arguments.check_later(group, sparse_mode)
    arguments.check_not_forward_mode(student)
    student, teacher = arguments.under_autocast(student), arguments.under_autocast(teacher)
    vocab = arguments.check_pair(student, teacher, vocab_size)
    leading = student.shape[:-1]
    arguments.check_tokens(leading, student.device, labels, token_weights, shift, ce_weight)
    options = TokenOptions(
        labels, token_weights, shift, ignore_index, kd_weight, ce_weight, reduction, num_items,
        temperature**2 if temperature_scaling == "t2" else 1.0, student.dtype == torch.float16,
    )  # fmt: skip
    weights, counted, divisor = row_weights(options, leading, student.device, accumulation_dtype(student.dtype), vocab)
    kernel, serving = _resolve(divergence, backend, student.device.type, student.dtype)
    spec = RowSpec(kernel.name, kernel.a, kernel.b, float(temperature), vocab)
    call = _Call(spec, weights, serving, reduction == "none", return_stats)
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        loss, stats = call.dense(student, teacher, inplace)
    else:
        loss, stats = call.linear(student, teacher, chunk_bytes)
    if divisor is not None:
        loss = loss / divisor
    if reduction == "none":
        loss = _unflatten(loss, leading, shift)
    if not return_stats:
        return loss
    columns = [_unflatten(c, leading, shift) for c in (*stats.unbind(-1), counted)]
    return DistillationOutput(loss, DistillationStats(*columns))


def _resolve(divergence: str | Divergence, backend: str, device: str, dtype: torch.dtype) -> tuple[Kernel, str]:
    """Element functions and backend of a call: the same for every call of a compiled graph, so not traced."""
    kernel = divergences.get(divergence).kernel()
    return kernel, backends.choose(backend, torch.device(device), dtype, kernel.name)


# What torch.compiler.assume_constant_result does, which imports the compiler: a second and a half for everyone.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Call:
    """A checked call, on its way to an operator."""

    spec: RowSpec
    weights: RowWeights
    backend: str
    per_row: bool
    need_stats: bool

    def dense(self, student: Tensor, teacher: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        need_grad = torch.is_grad_enabled() and student.requires_grad
        if inplace and need_grad and not torch.compiler.is_compiling():
            return self._dense_inplace(student, teacher)
        loss, _, stats = torch.ops.kdkernels.dense(
            _rows(student),
            _rows(teacher),
            *self.weights,
            *self.spec,
            self.backend,
            self.per_row,
            need_grad,
            self.need_stats,
        )
        return loss, stats

    def _dense_inplace(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.is_leaf or (student._is_view() and student._base is not None and student._base.is_leaf):
            remedy = "pass the logits that a model computed, or inplace=False"
            fail(
                ValueError,
                "inplace",
                True,
                "False for a student that is (a view of) a leaf requiring grad",
                remedy,
            )
        rows = _rows(student)
        moved = rows.untyped_storage().data_ptr() != student.untyped_storage().data_ptr()
        overlapping = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
        if rows.numel() and (moved or overlapping):
            remedy = "pass logits with evenly spaced rows (shift=True instead of logits[:, :-1]), or inplace=False"
            fail(
                ValueError,
                "inplace",
                f"True with strides {student.stride()}",
                "False for logits that need a copy",
                remedy,
            )
        inputs = (rows, _rows(teacher), self.weights, self.spec, self.backend, self.per_row, self.need_stats)
        loss, stats = DenseInPlace.apply(*inputs)  # type: ignore[no-untyped-call]
        return loss, stats

    def linear(
        self,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits,
        chunk_bytes: int | None,
    ) -> tuple[Tensor, Tensor]:
        rows = math.prod(student.shape[:-1])  # two sides: logits that exist are gathered where not every row counts
        chunk = chunk_rows(rows, 2 * self.spec.vocab * student.dtype.itemsize, chunk_bytes)
        sources = (_source(student), _source(teacher, detach=True))
        grad = torch.is_grad_enabled()
        needed = [grad and t is not None and t.requires_grad for t in sources[0][:3]]
        loss, *_, stats = torch.ops.kdkernels.linear(
            *sources[0], *sources[1], *self.weights, *self.spec, chunk, self.backend,
            self.per_row, *needed, self.need_stats,
        )  # fmt: skip
        return loss, stats


def _source(
    side: Tensor | LinearLogits, detach: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, float, float]:
    """The arguments of ``kdkernels::linear`` that describe one side."""
    if isinstance(side, Tensor):
        return _rows(side), None, None, 1.0, 0.0
    weight, bias = side.weight, side.bias
    if detach:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return _rows(side.hidden), weight, bias, float(side.scale or 1.0), float(side.softcap or 0.0)


def _rows(x: Tensor) -> Tensor:
    """``[..., V]`` as ``[N, V]`` with unit stride along the last dimension: a view where strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _unflatten(x: Tensor, leading: torch.Size, shift: bool) -> Tensor:
    x = x.reshape(leading)
    return x[..., :-1] if shift else x
