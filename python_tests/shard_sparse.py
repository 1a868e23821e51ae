"""Cases of sparse teachers over vocabulary shards: the student's columns are sharded, every rank has the teacher."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import cases
import golden
import torch
from oracle_sparse import SparseCall, draw, keep, shorten
from shard_cases import (
    CUTS,
    LABELS,
    TOLERANCE,
    Traffic,
    V,
    World,
    check_heads,
    close,
    everywhere,
    linear_pair,
    loss,
    require_gradients,
    traffic,
)
from shard_faults import refused
from torch import Tensor

import kdkernels as kd
from kdkernels import shard_pages

SEPARABLE = [d for d in cases.ONE_OF_EACH if d.name != "adaptive_kl"]


def calls() -> Iterator[tuple[Any, str, Any, str]]:
    """dtype, mode, divergence, cut."""
    modes = [("ghost", SEPARABLE), ("renormalize", SEPARABLE), ("truncate", SEPARABLE), ("sampled", [kd.ForwardKL()])]
    return (
        (dtype, mode, divergence, cut)
        for dtype, (mode, divergences) in itertools.product(TOLERANCE, modes)
        for divergence, cut in itertools.product(divergences, CUTS)
    )


def teacher_of(logits: Tensor, mode: str, temperature: float, kept: int) -> kd.SparseLogits:
    if mode == "sampled":
        return draw(logits, 40, temperature)
    whole = keep(logits, kept, temperature)
    lengths = torch.tensor([kept, 1, kept, max(1, kept // 2), kept])
    return shorten(whole, lengths) if kept < V else whole


def finite(logits: Tensor) -> Tensor:
    return logits.nan_to_num(neginf=-60.0).clamp(min=-60.0)


def case_sparse(world: World) -> None:
    """Loss, gradient, statistics of every mode and divergence; the loss is the same on every rank."""
    kinds = itertools.cycle(("ordinary", "masked", "near", "flat", "shifted"))
    sizes = itertools.cycle((7, 1, 64, V))
    for dtype, mode, divergence, cut in world.some(calls(), 2):
        kind, temperature, kept = next(kinds), 0.7 if cut == "uneven" else 1.0, next(sizes)
        if divergence.name == "total_variation" and kind in ("near", "flat"):
            kind = "ordinary"  # the sign of p - q is that of a rounding there
        student, full = cases.pair(kind, 5, V, dtype)
        teacher = teacher_of(finite(full), mode, temperature, kept)
        options = {"labels": LABELS, "ce_weight": 0.3, "temperature": temperature}
        columns = world.columns(cut)
        mine = student[:, columns].clone().requires_grad_()
        made = loss(mine, teacher, divergence, sparse_mode=mode, return_stats=True, **options)
        made.loss.backward()
        call = SparseCall(student, full, divergence, options, 1.0, teacher, mode)
        truth = call.golden(golden.Side(student), golden.Side(full))
        name, tolerance = f"{dtype} {mode} {divergence} {cut} {kind} K={kept}", TOLERANCE[dtype]
        total = truth.loss.sum()
        close(name, made.loss, total, total.abs().clamp(min=1), tolerance)
        assert mine.grad is not None
        close(f"gradient: {name}", mine.grad, truth.grad[:, columns], truth.scale, tolerance)
        stats = torch.stack(made.stats[:-1], -1)
        close(f"stats: {name}", stats, truth.stats, truth.stats.abs().clamp(min=1).amax(-1), 2 * tolerance)
        assert all(torch.equal(made.loss.detach(), other) for other in everywhere(made.loss)), name


def case_sparse_heads(world: World) -> None:
    """A student's head in shards, chunked and per row: gradients of hidden states are of the whole loss, once."""
    modes = itertools.cycle(("ghost", "renormalize", "truncate"))
    for dtype, divergence, cut in world.some(itertools.product(TOLERANCE, SEPARABLE, CUTS), 2):
        mode, reduction = next(modes), "none" if cut == "uneven" else "mean"
        student, full, mine, _, columns = linear_pair(world, cut, dtype, bias=cut != "even")
        teacher = keep(full.materialize(), 9, 1.3)
        require_gradients(mine)
        options = {"labels": LABELS, "ce_weight": 0.3, "temperature": 1.3, "reduction": reduction}
        small = {"chunk_bytes": 4 * V * dtype.itemsize} if cut == "empty" else {}
        incoming: Any = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], dtype=dtype) if reduction == "none" else 1.0
        value = loss(mine, teacher, divergence, sparse_mode=mode, **options, **small)
        value.backward(incoming if reduction == "none" else None)
        call = SparseCall(student, full, divergence, options, incoming, teacher, mode)
        check_heads(f"{dtype} {mode} {divergence} {cut}", call, value, mine, columns, 3 * TOLERANCE[dtype])


