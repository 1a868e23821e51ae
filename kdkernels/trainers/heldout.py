"""Teacher and student on held-out text, by domain: divergence, perplexities, agreement; logits never kept."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

import kdkernels as kd
from kdkernels.data import Blocks, counted
from kdkernels.trainers.heads import Head, hidden_states


@dataclass(frozen=True)
class Score:
    """Means over `tokens` held-out tokens at temperature 1.

    kl: forward KL(teacher‖student) in nats. ppl, teacher_ppl: exp of the mean negative log-likelihood.
    top1: share of tokens where both models' first choice is the same. Entropies in nats.
    """

    kl: float
    ppl: float
    teacher_ppl: float
    top1: float
    entropy: float
    teacher_entropy: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def uniform_teacher(like: torch.Tensor, vocab: int) -> kd.LinearLogits:
    """A teacher that knows nothing, [B, L] rows of equal logits, for losses that ignore it: its GEMM has depth 1."""
    hidden = torch.zeros(*like.shape[:-1], 1, dtype=like.dtype, device=like.device)
    return kd.LinearLogits(hidden, torch.zeros(vocab, 1, dtype=like.dtype, device=like.device))


@torch.no_grad()
def measure(
    teacher: tuple[Any, Head],
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
            hs, ht = (hidden_states(model, batch) for model, _ in (student, teacher))
        zs, zt = student[1].logits(hs, dtype), teacher[1].logits(ht, dtype)
        both = _stats(zs, zt, batch["labels"], vocab_size, backend)
        alone = _stats(zt, uniform_teacher(hs.to(dtype), teacher[1].vocab), batch["labels"], vocab_size, backend)
        parts = (
            both.divergence, both.nll, alone.nll, both.top1_agreement, both.student_entropy, both.teacher_entropy,
        )  # fmt: skip
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        tokens += counted(batch["labels"])
    kl, nll, teacher_nll, top1, entropy, teacher_entropy = (sums / max(tokens, 1)).tolist()
    return Score(kl, _exp(nll), _exp(teacher_nll), top1, entropy, teacher_entropy, tokens)


def _stats(
    student: kd.LinearLogits, teacher: kd.LinearLogits, labels: torch.Tensor, vocab_size: int | None, backend: str
) -> kd.DistillationStats:
    out = kd.distillation_loss(
        student, teacher, labels=labels, shift=True, vocab_size=vocab_size, backend=backend, return_stats=True
    )
    assert isinstance(out, kd.DistillationOutput)
    return out.stats


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
