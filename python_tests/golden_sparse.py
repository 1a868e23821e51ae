"""Golden values for sparse teachers: each mode written as a formula over a few log-probabilities, row by row, float64.

Imports torch and golden.py only, never kdkernels. The gradient comes from autograd through the whole student row: no
formula for it is written down here.
"""

from __future__ import annotations

import golden
import torch
from golden import Golden, Side
from torch import Tensor


def distill(
    student: Tensor | Side,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    mode: str,
    divergence: str = "forward_kl",
    a: float = 0.0,
    b: float = 0.0,
    temperature: float = 1.0,
    w_kd: Tensor | float = 1.0,
    w_ce: Tensor | float = 0.0,
    labels: Tensor | None = None,
    vocab: int | None = None,
) -> Golden:
    """`golden.distill` for a teacher of ids [N, K] (-1: nothing more), their log-probabilities and that of the rest.

    Rows that count and have no mass to compare, or hold NaN or +inf on either side, give NaN.
    """
    student = golden._side(student)
    rows = student.x.shape[0]
    kd, ce = golden._weight(w_kd, rows), golden._weight(w_ce, rows)
    counts = (kd != 0) | (ce != 0)
    xs = golden._stored(student, counts)
    columns, vocab = xs.shape[1], xs.shape[1] if vocab is None else vocab
    z, chain = golden._to_logits(student, xs[:, :vocab])
    label, labelled = golden._labels(labels, rows, vocab)
    loss, stats = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, 6, dtype=torch.float64)
    grad, natural = (torch.zeros(rows, columns, dtype=torch.float64) for _ in range(2))
    for r in range(rows):
        if not counts[r]:
            continue
        held = ids[r][ids[r] >= 0].long()
        lp, tail = log_probs[r][: len(held)].double(), log_tail[r].double()
        wrong = torch.cat((z[r], lp, tail[None]))
        kept_mass = bool((lp > -torch.inf).any())
        tail_counts = mode in ("ghost", "truncate") and len(held) < vocab
        if (
            wrong.isnan().any() or (wrong == torch.inf).any() or z[r].max() == -torch.inf
            or not (kept_mass or (tail_counts and tail > -torch.inf))
            or (mode == "renormalize" and z[r][held].max() == -torch.inf)
            or (ce[r] != 0 and not labelled[r])
        ):  # fmt: skip
            for x in (loss, stats, grad):
                x[r] = torch.nan
            grad[r, vocab:] = 0
            continue
        row = _Row(z[r], held, lp, tail, mode, divergence, a, b, temperature)
        value, dz, size, entropy = row.compared()
        lq1, leaf = golden._log_probs(z[r][None])
        nll = -lq1[0, label[r]] if labelled[r] else lq1.new_zeros(()) * lq1.sum()
        dz1 = torch.autograd.grad(nll, leaf)[0][0]
        grad[r, :vocab] = (kd[r] * dz + ce[r] * dz1) * chain[r]
        onehot = torch.zeros(vocab, dtype=torch.float64).scatter_(0, label[r : r + 1], 1.0)
        natural[r, :vocab] = (kd[r].abs() * size + ce[r].abs() * (lq1[0].detach().exp() + onehot)) * chain[r].abs()
        loss[r] = kd[r] * value + ce[r] * nll.detach()
        lq = golden._log_probs(z[r][None] / temperature)[0][0].detach()
        best = int(golden._first_best(z[r][None]))
        teachers = int(held[int(golden._first_best(lp[None]))]) if kept_mass else -1
        correct = bool(labelled[r]) and best == int(label[r])
        figures = value, entropy, float(-(lq.exp() * lq).sum()), best == teachers, float(nll.detach()), correct
        stats[r] = torch.tensor([float(x) for x in figures], dtype=torch.float64)
    result = Golden(loss, grad, natural.norm(dim=-1), stats)
    return result if student.weight is None else golden._through_the_head(result, natural, student, counts)


class _Row:
    """One row: the two sides as a mode compares them."""

    def __init__(
        self, z: Tensor, held: Tensor, lp: Tensor, tail: Tensor, mode: str,
        name: str, a: float, b: float, temperature: float,
    ) -> None:  # fmt: skip
        self.held, self.mode, self.name, self.a, self.b, self.temperature = held, mode, name, a, b, temperature
        self.outside = torch.ones(len(z), dtype=torch.bool)
        self.outside[held] = False
        self.lp = torch.where(lp < golden.HOPELESS, golden.MASKED, lp)
        self.tail = torch.where(tail < golden.HOPELESS, golden.MASKED, tail)
        scaled = (z / temperature)[None]
        under = (scaled[0] - scaled.logsumexp(-1))[self.outside]
        self.tail_is_masked = not len(under) or bool(under.max() < golden.HOPELESS)
        self.whole, self.leaf = golden._log_probs(scaled)
        self.among, self.leaf_among = golden._log_probs(scaled[:, held])

    def sides(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of teacher and student whose divergence is taken; the second carries the gradient."""
        if self.mode == "renormalize":
            return self.lp - self.lp.logsumexp(-1), self.among[0]
        lq = self.whole[0][self.held]
        if self.mode == "ghost" and self.outside.any():
            normaliser = self.leaf.logsumexp(-1)[0]
            rest = golden.MASKED - (normaliser - normaliser.detach())  # as any masked entry's log-probability
            if not self.tail_is_masked:
                rest = self.whole[0][self.outside].logsumexp(-1)
            return torch.cat((self.lp, self.tail[None])), torch.cat((lq, rest[None]))
        return self.lp, lq

    def gradient(self, value: Tensor) -> Tensor:
        """Of a value of `sides` by the scaled logits [V]."""
        if self.mode != "renormalize":
            return torch.autograd.grad(value, self.leaf)[0][0]
        among = torch.autograd.grad(value, self.leaf_among)[0][0]
        return torch.zeros_like(self.whole[0]).scatter(-1, self.held, among)

    def value(self, lp: Tensor, lq: Tensor) -> Tensor:
        if self.mode == "sampled":
            return -(lp.exp() * lq).sum()
        return golden._divergence(self.name, lp[None], lq[None], self.a, self.b)[0]

    def compared(self) -> tuple[float, Tensor, Tensor, float]:
        """D, its gradient by the logits [V], the natural scale of that [V], the teacher's entropy."""
        lp, lq = self.sides()
        value = self.value(lp, lq)
        dz = self.gradient(value)
        point = lq.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.value(lp, point), point)
        p, q = lp.exp(), point.detach().exp()
        pieces = p + q + grad.abs() + q * grad.sum().abs()
        scale = torch.zeros_like(dz)
        scale[self.held] = pieces[: len(self.held)]
        everywhere = self.whole[0].detach().exp()
        if self.mode in ("truncate", "sampled"):
            scale[self.outside] = (everywhere * (1 + grad.sum().abs()))[self.outside]
        elif self.mode == "ghost" and self.outside.any():
            rest = everywhere[self.outside]
            scale[self.outside] = pieces[-1] * rest / rest.sum().clamp(min=1e-300)
        if self.mode == "truncate" and self.tail > golden.MASKED:
            lp = torch.cat((lp, self.tail[None]))
        return float(value.detach()), dz / self.temperature, scale / self.temperature, float(-(lp.exp() * lp).sum())
