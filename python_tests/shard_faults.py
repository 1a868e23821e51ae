"""Cases in which ranks call differently: an error on every one of them that names what differs."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from shard_cases import LABELS, Traffic, V, World, loss

import kdkernels as kd
from kdkernels import shard_pages


def refused(error: type[Exception], *words: str, call: Any) -> None:
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), f"{raised.value} lacks {words}"


def case_mismatches(world: World) -> None:
    """Ranks that call differently: an error on every one of them that names what differs; then all is well again."""
    columns, last = world.columns("even"), world.rank == world.size - 1
    student, teacher = (x[:, columns].clone() for x in cases.pair("ordinary", 5, V, torch.float32))
    labels = LABELS.clone()

    def call(s: Any = student, t: Any = teacher, divergence: Any = "jsd", **options: Any) -> Any:
        return lambda: loss(s, t, divergence, **options)

    shorter = (student[:4], teacher[:4]) if last else (student, teacher)
    refused(ValueError, "leading shape", "[4]", "[5]", call=call(*shorter))
    doubled = (student.double(), teacher.double()) if last else (student, teacher)
    refused(ValueError, "dtype", "float64", call=call(*doubled))
    refused(ValueError, "divergence", "forward_kl", call=call(divergence="forward_kl" if last else "jsd"))
    refused(ValueError, "divergence", call=call(divergence="\u767a\u6563\n" * 900 if last else "jsd"))
    refused(ValueError, "divergence", "0.2", call=call(divergence=kd.JSD(0.2 if last else 0.3)))
    refused(ValueError, "temperature", "2.0", call=call(temperature=2.0 if last else 1.0))
    refused(ValueError, "reduction", "sum", call=call(reduction="sum" if last else "mean"))
    refused(ValueError, "backend", "eager", call=call(backend="eager" if last else "cpp"))
    refused(ValueError, "gradients", "True", call=call(student.clone().requires_grad_(last)))
    refused(ValueError, "return_stats", call=call(return_stats=last))
    labels[0] += last
    refused(ValueError, "labels", "checksum", call=call(labels=labels))
    words = ("rank", "temperature", "must be > 0") if not last else ("temperature", "must be > 0")
    refused(ValueError, *words, call=call(temperature=-1.0 if last else 1.0))
    refused(ValueError, "vocabularies", "different tokenizers", call=call(t=teacher[:, 1:] if last else teacher))
    refused(ValueError, "vocab_size", "at most", call=call(vocab_size=V + 1))
    refused(ValueError, "labels", f"[0, {V})", call=call(labels=torch.full((5,), V)))
    moved = student
    if world.rank < 2:
        moved = student[:, 1:] if world.rank else torch.cat((student, student[:, :1]), 1)
    refused(ValueError, "shards", "cut at the same columns", call=call(moved))
    sparse = kd.compress(torch.randn(5, 50, generator=torch.Generator().manual_seed(world.rank)), 3)
    refused(ValueError, "teacher", "SparseLogits", "checksum", call=call(t=sparse))
    refused(ValueError, "vocabularies", "teacher 50", call=call(t=kd.compress(torch.ones(5, 50), 3)))
    sparse = kd.compress(torch.ones(5, V), 3)
    refused(ValueError, "backend", "plain torch", call=call(t=sparse, backend="cpp"))
    refused(ValueError, "temperature", "log-probabilities", call=call(t=sparse, temperature=2.0))
    refused(ValueError, "sparse_mode", call=call(sparse_mode="renormalize"))
    refused(ValueError, "backend", "float64", call=call(student.double(), teacher.double(), backend="cpp"))
    leaf = student.clone().requires_grad_() * 1 if last else student.clone().requires_grad_()
    refused(ValueError, "inplace", "leaf", call=call(leaf, inplace=True))
    refused(TypeError, "group", "a ProcessGroup", call=lambda: kd.distillation_loss(student, teacher, group="tp"))
    assert loss(student, teacher).isfinite()


def case_digests(world: World) -> None:
    """Where looking costs a synchronisation: a digest rides in the first gather, a difference is NaN, then an error."""
    columns, last = world.columns("even"), world.rank == world.size - 1
    student, teacher = (x[:, columns].clone() for x in cases.pair("ordinary", 5, V, torch.float32))
    whole = loss(student, teacher)
    before = shard_pages.exchanges_always
    shard_pages.exchanges_always = lambda device: False
    try:
        assert torch.equal(loss(student, teacher), whole)
        counting = Traffic()
        with counting.counted():
            assert torch.equal(loss(student, teacher), whole)
        assert counting.sent == [16 * 5 + 4, 8 * 5]
        with counting.counted():  # one rank's error cannot reach the others, who are among their rows: no waiting
            refused(ValueError, "temperature", "> 0", call=lambda: loss(student, teacher, temperature=-1.0))
        assert counting.sent == [16 * 5 + 4, 8 * 5]
        assert loss(student, teacher, temperature=2.0 if last else 1.0).isnan()
        refused(ValueError, "group", "different calls", call=lambda: loss(student, teacher))
        assert torch.equal(loss(student, teacher), whole)
    finally:
        shard_pages.exchanges_always = before


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}
