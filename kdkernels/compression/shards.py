"""Rows of logits, whole or as vocabulary shards on the ranks of a process group.

Every rank contributes its own largest entries, and its normaliser as the pair (max, log-sum); each then merges all of
them, so that all have the answer. Traffic: ``ranks * N * (2 k + 4 + M)`` numbers of 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdkernels._checks import fail
from kdkernels.chunking import chunk_rows
from kdkernels.eager_topk import ROW_BYTES
from kdkernels.logits import LinearLogits
from kdkernels.ops.compress import Kept
from kdkernels.ops.rows import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """``[ranks, ...]``: every rank's x, all of one shape."""
    import torch.distributed as dist

    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def of_first_rank(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """``x`` as the first rank of the group has it, in place."""
    if group is not None:
        import torch.distributed as dist

        dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
    return x


class Share(NamedTuple):
    """Which entries of the vocabulary are here."""

    vocab: int
    """Entries in all."""
    first: int
    """Id of the first one here."""
    here: int
    """Entries here that exist: columns beyond are padding."""
    group: Any = None

    @classmethod
    def of(cls, sizes: list[int], rank: int, vocab_size: int | None, group: Any = None) -> Share:
        """The share of a rank where ``sizes`` are every rank's columns."""
        first, total = sum(sizes[:rank]), sum(sizes)
        if vocab_size is not None and vocab_size > total:
            fail(ValueError, "vocab_size", vocab_size, f"at most the logits' vocabulary, {total}")
        vocab = total if vocab_size is None else vocab_size
        return cls(vocab, first, max(0, min(sizes[rank], vocab - first)), group)


@dataclass(frozen=True)
class Part:
    """This rank's rows, and how to ask the operators about them."""

    x: Tensor
    """Logits ``[N, >= here]``, or hidden states."""
    head: tuple[Tensor | None, Tensor | None, float, float]
    """Weight, bias, scale, softcap."""
    leading: torch.Size
    share: Share
    temperature: float
    backend: str
    chunk_rows: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return accumulation_dtype(self.x.dtype)

    def _options(self) -> tuple[Any, ...]:
        return self.x, *self.head, self.temperature, self.share.here, self.chunk_rows, self.backend

    def largest(self, k: int, others: list[float], entropy: bool) -> Kept:
        """The k largest of the whole row."""
        if self.share.group is None:
            return Kept(*torch.ops.kdkernels.compress(*self._options(), k, others, entropy, False))
        return _Merge(self, k, others, entropy).result()

    def own(self, k: int, others: list[float], entropy: bool) -> Kept:
        """The k largest of the entries here, as many rows as there are; of rows without finite entries none."""
        n, here = self.x.shape[0], min(k, self.share.here)
        if not here:
            none = self.x.new_full((n, k), -torch.inf, dtype=self.dtype)
            ids = torch.full((n, k), -1, dtype=torch.int32, device=self.x.device)
            tails = none.new_full((n, len(others)), -torch.inf)
            return Kept(ids, none, none[:, 0], torch.zeros_like(none[:, 0]), tails, none.clone())
        kept = Kept(*torch.ops.kdkernels.compress(*self._options(), here, others, entropy, True))
        kept = self._without_empty_rows(kept)
        ids, log_probs, values = (_widened(x, k) for x in (kept.ids, kept.log_probs, kept.values))
        return kept._replace(ids=ids, log_probs=log_probs, values=values)

    def _without_empty_rows(self, kept: Kept) -> Kept:
        """Rows that are all -inf are no distribution by themselves, but legal as a part of one."""
        rows = kept.log_tail.isnan().nonzero()[:, 0]
        if not len(rows):
            return kept
        weight, bias, *_ = self.head
        here = slice(self.share.here)
        x = self.x[rows, here] if weight is None else self.x[rows] @ weight[here].t()
        empty = torch.zeros_like(kept.log_tail, dtype=torch.bool)
        empty[rows] = ((x if bias is None else x + bias[here]) == -torch.inf).all(-1)

        def without(y: Tensor, value: float) -> Tensor:
            return torch.where(empty.reshape(-1, *(1,) * (y.dim() - 1)), value, y) if y.numel() else y

        return Kept(
            kept.ids, without(kept.log_probs, -torch.inf), without(kept.log_tail, -torch.inf),
            without(kept.entropy, 0.0), without(kept.other_tails, -torch.inf), kept.values,
        )  # fmt: skip

    def drawn(self, samples: int, generator: torch.Generator | None) -> Tensor:
        """Entries drawn from the whole row ``[N, samples]``, int32, ascending; -1 where it is no distribution."""
        n, device = self.x.shape[0], self.x.device
        uniforms = torch.rand((n, samples), dtype=torch.float64, generator=generator, device=device)
        return self.drawn_at(of_first_rank(uniforms.sort(-1).values, self.share.group))

    def drawn_at(self, uniforms: Tensor) -> Tensor:
        """Entries of the whole row at ``uniforms [N, n]``, alike on all ranks: int32, -1 as for `drawn`."""
        if self.share.group is None:
            return self._draw(uniforms)
        import torch.distributed as dist

        ids = self._draw(_Merge(self, 1, [], False).local_uniforms(uniforms))
        ids = torch.where(ids >= 0, ids + self.share.first, -1)
        dist.all_reduce(ids, dist.ReduceOp.MAX, group=self.share.group)
        return ids

    def _draw(self, uniforms: Tensor) -> Tensor:
        if not self.share.here:
            return torch.full(uniforms.shape, -1, dtype=torch.int32, device=uniforms.device)
        return torch.ops.kdkernels.draw(*self._options(), uniforms)  # type: ignore[no-any-return]


def part_of(
    logits: Tensor | LinearLogits, share: Share, temperature: float, backend: str, chunk_bytes: int | None
) -> Part:
    """The rows of ``logits`` in the form in which the operators take them."""
    head: tuple[Tensor | None, Tensor | None, float, float]
    kept = ROW_BYTES if backend == "eager" else 0  # what native kernels keep of a row does not depend on V
    if isinstance(logits, LinearLogits):
        x = logits.hidden.reshape(logits.shape[:-1].numel(), logits.hidden.shape[-1])
        weight = logits.weight.detach()
        bias = None if logits.bias is None else logits.bias.detach()
        scale = 1.0 if logits.scale is None else float(logits.scale)
        head = (weight, bias, scale, float(logits.softcap or 0.0))
        rows = chunk_rows(x.shape[0], logits.weight.shape[0] * (x.element_size() + kept), chunk_bytes)
    else:
        x = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
        x = x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
        head = (None, None, 1.0, 0.0)
        rows = chunk_rows(x.shape[0], x.shape[-1] * kept, chunk_bytes) if kept else max(1, x.shape[0])
    return Part(x, head, logits.shape[:-1], share, temperature, backend, rows)


def _widened(x: Tensor, k: int) -> Tensor:
    """``[N, k]``, padded as rows with fewer entries are."""
    pad = x.new_full((x.shape[0], k - x.shape[1]), -torch.inf if x.is_floating_point() else -1)
    return torch.cat((x, pad), -1)


class _Merge:
    """All ranks' largest entries and normalisers, in float64, and what follows for the whole row."""

    def __init__(self, part: Part, k: int, others: list[float], entropy: bool) -> None:
        self.part, self.k, self.others = part, k, others
        own = part.own(k, others, entropy)
        self.entropy = entropy
        top = own.values.amax(-1).double()  # of this rank; -inf where it has nothing
        values = own.values.double()
        columns = [top, self._log_sum(own, top, values, part.temperature, None), own.log_tail.double()]
        columns += [own.entropy.double()] if entropy else []
        for i, other in enumerate(others):
            tail = own.other_tails[:, i].double()
            columns += [self._log_sum(own, top, values, other, tail), tail]
        ids = torch.where(own.ids >= 0, own.ids + part.share.first, -1)
        rows = torch.cat((values, ids.double(), torch.stack(columns, -1)), -1)
        everyone = gather(rows, part.share.group)  # [ranks, N, 2 k + columns]
        self.values, self.ids = everyone[..., :k], everyone[..., k : 2 * k].int()
        self.columns = everyone[..., 2 * k :].unbind(-1)
        self.max = self.columns[0].amax(0)

    @staticmethod
    def _log_sum(own: Kept, top: Tensor, values: Tensor, temperature: float, tail: Tensor | None) -> Tensor:
        """Of the entries here at a temperature, relative to ``top / T``; -inf where there are none, NaN stays NaN."""
        bad = own.log_tail.isnan()
        empty = (top == -torch.inf) & ~bad
        if tail is None:  # the most likely entry's log-probability is minus that
            log_sum = -own.log_probs.amax(-1).double()
        else:
            kept = torch.logsumexp((values - top[:, None]) / temperature, -1)
            log_sum = kept - torch.log(-torch.expm1(tail))
        return torch.where(bad, torch.nan, torch.where(empty, -torch.inf, log_sum))

    def _masses(self, temperature: float, log_sum: Tensor) -> Tensor:
        """Log of each rank's mass ``[ranks, N]``, relative to ``e^(max / T)``."""
        apart = torch.where(self.columns[0] == -torch.inf, -torch.inf, self.columns[0] - self.max)
        return torch.where(log_sum == -torch.inf, -torch.inf, apart / temperature + log_sum)

    def result(self) -> Kept:
        """What one process would have found."""
        k, part, dtype = self.k, self.part, self.part.dtype
        values = self.values.transpose(0, 1).flatten(1)  # [N, ranks k], ids ascending where equal
        ids = self.ids.transpose(0, 1).flatten(1)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
        x = values - self.max[:, None]
        masses = self._masses(part.temperature, self.columns[1])
        log_sum = torch.logsumexp(masses, 0)
        bad = log_sum.isnan() | (self.max == -torch.inf)
        log_p = x / part.temperature - log_sum[:, None]
        log_tail = self._tail(masses, self.columns[2], log_p[:, k:], log_sum)
        log_p = torch.where(bad[:, None], torch.nan, log_p[:, :k])
        kept_ids = torch.where(bad[:, None], -1, ids[:, :k])
        place = torch.where(kept_ids < 0, part.share.vocab, kept_ids).sort(dim=-1, stable=True).indices
        own_entropy = self._entropy(masses - log_sum) if self.entropy else log_sum.new_empty(0)
        tails = [torch.where(bad, torch.nan, self._other_tail(i, x[:, k:])) for i in range(len(self.others))]
        return Kept(
            kept_ids.gather(-1, place), log_p.gather(-1, place).to(dtype),
            torch.where(bad, torch.nan, log_tail).to(dtype),
            torch.where(bad, torch.nan, own_entropy).to(dtype) if self.entropy else own_entropy.to(dtype),
            torch.stack(tails, -1).to(dtype) if tails else log_p.new_empty((log_p.shape[0], 0), dtype=dtype),
            log_p.new_empty(0, dtype=dtype),
        )  # fmt: skip

    @staticmethod
    def _tail(masses: Tensor, tails: Tensor, dropped: Tensor, log_sum: Tensor) -> Tensor:
        """Log of what no rank kept and of what the merge did not keep."""
        parts = torch.where(masses == -torch.inf, -torch.inf, masses + tails) - log_sum
        return torch.logsumexp(torch.cat((parts.transpose(0, 1), dropped), -1), -1)

    def _other_tail(self, i: int, dropped: Tensor) -> Tensor:
        at = 3 + int(self.entropy) + 2 * i
        temperature = self.others[i]
        masses = self._masses(temperature, self.columns[at])
        log_sum = torch.logsumexp(masses, 0)
        return self._tail(masses, self.columns[at + 1], dropped / temperature - log_sum[:, None], log_sum)

    def _entropy(self, log_w: Tensor) -> Tensor:
        """H = sum_r w_r (H_r - log w_r) for ranks with shares w_r of the mass."""
        terms = log_w.exp() * (self.columns[3] - log_w)
        return torch.where(log_w == -torch.inf, 0.0, terms).sum(0)

    def local_uniforms(self, uniforms: Tensor) -> Tensor:
        """For draws of this rank the number that takes them among its own entries, -1 for others'."""
        import torch.distributed as dist

        rank = dist.get_rank(self.part.share.group)
        mass = self._masses(self.part.temperature, self.columns[1])
        mass = (mass - torch.logsumexp(mass, 0)).exp()
        ends = mass.cumsum(0)
        mine = mass[rank] > 0
        last = mine & (mass[rank + 1 :].sum(0) == 0)  # takes what rounding leaves
        begin, end = ends[rank] - mass[rank], ends[rank]
        here = (uniforms >= begin[:, None]) & ((uniforms < end[:, None]) | last[:, None]) & mine[:, None]
        inside = (uniforms - begin[:, None]) / mass[rank][:, None]
        return torch.where(here, inside.clamp(0.0, 1.0 - 2.0**-53), -1.0)
