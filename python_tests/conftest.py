"""What every test file shares: the backends under test, threads, hypothesis profiles.

Tests that take ``backend`` run once for every backend that was built for this CPU. A native library that was built and
cannot serve is a failure of each of those tests, never a skip.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

import kdkernels
import kdkernels.compression.select  # names resolve on first use: with these two every operator is there
import kdkernels.losses
from kdkernels import divergences, native

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "soak", parent=hypothesis.settings.get_profile("default"), derandomize=False, max_examples=500
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", default="", help="comma-separated; default: every backend that was built")
    parser.addoption(
        "--quick", action="store_true", help="only every second case of a test, every k-th of one marked thin(k)"
    )
    parser.addoption("--all", action="store_true", help="all cases of tests marked sample(k), not one in k")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = items if config.getoption("--all") else _sampled(items)
    if config.getoption("--quick"):
        chosen = _thinned(chosen)
    left = set(items) - set(chosen)
    items[:] = chosen
    config.hook.pytest_deselected(items=[*left])


def _sampled(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of a test marked sample(k), one case in k by a hash of its name, so that no parameter is in step with the choice;
    its first case always."""
    seen: set[str] = set()
    kept = []
    for item in items:
        mark, test = item.get_closest_marker("sample"), item.nodeid.split("[")[0]
        number = int.from_bytes(hashlib.sha256(item.nodeid.rpartition("/")[2].encode()).digest()[:4], "little")
        if mark is None or test not in seen or number % mark.args[0] == 0:
            kept.append(item)
        seen.add(test)
    return kept


def _thinned(items: list[pytest.Item]) -> list[pytest.Item]:
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        thin = item.get_closest_marker("thin")
        every = 2 if thin is None else thin.args[0]
        test = item.nodeid.split("[")[0]
        if seen[test] % every == 0:
            kept.append(item)
        seen[test] += 1
    return kept


def _built() -> list[str]:
    return ["eager", "cpp"] if native.LIBRARY.is_file() else ["eager"]


def _tested(config: pytest.Config) -> list[str]:
    chosen = config.getoption("--backends") or os.environ.get("KDKERNELS_TEST_BACKENDS", "")
    return chosen.split(",") if chosen else _built()


def pytest_report_header(config: pytest.Config) -> str:
    left_out = "" if "cpp" in _built() else f" (cpp: {native.reason()})"
    return f"kdkernels: {Path(kdkernels.__file__).parent}, backends {', '.join(_tested(config))}{left_out}"


def pytest_sessionstart(session: pytest.Session) -> None:
    # A run against a patched copy (mutants.py) must not test the installed package instead.
    root = os.environ.get("KDKERNELS_TEST_ROOT")
    if root and not Path(kdkernels.__file__).is_relative_to(root):
        pytest.exit(f"kdkernels comes from {kdkernels.__file__}, not from {root}", returncode=77)
    torch.set_num_threads(1)  # rows here are short; the tests of several threads ask for them (`threads`)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    by_hand = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not by_hand:
        metafunc.parametrize("backend", _tested(metafunc.config), indirect=True)


def _why_not_cpp() -> str:
    kernels = {divergences.get(name).kernel().name for name in divergences.names() if _is_ours(name)}
    return native.reason() or "; ".join(filter(None, (native.why_not(kernel) for kernel in sorted(kernels))))


def _is_ours(name: str) -> bool:
    """Not a divergence that some test has registered."""
    return divergences.DIVERGENCES[name].__module__.startswith("kdkernels.")


@pytest.fixture(scope="session")
def _cpp_serves() -> str:
    return _why_not_cpp()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend under test."""
    name = str(request.param)
    if name == "cpp":
        why = request.getfixturevalue("_cpp_serves")
        if why:
            pytest.fail(f"the native library was built and does not serve: {why}")
    return name


@pytest.fixture
def threads() -> object:
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
