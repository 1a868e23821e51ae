"""Rows in vocabulary shards: the parts that ranks compute and merge give what the whole row gives."""

from __future__ import annotations

import itertools

import cases
import golden
import pytest
import torch
from emulated import TARGETS, serve
from torch import Tensor

from kdkernels.ops.rows import RowSpec, Side
from kdkernels.weights import RowWeights

pytestmark = [pytest.mark.sample(2), pytest.mark.thin(6)]

CUTS = ([0, 150, 301], [0, 7, 7, 301], [0, 1, 100, 300, 301])  # 2, 3 (one empty) and 4 ranks


def in_shards(
    student: Tensor, teacher: Tensor, weights: RowWeights, spec: RowSpec, cuts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence, gradient, statistics and first places as ranks with columns cuts[i] .. cuts[i + 1] get them."""
    from kdkernels.triton import shard_host

    spans = list(itertools.pairwise(cuts))
    sides = [(Side(student[:, a:b].contiguous()), Side(teacher[:, a:b].contiguous())) for a, b in spans]
    specs = [spec._replace(vocab=b - a) for a, b in spans]
    parts = [shard_host.norms(*s, weights, sp, a, True) for s, sp, (a, _) in zip(sides, specs, spans, strict=True)]
    merged = shard_host.merge(torch.stack([n for n, _ in parts]), spec)
    sums = sum(shard_host.sums(*s, weights, sp, merged.norms) for s, sp in zip(sides, specs, strict=True))
    assert isinstance(sums, Tensor)
    pieces = []
    for (s, t), sp, (a, _) in zip(sides, specs, spans, strict=True):
        shard_host.gradient_(s, t, weights, sp, a, merged, sums[:, 1], s.x)  # in place
        pieces.append(s.x)
    stats = torch.cat([sums[:, :1], merged.entropies, merged.nll[:, None]], 1)
    places = torch.stack([p for _, p in parts if p is not None])
    best = torch.stack([n[:, [0, 2]] for n, _ in parts]).argmax(0)
    return sums[:, 0], torch.cat(pieces, 1), stats, places.gather(0, best[None])[0]


@pytest.mark.parametrize("kind", ["ordinary", "masked", "finfo_min_student", "one_hot", "shifted"])
@pytest.mark.parametrize("kernel", ["forward_kl", "jsd"])
@pytest.mark.parametrize("target", TARGETS)
def test_shards_give_what_the_whole_row_gives(
    target: int, kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, target)
    student, teacher = cases.pair(kind, 3, 301, torch.float32)
    labels = torch.tensor([0, 300, 160])
    weights = RowWeights(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.3, 0.0, 0.0]), labels)
    spec = RowSpec(kernel, 0.5, 0.0, 1.5, 301)
    truth = golden.distill(golden.Side(student), golden.Side(teacher), kernel, *((0.5,) if kernel == "jsd" else ()),
                           temperature=1.5, w_kd=weights.kd, w_ce=weights.ce, labels=labels)  # fmt: skip
    for cuts in CUTS:
        value, grad, stats, places = in_shards(student, teacher, weights, spec, cuts)
        counts = torch.tensor([True, True, False])
        assert torch.allclose(value[counts].double(), truth.stats[counts, 0], rtol=2e-6, atol=2e-6)
        assert golden.gradient_error(grad, truth.grad, truth.scale) <= 1e-6
        assert (grad[2] == 0).all()
        expected = truth.stats[:2, [0, 1, 2, 4]]
        assert torch.allclose(stats[:2].double(), expected, rtol=3e-6, atol=3e-6)
        assert torch.equal(places[:2, 0], student[:2].argmax(-1))
        assert torch.equal(places[:2, 1], teacher[:2].argmax(-1))


def test_a_bad_row_is_nan_on_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch)
    student, teacher = cases.pair("ordinary", 5, 301, torch.float32)
    student[1, 200], teacher[2, 3], student[3] = torch.nan, torch.inf, -torch.inf
    weights = RowWeights(torch.ones(5), None, None)
    value, grad, _, _ = in_shards(student, teacher, weights, RowSpec("jsd", 0.5, 0.0, 1.0, 301), CUTS[0])
    bad = torch.tensor([False, True, True, True, False])
    assert torch.equal(value.isnan(), bad)
    assert torch.equal(grad.isnan(), bad[:, None].expand_as(grad))