def case_sparse_options(world: World) -> None:
    """Padding, token weights, in-place gradients, a teacher's own entropy, compress over shards: as without shards."""
    torch.manual_seed(1)
    student, full = torch.randn(2, 3, V, dtype=torch.float64) * 3, torch.randn(2, 3, V, dtype=torch.float64) * 3
    labels = torch.tensor([[5, 289, -1], [17, -1, 9]])
    entropy = torch.rand(2, 3, dtype=torch.float64)
    some: list[dict[str, Any]] = [
        {"labels": labels, "ignore_index": -1, "ce_weight": 0.5, "shift": True},
        {"token_weights": torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 3.0]]), "reduction": "none"},
        {"vocab_size": 290, "inplace": True},
    ]
    for options, cut in itertools.product(some, CUTS):
        columns = world.columns(cut)
        teacher = dataclasses.replace(kd.compress(full[..., : options.get("vocab_size", V)], 8), entropy=entropy)
        mine, whole = student[..., columns].clone().requires_grad_(), student.clone().requires_grad_()
        made = loss(mine * 1, teacher, "jsd", return_stats=True, **options)
        alone = kd.distillation_loss(whole * 1, teacher, "jsd", return_stats=True, **options)
        made.loss.sum().backward()
        alone.loss.sum().backward()
        assert torch.allclose(made.loss, alone.loss, rtol=1e-12, atol=1e-14), options
        assert mine.grad is not None
        assert whole.grad is not None
        assert torch.allclose(mine.grad, whole.grad[..., columns], rtol=1e-11, atol=1e-15), options
        for ours, theirs in zip(made.stats, alone.stats, strict=True):
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-11, atol=1e-12), options


def case_sparse_bad_rows(world: World) -> None:
    """Rows without a distribution are NaN on every rank and leave others alone; ids out of order are an error."""
    student, full = cases.pair("ordinary", 5, V, torch.float32)
    teacher = keep(full, 6)
    student[1, 200], student[3], student[4, 7] = torch.nan, -torch.inf, torch.nan
    teacher.log_probs[2, 1] = torch.inf
    mine = student[:, world.columns("uneven")].clone().requires_grad_()
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    value = loss(mine, teacher, reduction="none", token_weights=weights)
    value.sum().backward()
    bad = torch.tensor([False, True, True, True, False])
    assert mine.grad is not None
    assert torch.equal(value.isnan(), bad), value
    assert torch.equal(mine.grad.isnan(), bad[:, None].expand_as(mine.grad))
    assert bool((mine.grad[4] == 0).all())
    teacher.ids[0, 0] = V
    refused(ValueError, "teacher.ids", call=lambda: loss(mine, teacher, reduction="none", token_weights=weights))


def case_sparse_digest(world: World) -> None:
    """As on a GPU: a digest of the call rides in the gather; where modes differ, the loss is NaN, then an error."""
    student, full = cases.pair("ordinary", 5, V, torch.float32)
    mine, last = student[:, world.columns("even")].clone(), world.rank == world.size - 1
    whole = loss(mine, keep(full, 6))
    before = shard_pages.exchanges_always
    shard_pages.exchanges_always = lambda device: False
    try:
        assert torch.equal(loss(mine, keep(full, 6)), whole)
        assert loss(mine, keep(full, 6), sparse_mode="truncate" if last else "ghost").isnan()
        refused(ValueError, "group", "different calls", call=lambda: loss(mine, keep(full, 6)))
        assert torch.equal(loss(mine, keep(full, 6)), whole)
    finally:
        shard_pages.exchanges_always = before


def case_sparse_traffic(world: World) -> None:
    """24 bytes a token: a gather of 16 and a sum of 8; labels 4 or 8, statistics 8, hidden states a gradient."""
    rows = 5
    student, full = cases.pair("ordinary", rows, V, torch.float32)
    mine = student[:, world.columns("uneven")].clone().requires_grad_()
    for mode, divergence in (("ghost", "jsd"), ("renormalize", "reverse_kl"), ("truncate", "alpha_beta")):
        assert traffic(mine, keep(full, 8), divergence, sparse_mode=mode) == [16 * rows, 8 * rows]
    given = {"labels": LABELS, "ce_weight": 0.5}
    assert traffic(mine, keep(full, 8), "jsd", **given) == [20 * rows, 8 * rows]
    assert traffic(mine, keep(full, 8, 2.0), "jsd", temperature=2.0, **given) == [24 * rows, 8 * rows]
    with (counting := Traffic()).counted():
        loss(mine, keep(full, 8), "jsd", return_stats=True)
    assert counting.sent[1:] == [24 * rows, 8 * rows]
    _, theirs, head, _, _ = linear_pair(world, "uneven", torch.float32, bias=False)
    head.hidden.requires_grad_()
    assert traffic(head, keep(theirs.materialize(), 8), "jsd") == [16 * rows, 8 * rows, 4 * 16 * rows]


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}
