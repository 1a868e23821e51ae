"""Draws by weight: shares, shuffles, wraps, ranks, and going on in the middle of an interval."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.ddk import DomainSampler

SIZES = {"code": 30, "prose": 7, "lists": 12}
SHARES = [{"code": 0.5, "prose": 0.3, "lists": 0.2}, {"code": 0.1, "prose": 0.6, "lists": 0.3}]


def sampler(**options: Any) -> DomainSampler:
    return DomainSampler(SIZES, **{"interval": 24, "seed": 3, **options})


def intervals(draw: DomainSampler, count: int = 4) -> list[list[int]]:
    found = []
    for number in range(count):
        found.append(list(draw))
        draw.set_weights(SHARES[number % 2])
    return found


def test_an_interval_takes_each_share() -> None:
    draw = sampler(weights=SHARES[0])
    assert draw.counts() == {"code": 12, "prose": 7, "lists": 5}
    for number, indices in enumerate(intervals(draw)):
        found = Counter(draw.locate(i)[0] for i in indices)
        assert len(indices) == len(draw) == 24
        expected = SHARES[0] if number == 0 else SHARES[(number - 1) % 2]
        assert all(abs(found[name] - 24 * share) < 1 for name, share in expected.items())


@given(
    weights=st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 1e-3),
    interval=st.integers(1, 200),
)
def test_counts_are_whole_and_nearest(weights: list[float], interval: int) -> None:
    draw = DomainSampler(SIZES, interval=interval, weights=dict(zip(SIZES, weights, strict=True)))
    counts = draw.counts()
    assert sum(counts.values()) == interval
    for name, share in draw.weights.items():
        assert abs(counts[name] - share * interval) < 1 + 1e-9
        assert share > 0 or counts[name] == 0


def test_a_domain_is_used_up_before_it_begins_again() -> None:
    draw = sampler(weights={"code": 0.0, "prose": 1.0, "lists": 0.0})
    drawn = [draw.locate(i)[1] for indices in (list(draw), list(draw), list(draw)) for i in indices]
    assert len(drawn) == 72
    counts = Counter(drawn)
    assert set(counts) == set(range(7))
    assert max(counts.values()) - min(counts.values()) == 1  # 72 draws of 7: ten rounds and two
    assert sorted(drawn[:24])[:7] != drawn[:7]  # shuffled


def test_weights_of_an_interval_that_has_begun_stay() -> None:
    a, b = sampler(), sampler()
    ours = iter(a)
    first = [next(ours) for _ in range(5)]
    a.set_weights(SHARES[1])
    assert first + list(ours) == list(b)
    assert a.weights == pytest.approx(SHARES[1])  # those of the next interval
    assert Counter(a.locate(i)[0] for i in a)["prose"] in (14, 15)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_taken_in_turn_are_one_process(ranks: int) -> None:
    whole = intervals(sampler(weights=SHARES[0]))
    parts = [intervals(sampler(weights=SHARES[0], rank=r, world_size=ranks)) for r in range(ranks)]
    for number, indices in enumerate(whole):
        assert [i for turn in zip(*(part[number] for part in parts), strict=True) for i in turn] == indices


@pytest.mark.parametrize("stop", [0, 1, 9, 24])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_stopped_goes_on_with_the_same_draws(stop: int, ranks: int) -> None:
    draw = sampler(rank=0, world_size=ranks)
    intervals(draw, 1)
    ahead = iter(draw)
    taken = [next(ahead) for _ in range(min(stop, len(draw)))]
    draw.set_weights(SHARES[1])
    state = json.loads(json.dumps(draw.state_dict()))
    again = sampler(rank=0, world_size=ranks, weights=SHARES[1])
    again.load_state_dict(state)
    if len(taken) < len(draw):
        assert list(again) == list(ahead)
    assert intervals(again, 3) == intervals(draw, 3)


def test_what_a_loader_fetched_ahead_is_drawn_again() -> None:
    draw, again = sampler(), sampler()
    yielded = list(draw)
    again.load_state_dict(draw.state_dict(consumed=6))
    assert list(again) == yielded[6:]
    with pytest.raises(ValueError, match="consumed = 25"):
        draw.state_dict(consumed=25)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_over_the_domains(workers: int) -> None:
    data = {name: TensorDataset(torch.arange(size) + 100 * n) for n, (name, size) in enumerate(SIZES.items())}
    draw = DomainSampler(data, interval=24, weights=SHARES[0])
    loader = DataLoader(draw.dataset, batch_size=8, sampler=draw, num_workers=workers)
    seen = torch.cat([batch for (batch,) in loader])
    assert Counter(int(value) // 100 for value in seen) == {0: 12, 1: 7, 2: 5}
    assert len(set(seen.tolist())) == 24
    draw.set_weights({"code": 0, "prose": 0, "lists": 1})
    assert all(int(value) >= 200 for (batch,) in loader for value in batch)


def test_seeds_differ() -> None:
    assert list(sampler(seed=1)) != list(sampler(seed=2))
    first, second = intervals(sampler(), 2)
    assert first != second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval = 0: must be a positive multiple of world_size = 1"),
        ({"interval": 25, "rank": 0, "world_size": 2}, "interval = 25: must be a positive multiple of world_size = 2"),
        ({"rank": 2, "world_size": 2}, "rank, world_size = 2, 2"),
        ({"rank": 1}, "both given or neither"),
        ({"weights": {"code": 1.0}}, "one number for each of"),
        ({"weights": {"code": -1.0, "prose": 1.0, "lists": 1.0}}, r"weights\['code'\] = -1.0"),
        ({"weights": {"code": float("nan"), "prose": 1.0, "lists": 1.0}}, r"weights\['code'\] = nan"),
        ({"weights": {"code": 0, "prose": 0, "lists": 0}}, "not all 0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_bad_data() -> None:
    with pytest.raises(ValueError, match=r"datasets\['none'\] = empty"):
        DomainSampler({"some": 3, "none": 0}, interval=4)
    with pytest.raises(TypeError, match=r"datasets\['stream'\] = .*: must be a map-style dataset"):
        DomainSampler({"stream": iter([])}, interval=4)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="a mapping from domain"):
        DomainSampler({}, interval=4)
    with pytest.raises(TypeError, match="a dataset, to make one of all domains"):
        _ = sampler().dataset
    with pytest.raises(ValueError, match=r"state\['seed'\] = 3"):
        sampler(seed=4).load_state_dict(sampler().state_dict())
    with pytest.raises(IndexError, match="index = 49"):
        sampler().locate(49)
