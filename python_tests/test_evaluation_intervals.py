"""Intervals: Student's quantiles, coverage of the clustered bootstrap, edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdkernels.evaluation.intervals import mean_intervals, rate_intervals, resampled_sums, student_quantile


@pytest.mark.parametrize(
    ("freedom", "upper", "far"),
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (5, 2.571, 4.032),
        (10, 2.228, 3.169),
        (100, 1.984, 2.626),
    ],
)
def test_student_s_quantiles_are_those_of_the_tables(freedom: int, upper: float, far: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(upper, rel=2e-3)
    assert student_quantile(0.995, freedom) == pytest.approx(far, rel=1e-2)


def covered(
    clusters: int, answers: int, rate: float, correlation: float, trials: int, resamples: int = 500
) -> tuple[float, float]:
    """Shares of trials whose interval holds the true rate: by clusters, and as if answers were independent.

    Clusters' rates are beta distributed with the given correlation of two answers to one template.
    """
    generator = np.random.default_rng([clusters, answers, round(100 * rate)])
    concentration = (1 - correlation) / correlation
    inside = plain = 0
    for trial in range(trials):
        rates = generator.beta(rate * concentration, (1 - rate) * concentration, clusters)
        hits = generator.binomial(answers, rates)
        [interval] = rate_intervals(hits, np.full(clusters, answers), resamples=resamples, seed=trial)
        assert interval is not None
        inside += interval[0] <= rate <= interval[1]
        share = hits.sum() / clusters / answers
        plain += abs(share - rate) <= 1.96 * math.sqrt(share * (1 - share) / clusters / answers)
    return inside / trials, plain / trials


def test_coverage_is_about_95_percent() -> None:
    """The small version: 300 trials, so +- 4 points; the interval that takes answers for independent fails."""
    inside, plain = covered(40, 5, 0.3, 0.4, 300)
    assert 0.91 <= inside <= 0.99
    assert plain < 0.85


@pytest.mark.soak
@pytest.mark.parametrize("correlation", [0.15, 0.4])
@pytest.mark.parametrize(("clusters", "rate"), [(20, 0.3), (40, 0.1), (40, 0.3), (40, 0.6), (100, 0.05), (100, 0.3)])
def test_coverage_is_95_percent_within_2(clusters: int, rate: float, correlation: float) -> None:
    inside, plain = covered(clusters, 5, rate, correlation, 4000, 400)
    assert 0.93 <= inside <= 0.97
    assert plain < inside


def test_answers_of_one_template_count_as_alike() -> None:
    """Ten equal answers to each template are worth one: the interval does not shrink with them."""
    hits = np.array([0, 1] * 15)
    [one] = rate_intervals(hits, np.ones(30))
    [ten] = rate_intervals(hits * 10, np.full(30, 10))
    assert one == pytest.approx(ten)


def test_shares_without_spread_have_wilson_s_interval_of_as_many_observations_as_clusters() -> None:
    zero, one, half, full = rate_intervals(np.array([[0, 1, 2, 4]] * 10), np.full(10, 4))
    assert zero == pytest.approx((0.0, 0.2775), abs=1e-4)  # the tables' for 0, 5 and 10 of 10
    assert half == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert full == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert one is not None
    assert one[0] < 0.25 < one[1]


def test_edges() -> None:
    assert rate_intervals(np.array([3]), np.array([5])) == [None]
    assert rate_intervals(np.array([3, 0]), np.array([5, 0])) == [None]  # a template without verdicts is none


def test_order_of_clusters_changes_nothing_and_seeds_do() -> None:
    generator = np.random.default_rng(0)
    hits, counts = generator.integers(0, 5, (30, 3)), np.full(30, 5)
    order = generator.permutation(30)
    assert rate_intervals(hits, counts) == rate_intervals(hits[order], counts[order])
    assert rate_intervals(hits, counts) != rate_intervals(hits, counts, seed=1)


def test_large_tables_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdkernels.evaluation.intervals._CHUNK", 5000)
    table = resampled_sums(np.arange(1e3)[:, None] / 1e3, resamples=502, seed=[0])
    assert table.shape == (502, 1)
    assert len(np.unique(table)) > 495
    assert table.std() == pytest.approx(1e3 / math.sqrt(12) / math.sqrt(1e3), rel=0.1)


def test_means_of_groups_and_of_their_mean() -> None:
    generator = np.random.default_rng(3)
    groups = {"a": generator.normal(3, 0.5, (60, 1)), "b": generator.normal(4, 0.2, (30, 1))}
    by_group, joint = mean_intervals(groups, level=0.95, resamples=4000, seed=0, bounds=[(1, 5)])
    errors = {name: values.std(ddof=1) / math.sqrt(len(values)) for name, values in groups.items()}
    for name, values in groups.items():
        [interval] = by_group[name]
        quantile = student_quantile(0.975, len(values) - 1)
        assert interval == pytest.approx(tuple(values.mean() + s * quantile * errors[name] for s in (-1, 1)), abs=0.02)
    centre = (groups["a"].mean() + groups["b"].mean()) / 2
    width = 1.987 * math.hypot(*errors.values()) / 2
    assert joint[0] == pytest.approx((centre - width, centre + width), abs=0.02)
