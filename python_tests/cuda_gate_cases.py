"""What the tests of the gate's CUDA kernels share: places, rows, calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_gate import Machine, gate
from gate_oracle import Call, Decision, assert_right
from ptx.harness import places
from torch import Tensor

from kdkernels.ops.rows import Side

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_BLOCKS = Machine(1, 50 * 2**20)
INF, NAN = float("inf"), float("nan")
LAST = 1 - 2.0**-53
SAMPLING = {
    "plain": {},
    "greedy": {"uniforms": None},
    "cold": {"temperature": 0.05},
    "hot": {"temperature": 8.0},
    "k": {"top_k": 3},
    "large k": {"top_k": 2500, "temperature": 0.7},
    "p": {"top_p": 0.9},
    "least p": {"top_p": 1e-9},
    "most p": {"top_p": 1 - 1e-7, "temperature": 3.0},
    "both": {"top_k": 700, "top_p": 0.5, "temperature": 2.0},
}


@pytest.fixture(params=places(80, 90))
def place(request: pytest.FixtureRequest) -> int | str:
    return request.param  # type: ignore[no-any-return]


def normal(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def pair(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A student and a teacher that resemble each other."""
    student = normal(rows, width, dtype, seed)
    return student, (0.8 * student.float() + 0.5 * normal(rows, width, seed=seed + 1)).to(dtype)


def draws(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call(student: Tensor | Side, teacher: Tensor | Side, threshold: float | Tensor = 0.2, **options: Any) -> Call:
    """Uniform numbers are drawn unless given; None is greedy."""
    sides = [Side(x) if isinstance(x, Tensor) else x for x in (student, teacher)]
    rows = len(sides[0].x)
    bits = threshold if isinstance(threshold, Tensor) else torch.full((rows,), threshold, dtype=torch.float64)
    return Call(*sides, bits, **{"uniforms": draws(rows), **options})


def check(place: int | str, given_: Call, machine: Machine = FEW_BLOCKS) -> Decision:
    found = gate(place, given_, machine)
    assert_right(found, given_)
    return found


def hard_rows(width: int) -> tuple[Tensor, Tensor]:
    """Masks, ties, one-hots, and no two sides alike."""
    index = torch.arange(width)
    least = torch.finfo(torch.float32).min
    one_hot = torch.where(index == width // 3, 0.0, -INF)
    rows = [
        (one_hot, torch.where(index == width // 2, 5.0, -INF)),
        (one_hot, one_hot + 3),
        (one_hot, torch.zeros(width)),
        (torch.full((width,), 1.5), torch.full((width,), -7.0)),
        (torch.full((width,), least), torch.zeros(width)),
        (torch.where(index < 5, 0.0, least), torch.where(index < 5, -INF, 0.0)),
        (torch.where(index % 7 < 3, -INF, index / width), torch.where(index % 5 < 3, -INF, 3 - index / width)),
        ((index % 97).float(), (index % 89).float()),
        (torch.where(index == width - 1, 40.0, -40.0), torch.where(index == 0, 40.0, -40.0)),
        (normal(1, width)[0] * 1e37, normal(1, width, seed=3)[0] * 1e37),
        (torch.where(index < 3, index * 1.0, -1e5), torch.where(index < 3, 2.0 - index, -1e30)),
    ]
    return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])
