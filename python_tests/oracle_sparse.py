"""`oracle.check` for sparse teachers: one call forward and backward against golden_sparse.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import golden
import golden_sparse
import torch
from oracle import (
    Call,
    Logits,
    _leaves,
    _with_leaves,
    assert_within,
    compare_gradients,
    compare_loss,
    compare_stats,
    flat,
    loss_tolerance,
    side,
)
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence


def keep(logits: Tensor, k: int, temperature: float = 1.0, **options: Any) -> kd.SparseLogits:
    """The k most likely entries of each row; float64 for float64 logits, else float32. Finite rows only."""
    lp = (logits.double() / temperature).log_softmax(-1)
    order = lp.sort(dim=-1, descending=True, stable=True).indices
    ids = order[..., :k].sort(-1).values
    rest = order[..., k:].sort(-1).values
    tail = lp.gather(-1, rest).logsumexp(-1)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = lp.gather(-1, ids).to(dtype)
    return kd.SparseLogits(ids.int(), values, tail.to(dtype), logits.shape[-1], temperature, **options)


def draw(logits: Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> kd.SparseLogits:
    """n draws from each row as frequencies; rows have as many entries as they have unique draws."""
    generator = torch.Generator().manual_seed(seed)
    rows = flat((logits.double() / temperature).softmax(-1))
    ids = torch.full((len(rows), n), -1, dtype=torch.int32)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = torch.full((len(rows), n), -torch.inf, dtype=dtype)
    for r, p in enumerate(rows):
        unique, counts = torch.multinomial(p, n, replacement=True, generator=generator).unique(return_counts=True)
        ids[r, : len(unique)] = unique.int()
        values[r, : len(unique)] = (counts.to(dtype) / n).log()
    shape = (*logits.shape[:-1], n)
    tail = torch.full(logits.shape[:-1], -torch.inf, dtype=dtype)
    return kd.SparseLogits(ids.view(shape), values.view(shape), tail, logits.shape[-1], temperature, "sampled")


def shorten(teacher: kd.SparseLogits, lengths: Tensor) -> kd.SparseLogits:
    """The first ``lengths [...]`` entries of each row; the others join the tail."""
    beyond = torch.arange(teacher.ids.shape[-1]) >= lengths[..., None]
    moved = torch.where(beyond, teacher.log_probs, -torch.inf).logsumexp(-1)
    return dataclasses.replace(
        teacher,
        ids=teacher.ids.masked_fill(beyond, -1),
        log_probs=teacher.log_probs.masked_fill(beyond, -torch.inf),
        log_tail=torch.logaddexp(teacher.log_tail, moved),
    )


@dataclasses.dataclass
class SparseCall(Call):
    """`teacher` is the full teacher, which only tolerances ask for."""

    sparse: kd.SparseLogits | None = None
    mode: str = "ghost"

    def golden(self, student: golden.Side, teacher: golden.Side) -> golden.Golden:
        assert self.sparse is not None
        w_kd, w_ce, labels, _ = self.weights()
        rows = golden_sparse.distill(
            student,
            flat(self.sparse.ids),
            flat(self.sparse.log_probs),
            self.sparse.log_tail.reshape(-1),
            self.mode,
            self.divergence.name,
            *dataclasses.astuple(self.divergence),
            temperature=self.temperature,
            w_kd=w_kd * self.incoming,
            w_ce=w_ce * self.incoming,
            labels=None if self.option("labels", None) is None else labels,
            vocab=self.vocab,
        )
        if self.sparse.entropy is not None:
            known = torch.where((w_kd != 0) | (w_ce != 0), self.sparse.entropy.reshape(-1).double(), 0.0)
            rows.stats[:, 1] = torch.where(rows.stats[:, 1].isnan(), torch.nan, known)
        return rows


def check_sparse(
    student: Logits,
    teacher: kd.SparseLogits,
    mode: str,
    divergence: Divergence | str = "forward_kl",
    *,
    backend: str,
    incoming: Tensor | float = 1.0,
    need: tuple[str, ...] = ("logits", "hidden", "weight", "bias"),
    full: Tensor | None = None,
    **options: Any,
) -> None:
    """`oracle.check` with a sparse teacher; `full` are the teacher's logits, for total variation's tolerance."""
    divergence = kd.divergences.get(divergence)
    full = torch.zeros(1, 1) if full is None else full
    call = SparseCall(student, full, divergence, options, incoming, teacher, mode)
    leaves = _leaves(student, need)
    argument = _with_leaves(student, leaves)
    if options.get("inplace") and isinstance(argument, Tensor):
        argument = argument.clone()
    output = kd.distillation_loss(
        argument, teacher, divergence, sparse_mode=mode, backend=backend, return_stats=True, **options
    )
    if not isinstance(student, kd.LinearLogits):
        alone = kd.distillation_loss(student, teacher, divergence, sparse_mode=mode, backend=backend, **options)
        allowed = loss_tolerance(student.dtype) * output.loss.detach().nan_to_num().abs().clamp(min=1)
        assert_within("loss without statistics", alone, output.loss.detach().double(), allowed)
    rows = call.golden(side(student), golden.Side(full))
    unit = rows
    if isinstance(incoming, Tensor) or incoming != 1:
        unit = dataclasses.replace(call, incoming=1.0).golden(side(student), golden.Side(full))
    compare_loss(output.loss, unit, call)
    compare_stats(output.stats, unit, call)
    assert output.loss.requires_grad == bool(leaves)
    if leaves:
        arriving = torch.as_tensor(incoming, dtype=output.loss.dtype)
        arriving = call.keep(arriving.expand(len(rows.loss))) if options.get("reduction") == "none" else arriving
        gradients = torch.autograd.grad(output.loss, list(leaves.values()), arriving)
        compare_gradients(dict(zip(leaves, gradients, strict=True)), rows, call)
