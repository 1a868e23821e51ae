"""The approximate functions stay within the ISA's bounds, use them, and are functions of their argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx import Settings
from ptx.snippet import binary, unary

F32, U32 = np.float32, np.uint32
Array = np.ndarray[Any, Any]
ULP = 2.0**-23


def ulp(values: Array) -> Array:
    """Spacing of float32 at exact values."""
    return np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(values), 2.0**-126))), 2.0**-126) * ULP


def arguments(low: float, high: float, count: int = 4000) -> Array:
    return np.random.default_rng(0).uniform(low, high, count).astype(F32)


def lg2_size(exact: Array, x: Array) -> Array:
    return np.where((x > 0.5) & (x < 2), 1.0, np.abs(exact)) * 2.0**-22


CASES = {
    "ex2.approx": (np.exp2, arguments(-30, 30), lambda exact, x: 2.5 * ulp(exact)),
    "lg2.approx": (np.log2, np.exp2(arguments(-20, 20)).astype(F32), lg2_size),
    "rcp.approx": (np.reciprocal, arguments(1e-3, 1e3), lambda exact, x: ulp(exact)),
    "sqrt.approx": (np.sqrt, arguments(0, 1e6), lambda exact, x: exact * 2.0**-23),
    "rsqrt.approx": (lambda x: 1 / np.sqrt(x), arguments(1e-6, 1e6), lambda exact, x: exact * 2.0**-22.9),
    "sin.approx": (np.sin, arguments(-6.28, 6.28), lambda exact, x: np.full(exact.shape, 2.0**-20.5)),
    "cos.approx": (np.cos, arguments(-6.28, 6.28), lambda exact, x: np.full(exact.shape, 2.0**-20.5)),
    "tanh.approx": (np.tanh, arguments(-5, 5), lambda exact, x: np.abs(exact) * 2.0**-11),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_fill_the_permitted_interval_and_stay_inside(name: str) -> None:
    function, x, permitted = CASES[name]
    exact = function(x.astype(np.float64))
    bound = permitted(exact, x)
    share = (unary(f"{name}.f32", x, F32) - exact) / bound
    assert np.abs(share).max() <= 1.0
    assert share.max() > 0.7
    assert share.min() < -0.7
    assert abs(share.mean()) < 0.1
    rounded = unary(f"{name}.f32", x, F32, settings=Settings(noise=0.0))
    assert (rounded == exact.astype(F32)).all()


@pytest.mark.parametrize("form", ["full", "approx"])
def test_division_stays_within_two_units(form: str) -> None:
    a, b = arguments(-1e6, 1e6), arguments(1e-3, 1e3)[::-1].copy()
    exact = a.astype(np.float64) / b
    share = (binary(f"div.{form}.f32", a, b, F32) - exact) / (2 * ulp(exact))
    assert 0.7 < np.abs(share).max() <= 1.0


def test_one_argument_one_result_and_another_seed_another() -> None:
    x = np.repeat(arguments(-5, 5, 500), 3)
    first = unary("ex2.approx.f32", x, F32).reshape(-1, 3)
    assert (first == first[:, :1]).all()
    other = unary("ex2.approx.f32", x, F32, settings=Settings(seed=1)).reshape(-1, 3)
    assert (first != other).mean() > 0.3


def test_special_values() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([0.0, -0.0, inf, -inf, nan, 1e-40, -1e-40, 200, -200], F32)

    def bits(name: str) -> list[int]:
        return list(unary(name, x, U32))

    one, plus, minus, bad, zero, negative = 0x3F800000, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0, 0x80000000
    assert bits("ex2.approx.f32") == [one, one, plus, zero, bad, one, one, plus, zero]
    assert bits("ex2.approx.ftz.f32") == [one, one, plus, zero, bad, one, one, plus, zero]
    assert bits("lg2.approx.ftz.f32")[:7] == [minus, minus, plus, bad, bad, minus, minus]
    assert np.isfinite(unary("lg2.approx.f32", x, F32)[5])
    assert bits("rcp.approx.ftz.f32")[:7] == [plus, minus, zero, negative, bad, plus, minus]
    assert bits("sqrt.approx.ftz.f32")[:7] == [zero, negative, plus, bad, bad, zero, negative]
    assert bits("rsqrt.approx.ftz.f32")[:7] == [plus, minus, zero, bad, bad, plus, minus]


def test_results_that_would_be_subnormal_flush_with_ftz_only() -> None:
    x = np.array([-130.0], F32)
    assert unary("ex2.approx.ftz.f32", x, F32)[0] == 0
    assert unary("ex2.approx.f32", x, F32)[0] == pytest.approx(2.0**-130, rel=1e-5)


def test_approximate_division_by_huge_numbers_gives_zero() -> None:
    a, b = np.array([1.0, -1.0, 2.0**100, np.inf], F32), np.full(4, 2.0**127, F32)
    assert list(binary("div.approx.f32", a, b, F32)[:3]) == [0, 0, 0]
    assert np.isnan(binary("div.approx.f32", a, b, F32)[3])
    assert binary("div.full.f32", a, b, F32)[2] == pytest.approx(2.0**-27, rel=1e-6)
