"""Adaptive KL over vocabulary shards: the teacher's head is found by an exact search that every rank takes part in.

The head is the smallest set of most probable entries with mass >= mu, equal ones by lower id. Logits in the order of
their bits are numbers of 32 bits (64 in float64), searched digit by digit: each rank adds up mass and number of its
entries by their next digit, one all-reduce adds those over ranks, and every rank goes on with the digit in which the
mass reaches mu. Four digits of 8 bits (float64: five of 13) find the least logit of the head; one gather of how many
equals each rank holds says which of them belong to it, and one all-reduce adds up the four sums of a row. With the
gather of the normalisers that is 7 collectives (8). Bytes per row: 16 x 256 a digit (16 x 8192), 8, and 32.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.collectives import Ranks
from kdkernels.eager import _logits
from kdkernels.eager_shards import Merged, Rows, log_probs, write_gradient_

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.weights import RowWeights


def order_bits(z: Tensor) -> Tensor:
    """Integers in the order of the floats they come from, both zeros one: int64, of float32 in ``[-2^31, 2^31)``."""
    z = z + 0.0
    bits = z.view(torch.int64) if z.dtype == torch.float64 else z.view(torch.int32).to(torch.int64)
    smallest = -(2**63) if z.dtype == torch.float64 else -(2**31)
    return torch.where(bits < 0, smallest - bits - 1, bits)


def adaptive_steps(
    student: Side, teacher: Side, spec: RowSpec, ranks: Ranks, merged: Merged[Rows], dlogits: Tensor | None,
    weights: RowWeights, offset: int,
) -> Generator[None, None, Merged[Rows]]:  # fmt: skip
    """From merged normalisers to divergence and gradient, a pause at each collective."""
    rows = merged.rows
    zs, zt = _logits(student, spec.vocab), _logits(teacher, spec.vocab)
    lq = log_probs(zs, rows.top_s, rows.sum_s, spec.temperature)
    lp = log_probs(zt, rows.top_t, rows.sum_t, spec.temperature)
    p, q = lp.exp(), lq.exp()
    in_head = yield from _head(zt, p.double(), spec.a, ranks)
    apart = (p - q).abs().double()
    forward, reverse = (divergences.elements(name) for name in ("forward_kl", "reverse_kl"))
    columns = (
        torch.where(in_head, apart, 0.0), torch.where(in_head, 0.0, apart),
        forward.term(lp, lq, 0.0, 0.0).double(), reverse.term(lp, lq, 0.0, 0.0).double(),
    )  # fmt: skip
    adding = ranks.add_(torch.stack([c.sum(-1) for c in columns], -1))
    yield
    head, tail, kl, reverse_kl = adding.wait().unbind(-1)
    total = head + tail
    w = torch.where(total == 0, 0.0, head / total)
    v = torch.where(total == 0, 0.0, tail / total)
    if dlogits is not None:
        a, b = w.to(p.dtype)[:, None], v.to(p.dtype)[:, None]
        own = a * (q - p) + b * q * (lq - lp - reverse_kl.to(p.dtype)[:, None])
        write_gradient_(student, zs, own, weights, spec, offset, rows, dlogits)
    rows = rows._replace(divergence=w * kl + v * reverse_kl, total=w, generic=reverse_kl)
    return replace(merged, rows=rows)


def gradient_anew_(
    student: Side, teacher: Side, weights: RowWeights, spec: RowSpec, offset: int, rows: Rows, dlogits: Tensor
) -> None:
    """The gradient from the numbers that `adaptive_steps` left: in ``total`` the weight of forward KL, in ``generic``
    the reverse KL."""
    zs, zt = _logits(student, spec.vocab), _logits(teacher, spec.vocab)
    lq = log_probs(zs, rows.top_s, rows.sum_s, spec.temperature)
    lp = log_probs(zt, rows.top_t, rows.sum_t, spec.temperature)
    p, q = lp.exp(), lq.exp()
    same = rows.divergence == 0
    w = rows.total.to(p.dtype)[:, None]
    v = torch.where(same, 0.0, 1 - rows.total).to(p.dtype)[:, None]
    own = w * (q - p) + v * q * (lq - lp - rows.generic.to(p.dtype)[:, None])
    write_gradient_(student, zs, own, weights, spec, offset, rows, dlogits)


def _head(zt: Tensor, p: Tensor, mu: float, ranks: Ranks) -> Generator[None, None, Tensor]:
    """bool ``[C, vocab]``: this rank's entries of the head; ``p`` float64."""
    keys = order_bits(zt)
    width, digits = (13, 5) if zt.dtype == torch.float64 else (8, 4)
    shift = width * digits - (64 if zt.dtype == torch.float64 else 32)  # the first digit has fewer bits
    low = width * digits - shift
    n = zt.shape[0]
    prefix = torch.zeros((n, 1), dtype=torch.int64, device=zt.device)
    live = torch.ones_like(keys, dtype=torch.bool)
    above = p.new_zeros(n)
    wanted = None
    mass = count = p.new_zeros((n, 1))
    for digit in range(digits):
        low -= width if digit else width - shift
        bins = 1 << (width if digit else width - shift)
        index = (keys >> low) & (bins - 1)
        if digit == 0:  # the sign's bit turns round
            index = index ^ (bins >> 1)
        table = p.new_zeros((2, n, bins))
        table[0].scatter_add_(-1, index, torch.where(live, p, 0.0))
        table[1].scatter_add_(-1, index, live.double())
        adding = ranks.add_(table)
        yield
        mass, count = adding.wait()
        wanted = mu * mass.sum(-1) if wanted is None else wanted
        before = above[:, None] + mass.flip(-1).cumsum(-1).flip(-1) - mass  # of larger digits
        reached = (count > 0) & (before < wanted[:, None])
        chosen = (
            torch.where(reached, torch.arange(bins, device=zt.device), bins).amin(-1, keepdim=True).clamp(max=bins - 1)
        )
        above = before.gather(-1, chosen)[:, 0]
        mass, count = mass.gather(-1, chosen), count.gather(-1, chosen)
        live = live & (index == chosen)
        prefix = (prefix << width) | chosen
    assert wanted is not None
    needed = ((wanted - above) / (mass[:, 0] / count[:, 0])).ceil().nan_to_num(1.0).clamp(min=1)
    holding = ranks.gather(live.sum(-1).double())
    yield
    earlier = holding.wait()[: ranks.rank].sum(0)
    equals = live.cumsum(-1) + earlier[:, None] <= needed[:, None]
    least = prefix ^ -(2**63) if zt.dtype == torch.float64 else prefix - 2**31  # digits are unsigned, keys are not
    head: Tensor = (keys > least) | (live & equals)
    return head
