"""Inputs that a distillation loss must survive, and divergences with their parameters."""

from __future__ import annotations

from collections.abc import Callable

import golden
import torch
from torch import Tensor

import kdkernels as kd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEMPERATURES = (1.0, 0.05, 0.7, 2.0, 8.0)

DIVERGENCES = (
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.JSD(),
    kd.JSD(beta=0.1),
    kd.JSD(beta=0.9),
    kd.JSD(beta=0.0),
    kd.JSD(beta=1.0),
    kd.SkewKL(),
    kd.SkewKL(alpha=0.5),
    kd.SkewReverseKL(),
    kd.SkewReverseKL(alpha=0.7),
    kd.TotalVariation(),
    kd.AlphaBeta(0.2, 0.7),
    kd.AlphaBeta(0.5, 0.5),
    kd.AlphaBeta(1.0, 1.0),
    kd.AlphaBeta(0.6, 0.0),
    kd.AlphaBeta(0.0, 0.6),
    kd.AlphaBeta(0.0, 0.0),
    kd.AdaptiveKL(),
    kd.AdaptiveKL(mu=0.9),
)
ONE_OF_EACH = tuple(kd.divergences.get(name) for name in golden.NAMES)


class Noise:
    """Reproducible ingredients of one pair of logits, float64 ``[rows, vocab]``."""

    def __init__(self, rows: int, vocab: int, smallest: float, seed: int) -> None:
        self.shape, self.smallest = (rows, vocab), smallest
        self.generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * vocab + rows)
        self.student, self.teacher = 3 * self.draw(), 3 * self.draw()
        self.mask = torch.rand(self.shape, generator=self.generator) < 0.3
        self.mask[:, vocab // 2] = False  # a whole row of -inf is another matter

    def draw(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)

    def masked(self, side: Tensor, value: float = -torch.inf) -> Tensor:
        return side.masked_fill(self.mask, value)

    def one_hot(self) -> Tensor:
        return torch.where(torch.arange(self.shape[1]) == self.shape[1] // 2, 0.0, -torch.inf).expand(self.shape)


_KINDS: dict[str, Callable[[Noise], tuple[Tensor, Tensor]]] = {
    "ordinary": lambda n: (n.student, n.teacher),
    "peaked": lambda n: (100 * n.draw(), 100 * n.draw()),
    "flat": lambda n: (torch.full_like(n.student, -2.0), torch.ones_like(n.teacher)),
    "flat_student": lambda n: (torch.zeros_like(n.student), n.teacher),
    "identical": lambda n: (n.teacher.clone(), n.teacher),
    "near": lambda n: (n.teacher + 1e-3 * n.student, n.teacher),
    "masked": lambda n: (n.masked(n.student), n.masked(n.teacher)),
    "masked_student": lambda n: (n.masked(n.student), n.teacher),
    "masked_teacher": lambda n: (n.student, n.masked(n.teacher)),
    "finfo_min": lambda n: (n.masked(n.student, n.smallest), n.masked(n.teacher, n.smallest)),
    "finfo_min_student": lambda n: (n.masked(n.student, n.smallest), n.teacher),
    "finfo_min_teacher": lambda n: (n.student, n.masked(n.teacher, n.smallest)),
    "one_hot": lambda n: (n.student, n.one_hot()),
    "shifted": lambda n: (n.student + 8192, n.teacher - 8192),
}
KINDS = tuple(_KINDS)


def pair(kind: str, rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits ``[rows, vocab]`` of one of `KINDS`."""
    student, teacher = _KINDS[kind](Noise(rows, vocab, torch.finfo(dtype).min, seed))
    return student.to(dtype).contiguous(), teacher.to(dtype).contiguous()


def linear(
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    seed: int = 0,
    bias: bool = False,
    softcap: float | None = None,
    scale: float | None = None,
) -> kd.LinearLogits:
    """Hidden states ``[rows, hidden]`` and a head whose logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return kd.LinearLogits(
        noise(rows, hidden).to(dtype),
        (noise(vocab, hidden) * 2 / hidden**0.5).to(dtype),
        noise(vocab).to(dtype) if bias else None,
        softcap,
        scale,
    )
