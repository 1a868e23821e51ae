"""Peak memory beyond the inputs, in fresh processes: scratch in place, one gradient otherwise, linear flat in N.

The figures are of live memory: large blocks are mapped one by one (see peak.py), which leaves out what malloc keeps.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels import native

pytestmark = pytest.mark.slow

GRADIENT = {"": 256 * 40000 * 4 / 2**20, "-bf16": 256 * 40000 * 2 / 2**20}
QUICK = "inplace-scaled", "inplace-bf16", "leaf", "leaf-bf16"
DENSE = "inplace", "inplace-stats", "no-grad", "leaf-scaled", "leaf-none", "leaf-none-bf16", "leaf-shift"
CHUNK = 16.0
HEAD = 16000 * 128 * 4 / 2**20  # float32 gradient or accumulator
MOST_SCRATCH = 6.0


def peaks(backend: str, *cases: str) -> dict[str, float]:
    """MiB beyond the inputs of each case, measured in one fresh process."""
    program = Path(__file__).with_name("peak.py")
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(
        [sys.executable, str(program), backend, *cases], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return {name: float(value) for name, value in (line.split() for line in ran.stdout.splitlines())}


def outputs(rows: int, dtype: str = "") -> float:
    """MiB of the gradients of hidden states and head, and of the head's float32 accumulator beside a bf16 one, which
    more than two chunks need."""
    half = dtype == "-bf16"
    chunks = 2 * rows * 16000 * 2 / 2**20 / CHUNK
    return (rows * 128 * 4 / 2**20 + HEAD) / (2 if half else 1) + (HEAD if half and chunks > 2 else 0)


def dense_allocates_one_gradient_or_none(backend: str, cases: tuple[str, ...]) -> None:
    found = peaks(backend, *cases)
    for name in cases:
        gradient = GRADIENT["-bf16" if name.endswith("bf16") else ""] if name.startswith("leaf") else 0.0
        assert gradient - 1 < found[name] < gradient + MOST_SCRATCH, (name, found)


@pytest.mark.parametrize("cases", [QUICK, pytest.param(DENSE, marks=pytest.mark.slow)], ids=["some", "all"])
def test_dense_allocates_one_gradient_or_none(cases: tuple[str, ...]) -> None:
    """Through backward, for a leaf of three dimensions and for a loss that is scaled."""
    assert native.available(), native.reason()
    dense_allocates_one_gradient_or_none("cpp", cases)


@pytest.mark.slow
def test_eager_makes_a_handful_of_temporaries() -> None:
    assert peaks("eager", "leaf")["leaf"] < 20 * GRADIENT[""]


@pytest.mark.slow
def test_linear_is_flat_in_the_number_of_tokens(backend: str) -> None:
    """A chunk, the outputs and 16 MiB, however many rows; also where backward computes the logits again."""
    forms = ("linear",) if backend == "eager" else ("linear", "linear-bf16", "linear-none")
    found = peaks(backend, *(f"{form}-{rows}" for form in forms for rows in (512, 1536)))
    for form in forms:
        dtype = "-bf16" if form.endswith("bf16") else ""
        beyond = {rows: found[f"{form}-{rows}"] - outputs(rows, dtype) for rows in (512, 1536)}
        assert beyond[1536] < beyond[512] + 4, (form, beyond)
        if backend != "eager":
            assert max(beyond.values()) < CHUNK + 16, (form, beyond)


@pytest.mark.parametrize("backend", ["eager", "cpp"], indirect=True)
def test_draws_and_selection_take_a_chunk(backend: str) -> None:
    """However many rows there are: 128 of 40000 at once would be 120 MiB of draws, 300 of selection."""
    found = peaks(backend, "draws", "draws-bf16", "draws-small", "topk")
    if backend == "eager":
        assert 1 < found["draws-small"] < 8
        assert found["draws-small"] < found["draws-bf16"] < CHUNK
        assert 1 < found["draws"] < CHUNK
        assert 1 < found["topk"] < CHUNK
    else:
        assert max(found.values()) < 1
