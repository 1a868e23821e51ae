"""Weights of domains: the method's vectors, its bounds, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels.ddk import DomainWeights

NAMES = ["a", "b", "c", "d"]
X = [1.9, 1.3, 1.1, 1.2]
ONE = dict.fromkeys(NAMES, 1.0)


def ratios(x: list[float]) -> dict[str, float]:
    return dict(zip(NAMES, x, strict=True))


def shares(weights: DomainWeights) -> list[float]:
    return list(weights.weights.values())


def test_the_vectors_of_the_method() -> None:
    weights = kd.ddk.DomainWeights(NAMES, alpha=0.5)
    assert shares(weights) == pytest.approx([0.25] * 4, abs=1e-15)
    assert list(weights.update(ratios(X), ONE).values()) == pytest.approx(
        [0.400846, 0.219989, 0.180112, 0.199054], abs=6e-7
    )
    weights.update(ratios(X), ONE)
    assert shares(weights) == pytest.approx([0.410765, 0.211071, 0.182695, 0.195469], abs=6e-7)
    weights.update(ratios([1.5, 1.3, 1.1, 1.2]), ONE)
    assert shares(weights) == pytest.approx([0.366386, 0.226552, 0.196966, 0.210096], abs=6e-7)
    for _ in range(200):
        weights.update(ratios(X), ONE)
    assert shares(weights) == pytest.approx([0.421518, 0.203604, 0.18277, 0.192108], abs=6e-7)


def test_only_the_ratio_counts() -> None:
    a, b = DomainWeights(NAMES), DomainWeights(NAMES)
    teacher = {"a": 3.0, "b": 7.0, "c": 11.0, "d": 2.0}
    a.update(ratios(X), ONE)
    b.update({name: x * teacher[name] for name, x in ratios(X).items()}, teacher)
    assert shares(a) == pytest.approx(shares(b), rel=1e-12)
    assert b.discrepancies == pytest.approx(ratios(X))


@pytest.mark.parametrize("variant", ["no_smoothing", "equal"])
def test_variants(variant: str) -> None:
    weights = DomainWeights(NAMES, variant=variant)
    for x in ([9.0, 1.0, 1.0, 1.0], X):
        weights.update(ratios(x), ONE)
    first = np.exp(X) / np.exp(X).sum()
    assert shares(weights) == pytest.approx([0.25] * 4 if variant == "equal" else first, rel=1e-12)


@given(
    x=st.lists(st.lists(st.floats(1e-3, 1e5), min_size=3, max_size=3), min_size=2, max_size=6), alpha=st.floats(0, 1)
)
def test_shares_sum_to_one_and_keep_their_bounds(x: list[list[float]], alpha: float) -> None:
    weights = DomainWeights(["a", "b", "c"], alpha)
    for number, row in enumerate(x):
        found = weights.update(dict(zip("abc", row, strict=True)), dict.fromkeys("abc", 1.0))
        assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
        if number:
            low = (1 - alpha) / 3
            assert all(low - 1e-12 <= share <= alpha + low + 1e-12 for share in found.values())


def test_ratios_that_overflow_an_exponential() -> None:
    weights = DomainWeights(["a", "b"])
    weights.update({"a": 1e9, "b": 1e9 - 1}, {"a": 1.0, "b": 1.0})
    assert weights.weights["b"] == pytest.approx(1 / (1 + math.e), rel=1e-6)


def test_state_goes_on() -> None:
    a, b = DomainWeights(NAMES), DomainWeights(NAMES)
    a.update(ratios(X), ONE)
    b.load_state_dict(a.state_dict())
    assert a.update(ratios(X[::-1]), ONE) == b.update(ratios(X[::-1]), ONE)
    with pytest.raises(ValueError, match=r"state\['alpha'\] = 0.5"):
        DomainWeights(NAMES, 0.25).load_state_dict(a.state_dict())


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"a": math.nan}, r"student_ppl\['a'\] = nan: must be a finite number > 0"),
        ({"b": math.inf}, r"student_ppl\['b'\] = inf"),
        ({"c": 0.0}, r"student_ppl\['c'\] = 0.0"),
        ({"d": None}, "without domain 'd'"),
        ({"e": 2.0}, "'e': 2.0: must be of the domains"),
    ],
)
def test_bad_perplexities_change_nothing(student: dict[str, Any], message: str) -> None:
    weights = DomainWeights(NAMES)
    weights.update(ratios(X), ONE)
    before = weights.state_dict()
    with pytest.raises(ValueError, match=message):
        weights.update({k: v for k, v in {**ONE, **student}.items() if v is not None}, ONE)
    assert weights.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "domains"),
        (("ab",), "domains"),
        ((["a", "a"],), "'a' comes twice"),
        ((NAMES, 1.5), r"alpha = 1.5: must be in \[0, 1\]"),
        ((NAMES, math.nan), "alpha"),
    ],
)
def test_bad_settings(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        DomainWeights(*arguments)


def test_unknown_variant_is_guessed() -> None:
    with pytest.raises(ValueError, match="did you mean 'equal'"):
        DomainWeights(NAMES, variant="equals")
