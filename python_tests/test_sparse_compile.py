"""Sparse teachers under torch.compile, and torch's own checks of the operators."""

from __future__ import annotations

import pytest
import torch
from cases import linear, pair
from oracle_sparse import draw, keep
from torch import Tensor

import kdkernels as kd
from kdkernels import native

ALL_MODES = ("ghost", "renormalize", "truncate", "sampled")
LABELS = torch.tensor([3, 0, -100, 128, 7, 7])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_compiled(mode: str, fused: bool) -> None:
    backend = "cpp" if native.LIBRARY.is_file() else "eager"
    torch._dynamo.reset()
    student, full = pair("ordinary", 6, 140, torch.float32)
    head = linear(6, 8, 140, torch.float32)
    teacher = draw(full, 12, 2.0) if mode == "sampled" else keep(full, 12, 2.0)

    def loss(x: Tensor, ids: Tensor, log_probs: Tensor, log_tail: Tensor) -> Tensor:
        given = kd.SparseLogits(ids, log_probs, log_tail, 140, 2.0, teacher.kind)
        side = kd.LinearLogits(x, head.weight) if fused else x
        return kd.distillation_loss(
            side, given, sparse_mode=mode, temperature=2.0, labels=LABELS, ce_weight=0.5, backend=backend
        )

    x = head.hidden if fused else student
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaf = x.clone().requires_grad_()
        value = function(leaf, teacher.ids, teacher.log_probs, teacher.log_tail)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """A model, the loss and its backward as generated code; a second call with more rows."""
    backend = "cpp" if native.LIBRARY.is_file() else "eager"
    torch._dynamo.reset()
    weight = torch.randn(140, 16, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor, ids: Tensor, log_probs: Tensor, log_tail: Tensor) -> Tensor:
        given = kd.SparseLogits(ids, log_probs, log_tail, 140, 2.0)
        logits = torch.nn.functional.gelu(x) @ weight.t()
        return kd.distillation_loss(logits, given, "jsd", temperature=2.0, backend=backend) * 3

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="inductor")
    for rows in (6, 9):
        teacher = keep(pair("ordinary", rows, 140, torch.float32)[1], 12, 2.0)
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))
        results = []
        for function in (loss, compiled):
            leaf = x.clone().requires_grad_()
            value = function(leaf, teacher.ids, teacher.log_probs, teacher.log_tail)
            value.backward()
            assert leaf.grad is not None
            assert leaf.grad.norm() > 0.01
            results.append((value.detach(), leaf.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sparse", "linear_sparse"])
def test_opcheck(name: str) -> None:
    backend = "cpp" if native.LIBRARY.is_file() else "eager"
    student, full = pair("ordinary", 3, 14, torch.float32)
    rows = [getattr(keep(full, 4), n) for n in ("ids", "log_probs", "log_tail")]
    weights = [torch.ones(3), torch.full((3,), 0.5), torch.tensor([1, 2, 13])]
    spec = ["jsd", 0.5, 0.0, 1.5, 14, "ghost"]
    head = linear(3, 4, 14, torch.float32, bias=True)
    assert head.bias is not None
    for per_row in (False, True):
        if name == "sparse":
            arguments = [student.clone().requires_grad_(), *rows, *weights, *spec, backend, per_row, True, True]
        else:
            leaves = [x.clone().requires_grad_() for x in (head.hidden, head.weight, head.bias)]
            flags = [2, backend, per_row, True, True, True, True]
            arguments = [*leaves, 1.0, 3.0, *rows, *weights, *spec, *flags]
        torch.library.opcheck(getattr(torch.ops.kdkernels, name).default, arguments)
