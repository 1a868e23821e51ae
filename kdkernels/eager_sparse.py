"""The readable definition of the row function for sparse teachers, in plain torch: any device, any dtype.

Of the teacher's row only K entries and the log of the rest's mass are known. How the two sides are compared:

- ``ghost``: the K entries and one more, the tail, in which all others are added up, on both sides;
- ``renormalize``: both sides normalised on the K entries; the others get no gradient;
- ``truncate``: the formula summed over the K entries alone;
- ``sampled``: ``-sum target log q`` over drawn entries with their frequencies, for forward KL.

A row that keeps nothing is a distribution with all its mass in the tail: 0 in the first and the third mode, where the
student's tail is its whole row too. The other two have nothing to normalise or to count then: NaN.

In every mode the gradient has the form ``own_v - q_v G`` on the K entries and ``share_v rest`` elsewhere, with
``share_v = q_v / q_tail`` and one number ``rest`` a row. The student's tail is summed from its own entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.eager import (
    HOPELESS,
    _bad_rows,
    _chain,
    _cross_entropy,
    _gated,
    _log_probs,
    _logits,
    _mended,
)

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.ops.sparse import SparseRows
    from kdkernels.weights import RowWeights


class _Comparison(NamedTuple):
    """What a mode makes of a row: D ``[C]``, its gradient by the scaled logits, the teacher's entropy ``[C]``."""

    divergence: Tensor
    kept: Tensor
    """``[C, K]`` gradient on the kept entries."""
    rest: Tensor
    """``[C]``: an entry that is not kept gets ``share`` times this."""
    entropy: Tensor


class _Student(NamedTuple):
    """The student's row, split as the teacher's is."""

    kept: Tensor
    """``[C, K]`` log-probabilities of the kept entries, under the whole row; -inf where nothing is kept."""
    among: Tensor
    """``[C, K]`` the same normalised on the kept entries."""
    tail: Tensor
    """``[C]`` log of the mass of the others."""
    share: Tensor
    """``[C, V]`` each other entry's part of that mass; 0 for kept ones."""


