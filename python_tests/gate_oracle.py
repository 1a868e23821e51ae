"""What the gate must say: the definition in float64, and how near to it a backend has to come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from ptx import Report
from torch import Tensor

from kdkernels.ops.rows import Side

UNTOUCHED = 77
"""What outputs hold before."""
EDGE = 1e-5
"""How far a uniform number may lie outside of its token's part of [0, 1). Sums of float32 exponentials come nearer."""


@dataclass
class Call:
    """One call on CPU tensors; see `kdkernels.ops.gate.gate_rows_`."""

    student: Side
    teacher: Side
    threshold: Tensor
    uniforms: Tensor | None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab: int = 0

    def __post_init__(self) -> None:
        self.vocab = self.vocab or self.student.x.shape[1]

    @property
    def rows(self) -> int:
        """B."""
        return self.student.x.shape[0]

    @property
    def least_bytes(self) -> int:
        """Of both operands, once."""
        return self.rows * self.vocab * (self.student.x.element_size() + self.teacher.x.element_size())


@dataclass
class Decision:
    """What a call writes; and, from the emulator, what it cost."""

    token: Tensor
    from_teacher: Tensor
    jsd: Tensor
    reports: list[Report] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int) -> Decision:
        """Before the call."""
        return cls(
            torch.full((rows,), UNTOUCHED), torch.ones(rows, dtype=torch.bool), torch.full((rows,), float(UNTOUCHED))
        )


def logits(side: Side, vocab: int) -> Tensor:
    """float64 ``[B, V]``; a soft cap makes finite numbers of infinite ones."""
    z = side.x[:, :vocab].float()
    if side.bias is not None:
        z = z + side.bias[:vocab]
    z = (side.scale * z).double()
    return side.softcap * torch.tanh(z / side.softcap) if side.softcap else z


def divergence(zs: Tensor, zt: Tensor) -> Tensor:
    """Bits, ``[B]``: entropy of the mean less the mean of the entropies, from masses."""
    p, q = zt.softmax(-1), zs.softmax(-1)
    m = (p + q) / 2

    def bits(x: Tensor) -> Tensor:
        return torch.where(x > 0, x * (x / m).log2(), 0.0).sum(-1)

    return (bits(p) + bits(q)) / 2


def allowed(z: Tensor, call: Call, top_p: float) -> Tensor:
    """Mass ``[V]`` of one row's entries that may be drawn: of transformers' rules, ties aside."""
    mass = (z / call.temperature).softmax(-1)
    order = sorted(range(len(z)), key=lambda i: (-float(z[i]), i)) if call.top_k or top_p < 1 else range(len(z))
    if call.top_k:
        mass[list(order[call.top_k :])] = 0.0
    if top_p < 1:
        along = mass[list(order)]
        reached = (along.cumsum(0) - along >= top_p * along.sum()).nonzero().flatten().tolist()
        mass[[order[i] for i in reached]] = 0.0
    return mass / mass.sum()


def check_token(token: int, u: float, z: Tensor, call: Call) -> None:
    """Its part of [0, 1), in the order of ids, holds u, or comes within `EDGE` of it."""
    for top_p in {call.top_p} if call.top_p == 1 else (call.top_p, call.top_p - 1e-6, call.top_p + 1e-6):
        mass = allowed(z, call, top_p)
        upto = mass.cumsum(0)
        if mass[token] > 0 and upto[token] - mass[token] - EDGE <= u < upto[token] + EDGE:
            return
    raise AssertionError(
        f"token {token} of mass {mass[token]:.3g}, below it {upto[token] - mass[token]:.6f}, u = {u:.6f}"
    )


def assert_right(found: Decision, call: Call) -> None:
    """Divergences within 1e-6 bits and 1e-6 of their size (and what a tanh of float32 costs), decisions and tokens as
    they follow from them."""
    zs, zt = logits(call.student, call.vocab), logits(call.teacher, call.vocab)
    caps = call.student.softcap + call.teacher.softcap
    for row in range(call.rows):
        token, teacher, jsd = int(found.token[row]), bool(found.from_teacher[row]), float(found.jsd[row])
        threshold = float(call.threshold[row])
        if not all(math.isfinite(z[row].max()) for z in (zs, zt)) or math.isnan(threshold):
            assert (token, teacher, math.isnan(jsd)) == (-1, False, True), row
            continue
        expected = float(divergence(zs[row], zt[row]))
        assert 0 <= jsd <= 1, jsd
        assert abs(jsd - expected) <= 1e-6 + 1e-6 * expected + 2e-7 * caps, (row, jsd, expected)
        assert teacher == (jsd > threshold), (row, jsd, threshold)
        z = (zt if teacher else zs)[row]
        if call.uniforms is None:
            assert token == int((z.float() == z.float().max()).nonzero()[0]), row
        elif not 0 <= float(call.uniforms[row]) < 1:
            assert token == -1, row
        else:
            check_token(token, float(call.uniforms[row]), z, call)
