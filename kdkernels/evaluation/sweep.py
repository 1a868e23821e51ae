"""Figures per token from teacher and student logits of the same rows, a chunk at a time; no logits outlive a chunk.

Columns are float32 [N]; NaN where a column cannot be known (a cache does not hold the likelihood of every token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.chunking import chunk_rows, spans
from kdkernels.errors import UserError
from kdkernels.trainers.heads import Head, check_head, head_of, hidden_states
from kdkernels.trainers.models import common_vocabulary

TEACHER = "teacher"
OWN = ("nll", "accuracy", "entropy", "confidence")
"""Columns of a model by itself."""
BOTH = ("forward_kl", "reverse_kl", "jsd", "agreement", "overlap")
"""Columns of a student beside its teacher."""


@dataclass(frozen=True)
class Subject:
    """A model with its head, in the dtype that all are compared in."""

    model: Any
    head: Head

    @classmethod
    def of(cls, model: Any, role: str, length: int) -> Subject:
        """The model, its head checked, its context long enough for blocks of `length` tokens."""
        head = head_of(model, role)
        check_head(model, head, role, head.weight.device)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise UserError(f"block_size is {length}; the {role} reads at most {limit} tokens; lower it")
        return cls(model, head)

    def to(self, dtype: torch.dtype) -> Subject:
        """The head in another dtype; the model keeps its own."""
        bias = None if self.head.bias is None else self.head.bias.to(dtype)
        return replace(self, head=replace(self.head, weight=self.head.weight.to(dtype), bias=bias))

    @property
    def device(self) -> torch.device:
        """Of the head, and so of the model."""
        return self.head.weight.device

    def hidden(self, batch: Mapping[str, Tensor], keep: Tensor) -> Tensor:
        """Hidden states [n, H] of the rows that `keep` [B, L - 1] names."""
        there = {name: x.to(self.device) for name, x in batch.items()}
        return hidden_states(self.model, there)[:, :-1][keep.to(self.device)].to(self.head.weight.dtype)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H], in the first rows of `out` [C, V]."""
        head, z = self.head, out[: len(hidden)]
        torch.mm(hidden, head.weight.T, out=z)
        if head.bias is not None:
            z += head.bias
        if head.scale is not None:
            z *= head.scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        return z


