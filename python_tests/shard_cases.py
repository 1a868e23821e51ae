"""Cases of losses over vocabulary shards that one process of several runs; see shard_worker.py.

Each ``case_*`` takes a `World` and asserts. All ranks run the same cases in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import cases
import golden
import oracle
import torch
import torch.distributed as dist
from torch import Tensor

import kdkernels as kd
from kdkernels import collectives, shard_pages

V = 301
LABELS = torch.tensor([0, 300, -100, 150, 7])
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


@dataclasses.dataclass(frozen=True)
class World:
    rank: int
    size: int

    def cuts(self, kind: str, vocab: int = V) -> list[int]:
        """First columns of each rank, and the end; "empty": all but the first and the last hold nothing."""
        if kind == "even":
            return [vocab * i // self.size for i in range(self.size + 1)]
        if kind == "uneven":
            return [0, *(1 + vocab // (3 * (self.size - i)) for i in range(self.size - 1)), vocab]
        return [0, *[vocab // 3] * (self.size - 1), vocab] if self.size > 2 else [0, vocab, vocab]

    def some(self, combinations: Iterator[Any], one_in: int = 1) -> Iterator[Any]:
        """One in so many on two ranks, a fourth of that on more; no multiple of 3, or some kind of cut is left out."""
        step = one_in if self.size == 2 else 4 * one_in
        return itertools.islice(combinations, self.size % step, None, step)

    def columns(self, kind: str, vocab: int = V) -> slice:
        cuts = self.cuts(kind, vocab)
        return slice(cuts[self.rank], cuts[self.rank + 1])


CUTS = ("even", "uneven", "empty")


def every_call() -> Iterator[Any]:
    """dtype, backend, divergence, cut."""
    return (
        (dtype, backend, divergence, cut)
        for dtype, backend, divergence, cut in itertools.product(TOLERANCE, ("eager", "cpp"), cases.ONE_OF_EACH, CUTS)
        if backend == "eager" or (dtype != torch.float64 and divergence.name != "adaptive_kl")
    )


def loss(student: Any, teacher: Any, divergence: Any = "jsd", **options: Any) -> Any:
    return kd.distillation_loss(student, teacher, divergence, group=dist.group.WORLD, **options)


def close(name: str, actual: Tensor, expected: Tensor, scale: Tensor | float, tolerance: float) -> None:
    """Rows of ``actual`` within ``tolerance`` of the natural scale, NaN where due."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places"
    error = (actual.detach().double() - expected).nan_to_num()
    error = error.norm(dim=-1) if error.dim() > 1 else error.abs()
    limit = torch.as_tensor(scale).nan_to_num() * tolerance + 1e-30
    assert bool((error <= limit).all()), f"{name}: {float((error / limit).max()):.3g} times what is allowed"


def everywhere(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return parts


def case_logits(world: World) -> None:
    """Loss, gradient, statistics: every divergence, kind of shards, backend; the loss is the same on every rank."""
    kinds = itertools.cycle(("ordinary", "masked", "near", "finfo_min_student", "flat", "one_hot", "shifted"))
    for dtype, backend, divergence, cut in world.some(every_call()):
        kind, temperature = next(kinds), 0.7 if cut == "uneven" else 1.0
        student, teacher = cases.pair(kind, 5, V, dtype)
        options = {"labels": LABELS, "ce_weight": 0.3, "temperature": temperature}
        columns = world.columns(cut)
        mine = student[:, columns].clone().requires_grad_()
        made = loss(mine, teacher[:, columns].clone(), divergence, backend=backend, return_stats=True, **options)
        made.loss.backward()
        truth = oracle.Call(student, teacher, divergence, options).golden(golden.Side(student), golden.Side(teacher))
        name, tolerance = f"{dtype} {backend} {divergence} {cut} {kind}", TOLERANCE[dtype]
        total = truth.loss.sum()
        close(name, made.loss, total, total.abs().clamp(min=1), tolerance)
        assert mine.grad is not None
        close(f"gradient: {name}", mine.grad, truth.grad[:, columns], truth.scale, tolerance)
        stats = torch.stack(made.stats[:-1], -1)
        close(f"stats: {name}", stats, truth.stats, truth.stats.abs().clamp(min=1).amax(-1), 2 * tolerance)
        assert all(torch.equal(made.loss.detach(), other) for other in everywhere(made.loss)), name


def linear_pair(world: World, cut: str, dtype: torch.dtype, bias: bool) -> tuple[Any, Any, Any, Any, slice]:
    style = {"bias": bias, "softcap": 30.0 if bias else None, "scale": 0.8 if bias else None}
    student = cases.linear(5, 16, V, dtype, **style)
    teacher = cases.linear(5, 24, V, dtype, seed=1)
    columns = world.columns(cut)

    def cut_head(side: kd.LinearLogits) -> kd.LinearLogits:
        own = None if side.bias is None else side.bias[columns].clone()
        return dataclasses.replace(side, weight=side.weight[columns].clone(), bias=own)

    return student, teacher, cut_head(student), cut_head(teacher), columns


def require_gradients(head: kd.LinearLogits) -> None:
    for x in (head.hidden, head.weight, head.bias):
        if x is not None:
            x.requires_grad_()


def check_heads(
    name: str, call: oracle.Call, value: Tensor, mine: kd.LinearLogits, columns: slice, tolerance: float
) -> None:
    """Loss and gradients of this rank's columns of a head against the whole call's, in float64."""
    sides = oracle.side(call.student), oracle.side(call.teacher)
    truth = call.golden(*sides)
    unit = dataclasses.replace(call, incoming=1.0).golden(*sides).loss
    unit = unit if call.option("reduction", "mean") == "none" else unit.sum()
    close(name, value, unit, unit.abs().clamp(min=1), tolerance)
    assert truth.hidden is not None
    assert truth.weight is not None
    close(f"hidden: {name}", mine.hidden.grad, truth.hidden, truth.hidden_scale, tolerance)
    close(f"weight: {name}", mine.weight.grad, truth.weight[columns], truth.weight_scale[columns], tolerance)
    if mine.bias is not None:
        assert truth.bias is not None
        close(f"bias: {name}", mine.bias.grad, truth.bias[columns], truth.bias_scale, tolerance)


def case_heads(world: World) -> None:
    """Gradients of hidden states are of the whole loss, once, on every rank; those of heads are this rank's rows."""
    for dtype, backend, divergence, cut in world.some(every_call()):
        reduction = "none" if cut == "uneven" else "mean"
        student, teacher, mine, theirs, columns = linear_pair(world, cut, dtype, bias=cut != "even")
        require_gradients(mine)
        options = {"labels": LABELS, "ce_weight": 0.3, "temperature": 1.3, "reduction": reduction}
        small = {"chunk_bytes": 4 * 2 * V * dtype.itemsize} if cut == "empty" else {}
        incoming: Any = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], dtype=dtype) if reduction == "none" else 1.0
        value = loss(mine, theirs, divergence, backend=backend, **options, **small)
        value.backward(incoming if reduction == "none" else None)
        call = oracle.Call(student, teacher, divergence, options, incoming)
        check_heads(f"{dtype} {backend} {divergence} {cut}", call, value, mine, columns, 3 * TOLERANCE[dtype])


