"""Teacher and student on held-out text, by domain: divergence, perplexities, agreement; logits never kept."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

import kdkernels as kd
from kdkernels.data import Blocks, counted
from kdkernels.trainers.cached import CachedTeacher
from kdkernels.trainers.heads import Head, hidden_states


@dataclass(frozen=True)
class Score:
    """Means over `tokens` held-out tokens at temperature 1.

    kl: forward KL(teacher‖student) in nats. ppl, teacher_ppl: exp of the mean negative log-likelihood.
    top1: share of tokens where both models' first choice is the same. Entropies in nats.
    From a cache kl is that of the kept entries and their tail, a lower bound; teacher_ppl is None, and so is everything
    of the teacher where the cache lacks temperature 1.
    """

    kl: float | None
    ppl: float
    teacher_ppl: float | None
    top1: float | None
    entropy: float
    teacher_entropy: float | None
    tokens: int

    def to_dict(self) -> dict[str, float | None]:
        """Plain values."""
        return asdict(self)


def uniform_teacher(like: torch.Tensor, vocab: int) -> kd.LinearLogits:
    """A teacher that knows nothing, [B, L] rows of equal logits, for losses that ignore it: its GEMM has depth 1."""
    hidden = torch.zeros(*like.shape[:-1], 1, dtype=like.dtype, device=like.device)
    return kd.LinearLogits(hidden, torch.zeros(vocab, 1, dtype=like.dtype, device=like.device))


@torch.no_grad()
def measure(
    teacher: tuple[Any, Head | None] | CachedTeacher,
    student: tuple[Any, Head],
    blocks: Blocks,
    *,
    limit: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int | None,
    backend: str = "auto",
) -> Score:
    """Score the first `limit` blocks of one domain (their order is already random)."""
    sums = torch.zeros(6, dtype=torch.float64)
    tokens = 0
    count = min(limit, len(blocks))
    for begin in range(0, count, batch_size):
        rows = [blocks[i] for i in range(begin, min(begin + batch_size, count))]
        batch = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hs = hidden_states(student[0], batch)
        zs = student[1].logits(hs, dtype)
        if isinstance(teacher, CachedTeacher):
            zt = _cached(teacher, batch["input_ids"], zs)
            teacher_nll = torch.full((), torch.nan)
        else:
            zt = _logits(teacher, batch, dtype)
            nothing = uniform_teacher(hs.to(dtype), zt.weight.shape[0])
            teacher_nll = _stats(zt, nothing, batch["labels"], vocab_size, backend).nll
        both = _stats(zs, zt, batch["labels"], vocab_size, backend)
        parts = (
            both.divergence, both.nll, teacher_nll, both.top1_agreement, both.student_entropy, both.teacher_entropy,
        )  # fmt: skip
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        tokens += counted(batch["labels"])
    kl, nll, teacher_mean, top1, entropy, teacher_entropy = (sums / max(tokens, 1)).tolist()
    if isinstance(teacher, CachedTeacher):
        if not teacher.has(1.0):
            return Score(None, _exp(nll), None, None, entropy, None, tokens)
        return Score(kl, _exp(nll), None, top1, entropy, teacher_entropy, tokens)
    return Score(kl, _exp(nll), _exp(teacher_mean), top1, entropy, teacher_entropy, tokens)


def _logits(teacher: tuple[Any, Head | None], batch: dict[str, torch.Tensor], dtype: torch.dtype) -> kd.LinearLogits:
    model, head = teacher
    assert head is not None
    device = batch["input_ids"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return head.logits(hidden_states(model, batch), dtype)


def _cached(
    teacher: CachedTeacher, input_ids: torch.Tensor, student: kd.LinearLogits
) -> kd.LinearLogits | kd.SparseLogits:
    """The cache's distributions at temperature 1; where it has none, a teacher that the student's own scores ignore."""
    if teacher.has(1.0):
        return teacher.of(input_ids, 1.0)
    return uniform_teacher(student.hidden, student.weight.shape[0])


def _stats(
    student: kd.LinearLogits,
    teacher: kd.LinearLogits | kd.SparseLogits,
    labels: torch.Tensor,
    vocab_size: int | None,
    backend: str,
) -> kd.DistillationStats:
    sampled = isinstance(teacher, kd.SparseLogits) and teacher.kind == "sampled"
    out = kd.distillation_loss(
        student, teacher, labels=labels, shift=True, vocab_size=vocab_size, backend=backend, return_stats=True,
        sparse_mode="sampled" if sampled else "ghost",
    )  # fmt: skip
    assert isinstance(out, kd.DistillationOutput)
    return out.stats


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
