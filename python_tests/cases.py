"""Inputs that a distillation loss must survive, and divergences with their parameters."""

from __future__ import annotations

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
ONE_OF_EACH = tuple(kd.divergences.get(name) for name in kd.divergences.names() if not name.startswith("_"))

KINDS = (
    "ordinary", "peaked", "flat", "flat_student", "identical", "near",
    "masked", "masked_student", "masked_teacher", "finfo_min", "finfo_min_student", "finfo_min_teacher", "one_hot", "shifted",
)  # fmt: skip


def pair(kind: str, rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits ``[rows, vocab]`` of one of `KINDS`."""
    generator = torch.Generator().manual_seed(hash((rows, vocab, seed)) % 2**31)

    def noise() -> Tensor:
        return torch.randn(rows, vocab, generator=generator, dtype=torch.float64)

    student, teacher = 3 * noise(), 3 * noise()
    mask = torch.rand(rows, vocab, generator=generator) < 0.3
    mask[:, vocab // 2] = False  # a whole row of -inf is another matter
    smallest = torch.finfo(dtype).min
    if kind == "peaked":
        student, teacher = 100 * noise(), 100 * noise()
    elif kind == "flat":
        student, teacher = torch.full_like(student, -2.0), torch.ones_like(teacher)
    elif kind == "flat_student":
        student = torch.zeros_like(student)
    elif kind == "identical":
        student = teacher.clone()
    elif kind == "near":
        student = teacher + 1e-3 * student
    elif kind == "masked":
        student, teacher = (z.masked_fill(mask, -torch.inf) for z in (student, teacher))
    elif kind == "masked_student":
        student = student.masked_fill(mask, -torch.inf)
    elif kind == "masked_teacher":
        teacher = teacher.masked_fill(mask, -torch.inf)
    elif kind == "finfo_min":
        student, teacher = (z.masked_fill(mask, smallest) for z in (student, teacher))
    elif kind == "finfo_min_student":
        student = student.masked_fill(mask, smallest)
    elif kind == "finfo_min_teacher":
        teacher = teacher.masked_fill(mask, smallest)
    elif kind == "one_hot":
        one = torch.arange(vocab) == vocab // 2
        teacher = torch.where(one, 0.0, -torch.inf).expand(rows, vocab)
    elif kind == "shifted":
        student, teacher = student + 8192, teacher - 8192
    else:
        assert kind == "ordinary", kind
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
