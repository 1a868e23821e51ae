"""A row in vocabulary shards, in plain torch: the three parts that each rank computes on its columns, any dtype.

`norms` gives this rank's share of the normalisers, `merge` makes the row's out of all ranks', `sums` gives its share of
the sums of term and grad under them, and `gradient_` its columns of the gradient. What travels between ranks is a few
numbers a row (`Layout`). A shard may be empty or masked throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.eager import HOPELESS, _chain, _gated, _logits, _mended

if TYPE_CHECKING:
    from kdkernels.eager_sparse_shards import SparseNumbers
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.weights import RowWeights


class Layout(NamedTuple):
    """Which numbers of a row a call needs beyond the normalisers."""

    online: bool
    """The sum whence forward and reverse KL follow: of ``e^(zt') (zt' - zs')`` (reverse: sides exchanged), where z' is
    the logit less the shard's largest, divided by T outside of the exponent only; NaN: the row has masked entries."""
    label: bool
    """The label's logit, -inf where another rank holds it."""
    cold: bool
    """The student's sum at temperature 1."""
    stats: bool
    """Sums of e x of both sides (x: the exponent), and where the largest logits stand, an integer's bits."""

    @classmethod
    def of(cls, weights: RowWeights, spec: RowSpec, need_stats: bool) -> Layout:
        """What a call needs whose divergence takes sums of its own."""
        label = weights.labels is not None and (weights.ce is not None or need_stats)
        return cls(False, label, label and spec.temperature != 1, need_stats)

    def columns(self) -> list[str]:
        """Names of the numbers that a row sends, in order."""
        names = ["top_s", "sum_s", "top_t", "sum_t"]
        names += ["cross"] * self.online + ["label"] * self.label + ["cold"] * self.cold
        return names + ["heat_s", "heat_t", "place_s", "place_t"] * self.stats


class Rows(NamedTuple):
    """Numbers of C rows of the whole vocabulary, ``[C]`` each, float64, alike on every rank."""

    top_s: Tensor
    """Largest logit of the student."""
    sum_s: Tensor
    """Sum of ``e^((z - top_s) / T)``; NaN in a row that is NaN: no distribution, or a label out of range."""
    top_t: Tensor
    sum_t: Tensor
    cold: Tensor
    """Sum of ``e^(z - top_s)``; ``sum_s`` where T = 1 or nothing asks for it."""
    divergence: Tensor
    total: Tensor
    """Sum of grad over the vocabulary."""
    generic: Tensor
    """1 where the gradient comes from ``grad`` even though the divergence has an online form, else 0."""


AnyRows = TypeVar("AnyRows", Rows, "SparseNumbers")


@dataclass(frozen=True)
class Merged(Generic[AnyRows]):
    """What `merge` makes of the ranks' shares."""

    rows: AnyRows
    nll: Tensor
    """Float64 ``[C]``: of the label at temperature 1; 0 without one."""
    entropies: Tensor
    """Float64 ``[C, 2]``: the teacher's, the student's; empty without stats."""
    places: Tensor
    """int64 ``[C, 2]``: where the student's and the teacher's largest logits stand; empty without stats."""


def norms(student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, layout: Layout) -> Tensor:
    """This shard's share of C rows, ``[C, columns]`` in the dtype of the loss.

    A shard without entries, or with none that has mass, has largest logits -inf and sums 0. Rows that do not count are
    whatever they are: nothing is made of them.
    """
    zs, zt = _logits(student, spec.vocab), _logits(teacher, spec.vocab)
    top_s, sum_s, heat_s = _share(zs, spec.temperature)
    top_t, sum_t, heat_t = _share(zt, spec.temperature)
    columns = [top_s, sum_s, top_t, sum_t]
    if layout.label:
        assert weights.labels is not None
        columns.append(_picked(zs, weights.labels - offset))
    if layout.cold:
        columns.append(_share(zs, 1.0)[1])
    if layout.stats:
        columns += [heat_s, heat_t, *(_as_float(_place(z) + offset, zs.dtype) for z in (zs, zt))]
    return torch.stack(columns, -1)


def _share(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of e^x and of x e^x, x = (z - largest) / T."""
    if z.shape[1] == 0:
        return z.new_full((z.shape[0],), -torch.inf), z.new_zeros(z.shape[0]), z.new_zeros(z.shape[0])
    top = z.amax(-1)
    x = (z - torch.where(top == -torch.inf, 0.0, top)[:, None]) / temperature
    e = x.exp()
    return top, e.sum(-1), torch.where(e == 0, 0.0, x * e).sum(-1)


def _picked(z: Tensor, index: Tensor) -> Tensor:
    here = (index >= 0) & (index < z.shape[1])
    padded = torch.nn.functional.pad(z, (0, 1), value=-torch.inf)
    return torch.where(here, padded.gather(-1, torch.where(here, index, z.shape[1])[:, None])[:, 0], -torch.inf)


def _place(z: Tensor) -> Tensor:
    return z.argmax(-1) if z.shape[1] else torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)


def _as_float(place: Tensor, dtype: torch.dtype) -> Tensor:
    """An index below 2^31 as the bits of a float, which only travels."""
    return place.view(torch.float64) if dtype == torch.float64 else place.to(torch.int32).view(torch.float32)


def _as_index(bits: Tensor) -> Tensor:
    return bits.view(torch.int64 if bits.dtype == torch.float64 else torch.int32).to(torch.int64)


def merge(parts: Tensor, weights: RowWeights, spec: RowSpec, whole: int, layout: Layout) -> Merged[Rows]:
    """The ranks' ``[ranks, C, columns]`` as numbers of the rows; ``whole``: size of the whole vocabulary.

    A shard whose largest logit is -inf has no mass and leaves the others alone; a NaN reaches the row.
    """
    names = layout.columns()
    part = {name: parts[..., i].double() for i, name in enumerate(names) if not name.startswith("place")}
    t = spec.temperature
    top_s, shift_s = _tops(part["top_s"])
    top_t, shift_t = _tops(part["top_t"])
    scale_s, scale_t = _scale(part["top_s"], shift_s / t), _scale(part["top_t"], shift_t / t)
    sum_s, sum_t = (part["sum_s"] * scale_s).sum(0), (part["sum_t"] * scale_t).sum(0)
    bad = ~(_distribution(top_s, sum_s) & _distribution(top_t, sum_t)) | _unlabelled(weights, whole)
    sum_s, sum_t = torch.where(bad, torch.nan, sum_s), torch.where(bad, torch.nan, sum_t)
    cold = (part["cold"] * _scale(part["top_s"], shift_s)).sum(0) if layout.cold else sum_s
    divergence = torch.zeros_like(sum_s)
    if layout.online:
        divergence = _online(part, (scale_s, scale_t), (shift_s, shift_t), (sum_s, sum_t), spec)
    total = divergence if spec.kernel == "reverse_kl" else torch.zeros_like(sum_s)
    generic = torch.full_like(sum_s, float(not layout.online))
    rows = Rows(top_s, sum_s, top_t, sum_t, cold, divergence, total, generic)
    nll = _nll(part["label"].amax(0), top_s, cold, weights, whole) if layout.label else torch.zeros_like(sum_s)
    none = sum_s.new_empty(0)
    if not layout.stats:
        return Merged(rows, nll, none, none)
    heat_s = ((part["heat_s"] + shift_s / t * part["sum_s"]).where(scale_s > 0, 0.0) * scale_s).sum(0)
    heat_t = ((part["heat_t"] + shift_t / t * part["sum_t"]).where(scale_t > 0, 0.0) * scale_t).sum(0)
    entropies = torch.stack((sum_t.log() - heat_t / sum_t, sum_s.log() - heat_s / sum_s), -1)
    where = [_first_place(part[f"top_{side}"], parts[..., names.index(f"place_{side}")]) for side in "st"]
    return Merged(rows, nll, entropies, torch.stack(where, -1))


def _first_place(tops: Tensor, places: Tensor) -> Tensor:
    """Where the largest of the ranks' largest logits stands; of equal ones the lower rank's."""
    first = tops.nan_to_num(torch.inf).argmax(0)
    return _as_index(places.gather(0, first[None])[0].contiguous())


def _unlabelled(weights: RowWeights, whole: int) -> Tensor | bool:
    """Rows whose cross-entropy is wanted and whose label is out of range."""
    if weights.labels is None or weights.ce is None:
        return False
    return (weights.ce != 0) & ((weights.labels < 0) | (weights.labels >= whole))


def _tops(tops: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of all, and what has to be added to each shard's z - largest; NaN if any is."""
    top = tops.amax(0)
    return top, torch.where(tops == -torch.inf, 0.0, tops - top)


def _scale(tops: Tensor, shift: Tensor) -> Tensor:
    return torch.where(tops == -torch.inf, 0.0, shift.exp())


def _distribution(top: Tensor, total: Tensor) -> Tensor:
    return top.isfinite() & (total > 0) & (total < torch.inf)


def _online(
    part: dict[str, Tensor],
    scales: tuple[Tensor, Tensor],
    shifts: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    spec: RowSpec,
) -> Tensor:
    """D from the shards' cross sums: ``c / sum_t - log sum_t + log sum_s`` (reverse: sides exchanged)."""
    at, other, side = (1, 0, "t") if spec.kernel == "forward_kl" else (0, 1, "s")
    # a shard in which one side has no mass at all costs 1e4 nats times the other's: its cross is NaN, or 0 without mass
    moved = part["cross"] + (shifts[at] - shifts[other]) * part[f"sum_{side}"]
    hopeless = (shifts[0] < HOPELESS * spec.temperature) | (shifts[1] < HOPELESS * spec.temperature)
    own = torch.where(scales[at] == 0, part["cross"] * 0, moved * scales[at])
    cross = torch.where(hopeless, torch.nan, own).sum(0)
    return cross / (sums[at] * spec.temperature) - sums[at].log() + sums[other].log()


def _nll(label: Tensor, top: Tensor, cold: Tensor, weights: RowWeights, whole: int) -> Tensor:
    assert weights.labels is not None
    legal = (weights.labels >= 0) & (weights.labels < whole)
    nll = -_mended((label - top) - cold.log())
    return torch.where(legal, nll, 0.0)


def log_probs(z: Tensor, top: Tensor, total: Tensor, temperature: float) -> Tensor:
    """``(z - top) / T - log total`` in z's dtype, where a masked entry counts as -1e4."""
    # the normaliser in float64, its rounding to z's dtype carried along
    reference = top.to(z.dtype)
    log = total.log()
    rounded = log.to(z.dtype)
    rest = (log - rounded.double()).to(z.dtype)
    return _mended(((z - reference[:, None]) / temperature - rounded[:, None]) - rest[:, None])


def _both(student: Side, teacher: Side, spec: RowSpec, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    zs, zt = _logits(student, spec.vocab), _logits(teacher, spec.vocab)
    t = spec.temperature
    return zs, log_probs(zt, rows.top_t, rows.sum_t, t), log_probs(zs, rows.top_s, rows.sum_s, t)


def sums(student: Side, teacher: Side, spec: RowSpec, rows: Rows) -> Tensor:
    """This shard's sums of term and grad ``[C, 2]``."""
    elements = divergences.elements(spec.kernel)
    _, lp, lq = _both(student, teacher, spec, rows)
    terms, grads = (f(lp, lq, spec.a, spec.b) for f in (elements.term, elements.grad))
    return torch.stack((terms.sum(-1), grads.sum(-1)), -1)


def gradient_(
    student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, rows: Rows, dlogits: Tensor
) -> None:
    """Writes this shard's columns of the gradient, ``dlogits [C, >= vocab]`` (may be ``student.x``)."""
    zs, lp, lq = _both(student, teacher, spec, rows)
    grad = divergences.elements(spec.kernel).grad(lp, lq, spec.a, spec.b)
    own = grad - lq.exp() * rows.total.to(zs.dtype)[:, None]
    write_gradient_(student, zs, own, weights, spec, offset, rows, dlogits)


def write_gradient_(
    student: Side,
    zs: Tensor,
    own: Tensor,
    weights: RowWeights,
    spec: RowSpec,
    offset: int,
    rows: Rows | SparseNumbers,
    dlogits: Tensor,
) -> None:
    """From the divergence's gradient by scaled logits ``own [C, vocab]`` to that of the loss by stored numbers."""
    kd, ce, labels = weights
    counts = kd != 0 if ce is None else (kd != 0) | (ce != 0)
    dz = _gated(kd[:, None], own / spec.temperature)
    if ce is not None:
        assert labels is not None
        q = log_probs(zs, rows.top_s, rows.cold, 1.0).exp()
        index = torch.arange(offset, offset + spec.vocab, device=zs.device)
        dz = dz + _gated(ce[:, None], q - (index == labels[:, None]).to(q.dtype))
    bad = rows.divergence.isnan() | rows.sum_s.isnan()
    dz = torch.where(bad[:, None], torch.nan, dz * _chain(student, zs))
    dlogits[:, : spec.vocab] = torch.where(counts[:, None], dz, 0.0)
    dlogits[:, spec.vocab :] = 0


def losses(merged: Merged[AnyRows], weights: RowWeights) -> Tensor:
    """Weighted losses ``[C]`` in the dtype of the weights."""
    kd, ce, _ = weights
    counts = kd != 0 if ce is None else (kd != 0) | (ce != 0)
    value = _gated(kd.double(), merged.rows.divergence)
    if ce is not None:
        value = value + _gated(ce.double(), merged.nll)
    value = torch.where(merged.rows.sum_s.isnan(), torch.nan, value)
    return torch.where(counts, value, 0.0).to(kd.dtype)


def statistics(merged: Merged[AnyRows], weights: RowWeights) -> Tensor:
    """``[C, 6]`` as in `kdkernels.ops.rows.STATS`."""
    kd, ce, labels = weights
    counts = kd != 0 if ce is None else (kd != 0) | (ce != 0)
    places = merged.places
    correct = torch.zeros_like(counts) if labels is None else places[:, 0] == labels
    agree = places[:, 0] == places[:, 1]
    columns = merged.rows.divergence, *merged.entropies.unbind(-1), agree, merged.nll, correct
    table = torch.stack([c.to(torch.float64) for c in columns], -1)
    table = torch.where(merged.rows.sum_s.isnan()[:, None], torch.nan, table)
    return torch.where(counts[:, None], table, 0.0).to(kd.dtype)
