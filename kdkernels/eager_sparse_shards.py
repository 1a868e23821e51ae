"""A row in vocabulary shards against a sparse teacher, in plain torch: the parts that each rank computes, any dtype.

Every rank has the teacher's K entries, by ids of the whole vocabulary; each id is of one rank's columns. `norms` gives
this rank's share of two normalisers, of the kept entries among its columns and of all others; merged, they give the
student's row, its mass on the kept entries and that of its tail. `sums` adds up term and grad of the kept entries, and
the tail, one entry more, is compared by every rank alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.eager import HOPELESS, _logits, _mended
from kdkernels.eager_shards import (
    Layout,
    Merged,
    _as_float,
    _distribution,
    _first_place,
    _nll,
    _picked,
    _place,
    _scale,
    _share,
    _tops,
    _unlabelled,
    log_probs,
    write_gradient_,
)
from kdkernels.eager_sparse import _elements, _entropy, _no_distribution, malformed

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.ops.sparse import SparseRows
    from kdkernels.weights import RowWeights


class SparseNumbers(NamedTuple):
    """Numbers of C rows of the whole vocabulary, ``[C]`` each, float64, alike on every rank; the first four
    as in `eager_shards.Rows`."""

    top_s: Tensor
    sum_s: Tensor
    cold: Tensor
    divergence: Tensor
    total: Tensor
    """Sum of grad over the entries that are compared."""
    top_tail: Tensor
    """Largest logit of the student's tail, -inf without one; ``sum_tail``: of ``e^((z - top_tail) / T)``."""
    sum_tail: Tensor
    top_kept: Tensor
    """The same of the kept entries."""
    sum_kept: Tensor


class _Kept(NamedTuple):
    """The kept entries among this rank's columns, ``[C, K]``."""

    column: Tensor
    """Among this rank's, or their number (a spare one) where another rank's."""
    here: Tensor
    z: Tensor
    """Logit; -inf where another rank's."""


def _kept(zs: Tensor, ids: Tensor, offset: int) -> _Kept:
    here = (ids >= offset) & (ids < offset + zs.shape[1]) & (ids >= 0)
    index = torch.where(here, ids - offset, zs.shape[1]).long()
    padded = torch.nn.functional.pad(zs, (0, 1), value=-torch.inf)
    return _Kept(index, here, torch.where(here, padded.gather(-1, index), -torch.inf))


def _others(zs: Tensor, kept: _Kept) -> Tensor:
    """The logits with -inf in place of kept entries."""
    inside = torch.zeros((zs.shape[0], zs.shape[1] + 1), dtype=torch.bool, device=zs.device)
    return torch.where(inside.scatter_(-1, kept.column, True)[:, :-1], -torch.inf, zs)


def norms(
    student: Side, teacher: SparseRows, weights: RowWeights, spec: RowSpec, offset: int, layout: Layout
) -> Tensor:
    """This shard's share of C rows, ``[C, columns]`` in the dtype of the loss."""
    zs = _logits(student, spec.vocab)
    kept = _kept(zs, teacher.ids, offset)
    columns = [*_share(kept.z, spec.temperature)[:2], *_share(_others(zs, kept), spec.temperature)[:2]]
    if layout.label:
        assert weights.labels is not None
        columns.append(_picked(zs, weights.labels - offset))
    if layout.cold:
        columns.append(_share(zs, 1.0)[1])
    if layout.stats:
        columns += [_share(zs, spec.temperature)[2], _as_float(_place(zs) + offset, zs.dtype)]
    return torch.stack(columns, -1)