def case_low_precision(world: World) -> None:
    """bfloat16 and float16: within twice the rounding of the result, as without shards."""
    for dtype, backend, divergence in itertools.product(oracle.LOW, ("eager", "cpp"), ("forward_kl", "jsd")):
        student, teacher = cases.pair("ordinary", 5, V, dtype)
        columns = world.columns("uneven")
        mine, whole = student[:, columns].clone().requires_grad_(), student.clone().requires_grad_()
        value = loss(mine, teacher[:, columns], divergence, backend=backend)
        alone = kd.distillation_loss(whole, teacher, divergence, backend=backend)
        value.backward()
        alone.backward()
        assert torch.allclose(value, alone, rtol=2e-6)
        assert mine.grad is not None
        assert whole.grad is not None
        eps = torch.finfo(dtype).eps
        assert torch.allclose(mine.grad.double(), whole.grad[:, columns].double(), rtol=eps, atol=1e-3 * eps)


def case_options(world: World) -> None:
    """What a token counts, reductions, padding, in-place gradients: as without shards."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, V, dtype=torch.float64) * 3, torch.randn(2, 3, V, dtype=torch.float64) * 3
    labels, weights = torch.tensor([[5, 300, -1], [17, -1, 9]]), torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 3.0]])
    some: list[dict[str, Any]] = [
        {"labels": labels, "ignore_index": -1, "ce_weight": 0.5, "shift": True},
        {"token_weights": weights, "reduction": "sum", "temperature": 2.0, "temperature_scaling": "t2"},
        {"token_weights": weights, "reduction": "none", "labels": labels, "ignore_index": -1},
        {"num_items": 17, "kd_weight": 0.3},
        {"vocab_size": 299, "labels": labels.clamp(max=298), "ignore_index": -1, "ce_weight": 1.0, "kd_weight": 0.0},
        {"vocab_size": 290},
        {"inplace": True, "vocab_size": 290, "labels": labels.clamp(max=17), "ignore_index": -1, "ce_weight": 1.0},
    ]
    for options, cut, divergence in itertools.product(some, CUTS, ("forward_kl", "adaptive_kl")):
        columns = world.columns(cut)
        mine, whole = student[..., columns].clone().requires_grad_(), student.clone().requires_grad_()
        given = mine * 1 if options.get("inplace") else mine
        made = loss(given, teacher[..., columns].clone(), divergence, return_stats=True, **options)
        alone = kd.distillation_loss(whole * 1, teacher, divergence, return_stats=True, **options)
        made.loss.sum().backward()
        alone.loss.sum().backward()
        assert torch.allclose(made.loss, alone.loss, rtol=1e-12, atol=1e-14), options
        assert mine.grad is not None
        assert whole.grad is not None
        assert torch.allclose(mine.grad, whole.grad[..., columns], rtol=1e-11, atol=1e-15), options
        for ours, theirs in zip(made.stats, alone.stats, strict=True):
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-11, atol=1e-12), options


def case_bad_rows(world: World) -> None:
    """A row that is no distribution is NaN on every rank and leaves others alone; padding rows may hold NaN."""
    for backend, divergence in itertools.product(("eager", "cpp"), ("forward_kl", "jsd")):
        student, teacher = cases.pair("ordinary", 5, V, torch.float32)
        student[1, 200], teacher[2, 3], student[3], student[4, 7] = torch.nan, torch.inf, -torch.inf, torch.nan
        columns = world.columns("uneven")
        mine = student[:, columns].clone().requires_grad_()
        weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
        value = loss(mine, teacher[:, columns], divergence, backend=backend, reduction="none", token_weights=weights)
        value.sum().backward()
        bad = torch.tensor([False, True, True, True, False])
        assert mine.grad is not None
        assert torch.equal(value.isnan(), bad), (backend, divergence, value)
        assert torch.equal(mine.grad.isnan(), bad[:, None].expand_as(mine.grad)), (backend, divergence)
        assert bool((mine.grad[4] == 0).all())


class Traffic:
    """Bytes that this rank gives to collectives, and how many there are."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        gather, add = getattr(dist, collectives.GATHER), dist.all_reduce

        def gathering(result: Tensor, x: Tensor, **options: Any) -> Any:
            self.sent.append(x.numel() * x.element_size())
            return gather(result, x, **options)

        def adding(x: Tensor, **options: Any) -> Any:
            self.sent.append(x.numel() * x.element_size())
            return add(x, **options)

        setattr(dist, collectives.GATHER, gathering)
        dist.all_reduce = adding
        try:
            yield
        finally:
            setattr(dist, collectives.GATHER, gather)
            dist.all_reduce = add


