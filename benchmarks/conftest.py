"""Options of the timings, and the case that each test gets."""

from __future__ import annotations

import pytest

from benchmarks import shapes

CASES = {case.id: case for case in (*shapes.FULL, *shapes.QUICK)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `benchmarks.run` passes to the process of a group of cases."""
    group = parser.getgroup("kdkernels")
    group.addoption("--case", action="append", default=[], help="id of a case; repeatable; default: the quick ones")
    group.addoption("--rounds", type=int, default=7, help="rounds of alternating runs")
    group.addoption("--budget", type=float, default=2.0, help="seconds for one contestant in one case")
    group.addoption("--patience", type=float, default=60.0, help="seconds of a first run that is not repeated")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per chosen case."""
    if "case" in metafunc.fixturenames:
        names = metafunc.config.getoption("--case") or [case.id for case in shapes.QUICK]
        metafunc.parametrize("case", [CASES[name] for name in names], ids=names)
