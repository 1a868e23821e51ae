"""Change-points: found where they are, not found where they are not, at the level that is promised."""

from __future__ import annotations

import pytest
import torch

from kdkernels.switch.drops import change_point


def curve(steps: int, at: int, height: float, seed: int) -> list[float | None]:
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(seed)).double()
    return (noise + height * (torch.arange(steps) >= at)).tolist()


@pytest.mark.parametrize(("at", "height"), [(20, 3.0), (50, -2.5), (6, 4.0)])
def test_a_clear_break_is_found(at: int, height: float) -> None:
    for seed in range(5):
        found = change_point(curve(64, at, height, seed))
        assert found is not None
        assert abs(found.position - at) <= 2
        assert (found.after - found.before) * height > 0
        assert found.after - found.before == pytest.approx(height, abs=1.2)
        assert found.p_value <= 0.01


def test_noise_has_a_break_as_often_as_the_level_says() -> None:
    found = sum(change_point(curve(40, 0, 0.0, seed), level=0.2, permutations=199) is not None for seed in range(200))
    assert 20 <= found <= 62  # binomial(200, .2): 4 standard deviations


def test_the_exact_step() -> None:
    found = change_point([0.25] * 10 + [0.5] * 14)
    assert found is not None
    assert (found.position, found.before, found.after) == (10, 0.25, 0.5)


def test_what_is_unknown_is_left_out_and_positions_stay() -> None:
    values: list[float | None] = [None, *[0.1] * 9, None, *[0.9] * 9]
    found = change_point(values)
    assert found is not None
    assert found.position == 11
    assert found.before == pytest.approx(0.1)
    weights = [0.0 if v is None else 1.0 for v in values]
    wild = [5.0 if v is None else v for v in values]
    assert change_point(wild, weights) == found


def test_weights_are_those_of_the_means() -> None:
    found = change_point([0.0] * 8 + [1.0, 3.0] * 4, [1.0] * 8 + [3.0, 1.0] * 4)
    assert found is not None
    assert found.after == pytest.approx(1.5)


@pytest.mark.parametrize("values", [[], [None] * 30, [0.1] * 7, [0.3] * 40])
def test_nothing_to_find(values: list[float | None]) -> None:
    assert change_point(values) is None


def test_weights_must_match() -> None:
    with pytest.raises(ValueError, match="weights = 2 of them"):
        change_point([0.1] * 10, [1.0, 2.0])