class Sweep:
    """From a batch to its columns, by model and name: {"student": {"forward_kl": [n], ...}, "teacher": ...}.

    teacher: a `Subject`, or None where its distributions come with each batch. students: by name.
    """

    def __init__(
        self,
        teacher: Subject | None,
        students: Mapping[str, Subject],
        *,
        vocab: int | None,
        top_k: int,
        chunk_bytes: int | None,
        backend: str,
    ) -> None:
        heads = [s.head.weight.dtype for s in (*students.values(), *([teacher] if teacher else []))]
        dtype = heads[0] if len(set(heads)) == 1 else torch.float32
        self.teacher = None if teacher is None else teacher.to(dtype)
        self.students = {name: student.to(dtype) for name, student in students.items()}
        self.device = next(iter(students.values())).device
        self.dtype, self.vocab, self.top_k, self.backend = dtype, vocab, top_k, backend
        self._chunk_bytes = chunk_bytes
        self._space: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def columns(
        self, batch: Mapping[str, Tensor], keep: Tensor, sparse: kd.SparseLogits | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Columns [n] on the CPU for the n positions that `keep` bool [B, L - 1] names, in row-major order.

        batch: `input_ids`, `labels`, and where packed `position_ids`, each [B, L]. sparse: the teacher's distributions
        [B, L, K] in place of a model. A position where a model's hidden state is not finite has NaN in every column.
        """
        labels = batch["labels"][:, 1:][keep].to(self.device)
        hidden = {name: subject.hidden(batch, keep) for name, subject in self.students.items()}
        theirs = None if self.teacher is None else self.teacher.hidden(batch, keep)
        broken = _without_nan([*hidden.values(), *([] if theirs is None else [theirs])])
        rows = None if sparse is None else _rows_of(sparse, keep).to(self.device)
        parts = []
        for begin, end in spans(len(labels), self._chunk(len(labels))):
            here = slice(begin, end)
            mine = {name: h[here] for name, h in hidden.items()}
            if rows is not None:
                parts.append(self._beside_cache(mine, _cut(rows, here), labels[here]))
            else:
                assert self.teacher is not None
                assert theirs is not None
                zt = self._logits(TEACHER, self.teacher, theirs[here])
                parts.append(self._beside_model(mine, zt, labels[here]))
        found = _joined(parts)
        if broken.any():
            for columns in found.values():
                for column in columns.values():
                    column[broken] = torch.nan
        return found

    def _chunk(self, rows: int) -> int:
        sides = [*self.students.values(), *([] if self.teacher is None else [self.teacher])]
        widest = max(side.head.vocab for side in sides)
        return chunk_rows(rows, 2 * widest * self.dtype.itemsize, self._chunk_bytes)

    def _logits(self, side: str, subject: Subject, hidden: Tensor) -> Tensor:
        """A chunk's logits, over the chunk before it: fresh memory for each cost a tenth of their GEMM (2 cores)."""
        space = self._space.get((side, subject.head.vocab))
        if space is None or len(space) < len(hidden):
            space = torch.empty(len(hidden), subject.head.vocab, dtype=self.dtype, device=subject.device)
            self._space[side, subject.head.vocab] = space
        return subject.logits(hidden, space).to(self.device)

    def _beside_model(self, hidden: Mapping[str, Tensor], zt: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        best = self._best(zt)
        for name, h in hidden.items():
            zs = self._logits("student", self.students[name], h)
            ours = self._stats(zs, zt, labels)
            other = self._stats(zt, zs, labels)  # sides swapped: KL(student‖teacher), and the teacher's likelihoods
            found[name] = self._student(zs, zt, labels, ours, other.divergence, best)
            found.setdefault(TEACHER, {
                "nll": other.nll, "accuracy": other.accuracy, "entropy": other.student_entropy,
                "confidence": best.log_probs.amax(-1).exp(),
            })  # fmt: skip
        return found

    def _beside_cache(
        self, hidden: Mapping[str, Tensor], teacher: kd.SparseLogits, labels: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        unknown = torch.full(labels.shape, torch.nan, device=self.device)
        for name, h in hidden.items():
            zs = self._logits("student", self.students[name], h)
            ours = self._stats(zs, teacher, labels)
            if teacher.kind == "sampled":  # draws: an unbiased cross-entropy, and nothing that needs the whole row
                both = {**dict.fromkeys(BOTH, unknown), "forward_kl": ours.divergence}
                found[name] = {**_alone(self._best(zs), ours), **both}
                found.setdefault(TEACHER, dict.fromkeys(OWN, unknown))
                continue
            reverse = self._loss(zs, teacher, labels, "reverse_kl")
            found[name] = self._student(zs, teacher, labels, ours, reverse, teacher)
            top = teacher.ids.gather(-1, teacher.log_probs.argmax(-1, keepdim=True)).squeeze(-1)
            found.setdefault(TEACHER, {
                "nll": unknown, "accuracy": (top == labels).float(), "entropy": ours.teacher_entropy,
                "confidence": teacher.log_probs.amax(-1).exp().float(),
            })  # fmt: skip
        return found

    def _student(
        self,
        zs: Tensor,
        teacher: Tensor | kd.SparseLogits,
        labels: Tensor,
        ours: kd.DistillationStats,
        reverse: Tensor,
        best: kd.SparseLogits,
    ) -> dict[str, Tensor]:
        jsd = self._loss(zs, teacher, labels, "jsd")
        mine = self._best(zs)
        return {
            **_alone(mine, ours), "forward_kl": ours.divergence, "reverse_kl": reverse, "jsd": jsd,
            "agreement": ours.top1_agreement, "overlap": _overlap(mine, best),
        }  # fmt: skip

    def _stats(self, student: Tensor, teacher: Tensor | kd.SparseLogits, labels: Tensor) -> kd.DistillationStats:
        sampled = isinstance(teacher, kd.SparseLogits) and teacher.kind == "sampled"
        out = kd.distillation_loss(
            student, teacher, labels=labels, reduction="none", vocab_size=self.vocab, backend=self.backend,
            return_stats=True, sparse_mode="sampled" if sampled else "ghost",
        )  # fmt: skip
        return out.stats

    def _loss(self, student: Tensor, teacher: Tensor | kd.SparseLogits, labels: Tensor, divergence: str) -> Tensor:
        return kd.distillation_loss(
            student, teacher, divergence, labels=labels, reduction="none", vocab_size=self.vocab, backend=self.backend
        )

    def _best(self, logits: Tensor) -> kd.SparseLogits:
        """The likeliest k entries of rows [n, V]."""
        k = min(self.top_k, self.vocab or logits.shape[-1])
        try:
            return kd.compress(logits, k, vocab_size=self.vocab, backend=self.backend)
        except ValueError as error:
            raise UserError(f"a model whose hidden states are finite has logits that are not: {error}") from error


def _alone(best: kd.SparseLogits, stats: kd.DistillationStats) -> dict[str, Tensor]:
    confidence = best.log_probs.amax(-1).exp()
    return {"nll": stats.nll, "accuracy": stats.accuracy, "entropy": stats.student_entropy, "confidence": confidence}


def vocabulary_of(teacher_rows: int, students: Mapping[str, Subject], tokens: int, asked: int) -> int | None:
    """The entries that every side shares; None where all have the same rows."""
    found = {common_vocabulary(teacher_rows, s.head.vocab, tokens, asked) for s in students.values()}
    known = [size for size in found if size is not None]
    return min(known) if known else None


def _overlap(ours: kd.SparseLogits, theirs: kd.SparseLogits) -> Tensor:
    """Share of the most likely k entries that both sides have [n]; k is what the shorter list keeps."""
    k = min(ours.ids.shape[-1], theirs.ids.shape[-1])
    first, second = _best(ours, k), _best(theirs, k)
    both = (first.unsqueeze(-1) == second.unsqueeze(-2)) & (first >= 0).unsqueeze(-1)
    kept = torch.minimum((first >= 0).sum(-1), (second >= 0).sum(-1))
    return both.sum((-2, -1)) / kept.clamp(min=1)


def _best(sparse: kd.SparseLogits, k: int) -> Tensor:
    """Ids [n, k] of the k likeliest entries, in any order."""
    if sparse.ids.shape[-1] == k:
        return sparse.ids
    order = torch.sort(sparse.log_probs, dim=-1, descending=True, stable=True).indices  # ties: the lower id
    return sparse.ids.gather(-1, order[..., :k])


def _rows_of(sparse: kd.SparseLogits, keep: Tensor) -> kd.SparseLogits:
    """The rows that `keep` [B, L - 1] names of distributions [B, L, K]."""
    where = keep.to(sparse.device)
    entropy = None if sparse.entropy is None else sparse.entropy[:, :-1][where]
    return replace(
        sparse, ids=sparse.ids[:, :-1][where], log_probs=sparse.log_probs[:, :-1][where],
        log_tail=sparse.log_tail[:, :-1][where], entropy=entropy, other_tails={},
    )  # fmt: skip


def _cut(sparse: kd.SparseLogits, here: slice) -> kd.SparseLogits:
    entropy = None if sparse.entropy is None else sparse.entropy[here]
    return replace(
        sparse, ids=sparse.ids[here], log_probs=sparse.log_probs[here], log_tail=sparse.log_tail[here], entropy=entropy
    )


def _without_nan(hidden: Sequence[Tensor]) -> Tensor:
    """Rows [n] where some state [n, H] is not finite, bool on the CPU; there every state is put to zero."""
    broken = torch.stack([~h.isfinite().all(-1).cpu() for h in hidden]).any(0)
    if broken.any():
        for h in hidden:
            h[broken.to(h.device)] = 0
    return broken


def _joined(parts: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Chunks one after the other, on the CPU."""
    if not parts:
        return {}
    return {
        model: {name: torch.cat([part[model][name].float().cpu() for part in parts]) for name in columns}
        for model, columns in parts[0].items()
    }
