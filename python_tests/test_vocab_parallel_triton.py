"""The Triton parts behind `kdkernels.ops.shards`: what ranks send, merged, gives what the whole row gives."""

from __future__ import annotations

import dataclasses
import itertools

import cases
import golden
import pytest
import torch
from emulated import serve

from kdkernels import eager_shards
from kdkernels.ops.rows import RowSpec, Side
from kdkernels.ops.shard_parts import TritonParts
from kdkernels.weights import RowWeights


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["ordinary", "masked"])
@pytest.mark.parametrize("kernel", ["forward_kl", "jsd"])
def test_shards_give_what_the_whole_row_gives(kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch)
    student, teacher = cases.pair(kind, 3, 301, torch.float32)
    weights = RowWeights(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.3, 0.2, 0.0]), torch.tensor([0, 300, 160]))
    spec = RowSpec(kernel, 0.5, 0.0, 1.5, 301)
    parameters = (0.5,) if kernel == "jsd" else ()
    truth = golden.distill(
        student, teacher, kernel, *parameters, temperature=1.5, w_kd=weights.kd, w_ce=weights.ce, labels=weights.labels
    )
    spans = list(itertools.pairwise([0, 100, 100, 301]))
    sides = [(Side(student[:, a:b].contiguous()), Side(teacher[:, a:b].contiguous())) for a, b in spans]
    specs = [spec._replace(vocab=b - a) for a, b in spans]
    parts = TritonParts()
    layout = parts.layout(spec, weights, True)
    shares = [parts.norms(*s, weights, sp, a, layout) for s, sp, (a, _) in zip(sides, specs, spans, strict=True)]
    merged = eager_shards.merge(torch.stack(shares), weights, spec, 301, layout)
    made = torch.stack([parts.sums(*s, weights, sp, merged, None) for s, sp in zip(sides, specs, strict=True)])
    term, grad = made.double().sum(0).unbind(-1)
    merged = dataclasses.replace(merged, rows=merged.rows._replace(divergence=term, total=grad))
    for (s, t), sp, (a, _) in zip(sides, specs, spans, strict=True):
        parts.gradient_(s, t, weights, sp, a, merged, s.x)
    gradient = torch.cat([s.x for s, _ in sides], 1)
    assert golden.gradient_error(gradient, truth.grad, truth.scale) <= 1e-6
    assert torch.allclose(eager_shards.losses(merged, weights).double(), truth.loss, rtol=2e-6, atol=2e-6)
    stats = eager_shards.statistics(merged, weights).double()
    assert torch.allclose(stats, truth.stats, rtol=3e-6, atol=3e-6)