def merge(
    parts: Tensor, teacher: SparseRows, weights: RowWeights, spec: RowSpec, whole: int, layout: Layout
) -> Merged[SparseNumbers]:
    """The ranks' ``[ranks, C, columns]`` as numbers of the rows; `complete` adds divergence and total."""
    t = spec.temperature
    part = [x.double() for x in parts.unbind(-1)]
    top_kept, sum_kept, _, _ = _together(part[0], part[1], t)
    top_tail, sum_tail, _, _ = _together(part[2], part[3], t)
    tops, sums, _, _ = _together(torch.stack((part[0], part[2])), torch.stack((part[1], part[3])), t)
    top_s, sum_s, shift, scale = _together(tops, sums, t)
    lp, held = _held(teacher), teacher.ids >= 0
    bad = ~_distribution(top_s, sum_s) | malformed(teacher, whole) | _unlabelled(weights, whole)
    bad = bad | _no_distribution(lp, teacher.log_tail, held, spec._replace(vocab=whole))
    if spec.mode == "renormalize":
        bad = bad | ~_distribution(top_kept, sum_kept)
    sum_s = torch.where(bad, torch.nan, sum_s)
    rest = part[4:]
    label = rest.pop(0).amax(0) if layout.label else None
    cold = (rest.pop(0) * _scale(tops, shift)).sum(0) if layout.cold else sum_s
    zero = torch.zeros_like(sum_s)
    rows = SparseNumbers(top_s, sum_s, cold, zero, zero, top_tail, sum_tail, top_kept, sum_kept)
    nll = zero if label is None else _nll(label, top_s, cold, weights, whole)
    none = sum_s.new_empty(0)
    if not layout.stats:
        return Merged(rows, nll, none, none)
    heat = ((rest[0] + shift / t * sums).where(scale > 0, 0.0) * scale).sum(0)
    entropies = torch.stack((_teacher_entropy(lp, teacher, spec, whole).double(), sum_s.log() - heat / sum_s), -1)
    place = _first_place(tops, parts[..., -1])
    best = teacher.ids.gather(-1, lp.argmax(-1, keepdim=True))[:, 0]  # ids ascend: the first of equals is the lower
    best = torch.where(lp.amax(-1) > -torch.inf, best, -1)
    return Merged(rows, nll, entropies, torch.stack((place, best.long()), -1))


