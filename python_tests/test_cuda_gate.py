"""The gate in CUDA C++: the launches of the native launcher, executed as PTX or on a GPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_gate import H100, Machine, obstacle
from cuda_gate_cases import DTYPES, FEW_BLOCKS, INF, NAN, SAMPLING, call, check, normal, pair, place
from ptx import Report
from torch import Tensor

from kdkernels.ops.rows import Side

__all__ = ["place"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.sample(16),
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "can be had"),
]

LENGTHS = (1, 2, 7, 127, 129, 301, 2049, 5003)
"""It would take minutes in an emulator."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", LENGTHS)
def test_rows_of_any_length(place: int | str, width: int, dtype: torch.dtype) -> None:
    student, teacher = pair(4, width, dtype, width)
    for machine in (FEW_BLOCKS, H100):
        found = check(place, call(student, teacher, torch.tensor([-1.0, 2.0, 0.05, 0.4], dtype=torch.float64)), machine)
        assert found.from_teacher[:2].tolist() == [True, False]
    check(place, call(student, teacher, uniforms=None))


@pytest.mark.parametrize("shift", range(1, 9))
def test_rows_that_begin_anywhere(shift: int) -> None:
    """What lies between two rows is a fault to read. Vectors where both sides' lie side by side."""
    for dtype, other in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        a, b = normal(3, 1100 + shift, dtype, shift), normal(3, 1100 + shift, other, shift + 50)
        student = a[:, shift : 1000 + 2 * shift]
        for teacher in (b[:, shift : 1000 + 2 * shift], b[:, 1 : 1001 + shift]):
            check(90, call(student, teacher))
            check(90, call(student, teacher, top_k=40, top_p=0.9))
            check(90, call(student, teacher, uniforms=None))


def widths(reports: list[Report]) -> set[int]:
    return set().union(*(report.widths()["load"] for report in reports))


def test_whole_vectors_are_loaded_where_both_sides_have_them() -> None:
    for dtype in DTYPES:
        for width in (8192, 8192 + 3):
            found = check(90, call(*pair(2, width, dtype)))
            main = found.reports[0]
            assert max(main.widths()["load"]) == 16
            assert main.load_sectors * 32 <= 1.02 * call(*pair(2, width, dtype)).least_bytes
            assert main.thread_instructions < 40 * 2 * width


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_may_differ(place: int | str, dtype: torch.dtype, other: torch.dtype) -> None:
    student, teacher = pair(3, 2053)
    check(place, call(student.to(dtype), teacher.to(other), temperature=0.7))
    check(place, call(student.to(dtype), teacher.to(other), top_p=0.8))


def test_padding_columns_count_for_nothing(place: int | str) -> None:
    student, teacher = pair(3, 1024, torch.bfloat16)
    student[:, 1001:], teacher[:, 1001:] = 100, NAN
    for options in ({}, {"top_k": 5}, {"top_p": 0.99}, {"uniforms": None}):
        check(place, call(student, teacher, vocab=1001, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 3e-5, 1e-3, 0.03, 0.3, 1.0, 3.0, 30.0])
def test_divergences_of_every_size(size: float, dtype: torch.dtype) -> None:
    """From 0 to 1 bit; equal rows are 0 to the last digit, whatever the exponential's errors."""
    student = normal(3, 4099).to(dtype).float()
    teacher = student + size * normal(3, 4099, seed=5)
    found = check(90, call(student, teacher))
    for row, expected in enumerate(found.jsd.tolist()):
        assert (expected == 0) == (size == 0), row
    check(90, call(student.to(dtype), teacher.to(dtype)))


def test_offsets_of_logits_cost_no_digits(place: int | str) -> None:
    student, teacher = (x.bfloat16().float() for x in pair(3, 3001))
    one = check(place, call(student, teacher))
    far = check(place, call(student + 8192, teacher - 4096))
    assert (one.jsd - far.jsd).abs().max() < 1e-3  # the sums themselves are rounded
    assert (check(place, call(student, teacher + 64)).jsd - one.jsd).abs().max() < 2e-5


def test_the_threshold_is_exceeded_strictly(place: int | str) -> None:
    """At the divergence itself, as float32 gives it, the student speaks; one unit in float64 below, the teacher."""
    student, teacher = pair(4, 1500)
    student[3], teacher[3] = normal(1, 1500), -INF
    teacher[3, 9], student[3, 9] = 0, -INF
    exact = check(place, call(student, teacher)).jsd.double()
    below = torch.nextafter(exact, torch.tensor(-1.0, dtype=torch.float64))
    assert not check(place, call(student, teacher, exact)).from_teacher.any()
    assert check(place, call(student, teacher, below)).from_teacher.all()
    assert not check(place, call(student, teacher, 1.0)).from_teacher.any()


@pytest.mark.parametrize("machine", [FEW_BLOCKS, H100], ids=["few", "many"])
@pytest.mark.parametrize("name", ["plain", "greedy", "both"])
def test_rows_without_a_distribution_are_nan_and_leave_others_alone(
    place: int | str, name: str, machine: Machine
) -> None:
    student, teacher = pair(9, 4200)
    student[1, 7] = NAN
    teacher[2, 4199] = INF
    student[3] = -INF
    teacher[4] = -INF
    teacher[5, 5] = -NAN
    student[6] = NAN
    threshold = torch.full((9,), 0.1, dtype=torch.float64)
    threshold[7] = NAN
    found = check(place, call(student, teacher, threshold, **SAMPLING[name]), machine)
    assert found.jsd.isnan().tolist() == [False, *[True] * 7, False]


HEADS = {
    "bias": ({"bias": 1}, {}),
    "scale": ({"scale": -0.4}, {"scale": 2.0}),
    "cap": ({"softcap": 5.0}, {"softcap": 30.0}),
    "all": ({"bias": 1, "scale": 0.7, "softcap": 8.0}, {"bias": 2, "scale": 1.3}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_heads(place: int | str, name: str, dtype: torch.dtype) -> None:
    def side(x: Tensor, options: dict[str, Any]) -> Side:
        bias = normal(1, 2053, seed=options["bias"])[0] if "bias" in options else None
        return Side(x, bias, options.get("scale", 1.0), options.get("softcap", 0.0))

    student, teacher = pair(3, 2053, dtype)
    for options in ({}, {"uniforms": None}, {"top_k": 99, "top_p": 0.9}):
        given_ = call(*(side(x, o) for x, o in zip((student, teacher), HEADS[name], strict=True)), **options)
        check(place, given_)


def test_a_soft_cap_makes_finite_numbers_of_infinite_ones(place: int | str) -> None:
    student, teacher = pair(3, 777)
    student[:, 5::7] = -INF
    teacher[1, 700] = INF
    check(place, call(Side(student, softcap=5.0), Side(teacher, softcap=7.0)))