def sparse_rows_(
    student: Side,
    teacher: SparseRows,
    weights: RowWeights,
    spec: RowSpec,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fill ``loss [C]``, ``dlogits [C, >= vocab]`` and ``stats [C, 6]``; see `kdkernels.ops.sparse`."""
    kd = weights.kd
    ce = torch.zeros_like(kd) if weights.ce is None else weights.ce
    counts = (kd != 0) | (ce != 0)
    zs = _logits(student, spec.vocab)
    held = teacher.ids >= 0
    index = torch.where(held & (teacher.ids < spec.vocab), teacher.ids, spec.vocab).long()  # vocab: a spare column
    lp = torch.where(held, teacher.log_probs, -torch.inf)
    lq = _log_probs(zs, spec.temperature)
    lq1 = lq if spec.temperature == 1 else _log_probs(zs, 1.0)
    side = _split(zs, lq, index, held, spec.temperature)
    compared = _compare(lp, teacher.log_tail, side, held, spec)
    nll, onehot = _cross_entropy(lq1, weights.labels, ce != 0)
    bad = (_bad_rows(zs) | malformed(teacher, spec.vocab) | _no_distribution(lp, teacher.log_tail, held, spec)) & counts
    bad = bad | (counts & compared.divergence.isnan())
    loss.copy_(torch.where(bad, torch.nan, _gated(kd, compared.divergence) + _gated(ce, nll)))
    if stats is not None:  # before the gradient, which may overwrite the logits
        rows = _statistics(zs, lq, teacher.ids, lp, compared, nll, weights.labels)
        stats.copy_(torch.where(counts[:, None], torch.where(bad[:, None], torch.nan, rows), 0.0))
    if dlogits is not None:
        gradient = torch.nn.functional.pad(side.share * compared.rest[:, None], (0, 1))
        gradient = gradient.scatter_(-1, index, compared.kept)[:, : spec.vocab]
        dz = _gated(kd[:, None], gradient / spec.temperature)
        dz = dz + _gated(ce[:, None], lq1.exp() - onehot + (nll * 0)[:, None])  # a label out of range: NaN
        dz = torch.where(bad[:, None], torch.nan, dz * _chain(student, zs))
        dlogits[:, : spec.vocab] = torch.where(counts[:, None], dz, 0.0)
        dlogits[:, spec.vocab :] = 0


def malformed(teacher: SparseRows, vocab: int) -> Tensor:
    """bool ``[C]``: rows whose ids do not ascend, leave ``[0, vocab)``, or go on after a -1."""
    ids = teacher.ids
    wrong = ((ids < -1) | (ids >= vocab)).any(-1)
    before, after = ids[:, :-1], ids[:, 1:]
    return wrong | ((after >= 0) & ((before < 0) | (after <= before))).any(-1)


def _no_distribution(lp: Tensor, log_tail: Tensor, held: Tensor, spec: RowSpec) -> Tensor:
    """Rows that hold NaN or +inf, or have no mass: among the kept entries, or in the tail where the mode takes one."""
    mass = lp.amax(-1) > -torch.inf
    if spec.mode in ("ghost", "truncate"):
        mass = mass | ((log_tail > -torch.inf) & (held.sum(-1) < spec.vocab))
    return ~mass | ~(lp < torch.inf).all(-1) | ~(log_tail < torch.inf)


def _split(zs: Tensor, lq: Tensor, index: Tensor, held: Tensor, temperature: float) -> _Student:
    def gathered(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 1), value=-torch.inf)
        return torch.where(held, padded.gather(-1, index), -torch.inf)

    inside = torch.zeros((zs.shape[0], zs.shape[1] + 1), dtype=torch.bool, device=zs.device)
    inside = inside.scatter_(-1, index, held)[:, :-1]
    others = torch.where(inside, -torch.inf, zs)
    top = others.amax(-1, keepdim=True)
    empty = top == -torch.inf
    e = torch.where(empty, 1.0, ((others - top) / temperature).exp())
    total = e.sum(-1, keepdim=True)
    # relative to the row's normaliser as a kept entry is: by the largest of the others
    largest = lq.gather(-1, others.argmax(-1, keepdim=True))
    tail = torch.where(empty, -torch.inf, largest + total.log())
    share = torch.where(tail < HOPELESS, 0.0, e / total)  # a tail of masked entries is moved by nothing
    return _Student(gathered(lq), _log_probs(gathered(zs), temperature), tail[:, 0], share)


def _compare(lp: Tensor, log_tail: Tensor, student: _Student, held: Tensor, spec: RowSpec) -> _Comparison:
    """Any separable divergence by its two element functions."""
    if spec.mode == "ghost":
        return _ghost(lp, log_tail, student, held, spec)
    if spec.mode == "renormalize":
        lp = lp - lp.logsumexp(-1, keepdim=True)
        q, terms, grads = _elements(lp, student.among, held, spec)
        own = grads - q * grads.sum(-1, keepdim=True)
        return _Comparison(terms.sum(-1), own, torch.zeros_like(log_tail), _entropy(lp))
    entropy = _entropy(torch.cat((lp, log_tail[:, None]), -1))
    if spec.mode == "truncate":
        q, terms, grads = _elements(lp, student.kept, held, spec)
        excess = divergences.elements(spec.kernel).excess(spec.a, spec.b)
        terms = terms - excess * torch.where(held, q - _mended(lp).exp(), 0.0)
        grads = grads - excess * q
    else:
        q = torch.where(held, student.kept.exp(), 0.0)
        target = lp.exp()
        terms, grads = -target * torch.where(held, _mended(student.kept), 0.0), -target
    total = grads.sum(-1)
    return _Comparison(terms.sum(-1), grads - q * total[:, None], -student.tail.exp() * total, entropy)


def _ghost(lp: Tensor, log_tail: Tensor, student: _Student, held: Tensor, spec: RowSpec) -> _Comparison:
    has_tail = held.sum(-1, keepdim=True) < spec.vocab
    held = torch.cat((held, has_tail), -1)
    lp = torch.where(held, torch.cat((lp, log_tail[:, None]), -1), -torch.inf)
    lq = torch.cat((student.kept, student.tail[:, None]), -1)
    q, terms, grads = _elements(lp, lq, held, spec)
    own = grads - q * grads.sum(-1, keepdim=True)
    return _Comparison(terms.sum(-1), own[:, :-1], own[:, -1], _entropy(lp))


def _elements(lp: Tensor, lq: Tensor, held: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """q, term and grad, 0 where nothing is held."""
    elements = divergences.elements(spec.kernel)
    lp, lq = _mended(lp), _mended(lq)
    parts = lq.exp(), elements.term(lp, lq, spec.a, spec.b), elements.grad(lp, lq, spec.a, spec.b)
    q, term, grad = (torch.where(held, x, 0.0) for x in parts)
    return q, term, grad


def _entropy(l: Tensor) -> Tensor:
    return -torch.where(l == -torch.inf, 0.0, l.exp() * l).sum(-1)


def _statistics(
    zs: Tensor, lq: Tensor, ids: Tensor, lp: Tensor, compared: _Comparison, nll: Tensor, labels: Tensor | None
) -> Tensor:
    top = zs.argmax(-1)
    agree = top == ids.gather(-1, lp.argmax(-1, keepdim=True))[:, 0]  # ids ascend: the first of equals is the lower
    agree = agree & (lp.amax(-1) > -torch.inf)
    correct = torch.zeros_like(agree) if labels is None else top == labels
    columns = compared.divergence, compared.entropy, _entropy(lq), agree, nll, correct
    return torch.stack([c.to(lq.dtype) for c in columns], -1)