def _together(tops: Tensor, sums: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest logit and sum over the first dimension's parts; what each part's logits and sums were moved by."""
    top, shift = _tops(tops)
    scale = _scale(tops, shift / temperature)
    return top, (sums * scale).sum(0), shift, scale


def _held(teacher: SparseRows) -> Tensor:
    return torch.where(teacher.ids >= 0, teacher.log_probs, -torch.inf)


def _has_tail(teacher: SparseRows, whole: int) -> Tensor:
    return (teacher.ids >= 0).sum(-1) < whole


def _teacher_entropy(lp: Tensor, teacher: SparseRows, spec: RowSpec, whole: int) -> Tensor:
    if spec.mode == "renormalize":
        return _entropy(lp - lp.logsumexp(-1, keepdim=True))
    tail = teacher.log_tail
    if spec.mode == "ghost":
        tail = torch.where(_has_tail(teacher, whole), tail, -torch.inf)
    return _entropy(torch.cat((lp, tail[:, None]), -1))


def _log_tail(numbers: SparseNumbers, temperature: float) -> Tensor:
    """Log of the mass of the student's tail, -inf without one."""
    empty = (numbers.top_tail == -torch.inf) & ~numbers.sum_s.isnan()
    lq = (numbers.top_tail - numbers.top_s) / temperature + numbers.sum_tail.log() - numbers.sum_s.log()
    return torch.where(empty, -torch.inf, lq)


def _compared(teacher: SparseRows, kept: _Kept, spec: RowSpec, numbers: SparseNumbers) -> tuple[Tensor, Tensor, Tensor]:
    """q, term and grad ``[C, K]`` of the kept entries, 0 where another rank's."""
    lp, (_, here, z) = _held(teacher), kept
    among = spec.mode == "renormalize"
    top, total = (numbers.top_kept, numbers.sum_kept) if among else (numbers.top_s, numbers.sum_s)
    lq = log_probs(z, top, total, spec.temperature)
    if spec.mode == "sampled":
        q, p = torch.where(here, lq.exp(), 0.0), torch.where(here, lp.exp(), 0.0)
        return q, -p * torch.where(here, lq, 0.0), -p
    if among:
        lp = lp - lp.logsumexp(-1, keepdim=True)
    q, terms, grads = _elements(lp, lq, here, spec)
    if spec.mode == "truncate":
        excess = divergences.elements(spec.kernel).excess(spec.a, spec.b)
        terms = terms - excess * torch.where(here, q - _mended(lp).exp(), 0.0)
        grads = grads - excess * q
    return q, terms, grads


def sums(student: Side, teacher: SparseRows, spec: RowSpec, offset: int, numbers: SparseNumbers) -> Tensor:
    """This shard's sums of term and grad ``[C, 2]``."""
    kept = _kept(_logits(student, spec.vocab), teacher.ids, offset)
    _, terms, grads = _compared(teacher, kept, spec, numbers)
    return torch.stack((terms.sum(-1), grads.sum(-1)), -1)


def complete(
    merged: Merged[SparseNumbers], added: Tensor, teacher: SparseRows, spec: RowSpec, whole: int
) -> Merged[SparseNumbers]:
    """Divergence and total from all ranks' sums ``[C, 2]`` and, with mode "ghost", the tail."""
    divergence, total = added.double().unbind(-1)
    if spec.mode == "ghost":
        _, term, grad = _tail(teacher, spec, whole, merged.rows)
        divergence, total = divergence + term, total + grad
    return replace(merged, rows=merged.rows._replace(divergence=divergence, total=total))


def _tail(teacher: SparseRows, spec: RowSpec, whole: int, numbers: SparseNumbers) -> tuple[Tensor, Tensor, Tensor]:
    """q, term and grad ``[C]`` of the tail as one entry, 0 where everything is kept."""
    lq = _log_tail(numbers, spec.temperature)
    return _elements(teacher.log_tail.double(), lq, _has_tail(teacher, whole), spec)


def gradient_(
    student: Side, teacher: SparseRows, weights: RowWeights, spec: RowSpec, offset: int, whole: int,
    numbers: SparseNumbers, dlogits: Tensor,
) -> None:  # fmt: skip
    """Writes this shard's columns of the gradient, ``dlogits [C, >= vocab]`` (may be ``student.x``)."""
    zs = _logits(student, spec.vocab)
    kept = _kept(zs, teacher.ids, offset)
    q, _, grads = _compared(teacher, kept, spec, numbers)
    own = _rest(zs, kept, teacher, spec, whole, numbers)
    own = torch.nn.functional.pad(own, (0, 1))
    own = own.scatter_(-1, kept.column, grads - q * numbers.total.to(q.dtype)[:, None])[:, : spec.vocab]
    write_gradient_(student, zs, own, weights, spec, offset, numbers, dlogits)


def _rest(zs: Tensor, kept: _Kept, teacher: SparseRows, spec: RowSpec, whole: int, numbers: SparseNumbers) -> Tensor:
    """``[C, columns]``: each other entry's part of the tail's mass times the tail's gradient."""
    if spec.mode == "renormalize":
        return torch.zeros_like(zs)
    log_tail = _log_tail(numbers, spec.temperature)
    rest = -log_tail.exp() * numbers.total
    if spec.mode == "ghost":
        q, _, grad = _tail(teacher, spec, whole, numbers)
        rest = grad - q * numbers.total
    rest = torch.where(log_tail < HOPELESS, 0.0, rest / numbers.sum_tail)  # a tail of masked entries is not moved
    top = torch.where(numbers.top_tail == -torch.inf, 0.0, numbers.top_tail)
    e = ((_others(zs, kept) - top.to(zs.dtype)[:, None]) / spec.temperature).exp()
    return e * rest.to(zs.dtype)[:, None]