def traffic(student: Any, teacher: Any, divergence: Any, **options: Any) -> list[int]:
    """Bytes of each collective of one call, forward and backward, after the page."""
    counting = Traffic()
    with counting.counted():
        loss(student, teacher, divergence, **options).backward()
    assert counting.sent[0] == shard_pages.PAGE
    return counting.sent[1:]


def case_traffic(world: World) -> None:
    """At most 24 bytes a token for forward and reverse KL, 32 for others; labels 4 or 8, hidden states a gradient."""
    columns, rows = world.columns("uneven"), 5
    for kind, backend in itertools.product(("ordinary", "near", "masked"), ("eager", "cpp")):
        student, teacher = (x[:, columns] for x in cases.pair(kind, rows, V, torch.float32))
        for divergence in cases.ONE_OF_EACH:
            if backend == "cpp" and divergence.name == "adaptive_kl":
                continue
            sent = traffic(student.clone().requires_grad_(), teacher, divergence, backend=backend)
            name = f"{kind} {backend} {divergence}: {sent}"
            if divergence.name == "adaptive_kl":
                assert len(sent) == 7, name
                continue
            limit = 24 if divergence.name in ("forward_kl", "reverse_kl") else 32
            assert sum(sent) <= limit * rows, name
            online = backend == "cpp" and limit == 24
            assert sent[0] == (20 if online else 16) * rows, name
            if kind == "ordinary":
                assert sent[1:] == ([] if online else [8 * rows]), name
    given = {"labels": LABELS, "ce_weight": 0.5, "backend": "cpp"}
    student, teacher = (x[:, columns].clone() for x in cases.pair("ordinary", rows, V, torch.float32))
    assert traffic(student.requires_grad_(), teacher, "forward_kl", **given) == [24 * rows]
    assert traffic(student, teacher, "forward_kl", temperature=2.0, **given) == [28 * rows]
    _, _, mine, theirs, _ = linear_pair(world, "uneven", torch.float32, bias=False)
    mine.hidden.requires_grad_()
    assert traffic(mine, theirs, "forward_kl", backend="cpp") == [20 * rows, 4 * 16 * rows]


def case_rows_in_shards(world: World) -> None:
    """Rows spread over ranks (sequence or context parallel) need no group, only the number of all that count."""
    student, teacher = cases.pair("ordinary", 4 * world.size, V, torch.float64)
    labels = torch.arange(4 * world.size)
    labels[1] = -100
    whole, rows = student.clone().requires_grad_(), slice(4 * world.rank, 4 * world.rank + 4)
    alone = kd.distillation_loss(whole, teacher, "jsd", labels=labels, ce_weight=0.5)
    alone.backward()
    mine = student[rows].clone().requires_grad_()
    items = (labels[rows] != -100).sum()
    dist.all_reduce(items)
    value = kd.distillation_loss(mine, teacher[rows], "jsd", labels=labels[rows], ce_weight=0.5, num_items=items)
    value.backward()
    total = value.detach().clone()
    dist.all_reduce(total)
    assert torch.allclose(total, alone, rtol=1e-12)
    assert whole.grad is not None
    assert torch.allclose(mine.grad, whole.grad[rows], rtol=1e-12, atol=1e-16)


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}
