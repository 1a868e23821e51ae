"""The gate in Triton, compiled and executed by the PTX emulator, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import TARGETS, serve
from gate_oracle import Call, Decision, assert_right
from ptx.triton_shim import Emulator
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.gate import Sampling, SwitchDecision, gate_rows_
from kdkernels.ops.rows import Side
from kdkernels.triton import launch

pytestmark = [pytest.mark.slow, pytest.mark.sample(16)]

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = 1 - 2.0**-53
Serve = Callable[..., Emulator]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return lambda target=90: serve(monkeypatch, target)


def normal(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def pair(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A student and a teacher that resemble each other."""
    student = normal(rows, width, dtype, seed)
    return student, (0.8 * student.float() + 0.5 * normal(rows, width, seed=seed + 1)).to(dtype)


def call(student: Tensor | Side, teacher: Tensor | Side, threshold: float | Tensor = 0.2, **options: Any) -> Call:
    """Uniform numbers are drawn unless given; None is greedy."""
    sides = [Side(x) if isinstance(x, Tensor) else x for x in (student, teacher)]
    rows = len(sides[0].x)
    bits = threshold if isinstance(threshold, Tensor) else torch.full((rows,), threshold, dtype=torch.float64)
    draws = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Call(*sides, bits, **{"uniforms": draws, **options})


def check(given: Call) -> Decision:
    """One call of the backend."""
    made = Decision.empty(given.rows)
    sampling = Sampling(given.uniforms, given.temperature, given.top_k, given.top_p)
    out = SwitchDecision(made.token, made.from_teacher, made.jsd)
    gate_rows_("triton", given.student, given.teacher, given.threshold, sampling, given.vocab, out)
    assert_right(made, given)
    return made


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 127, 129, 301, 2049, 5003])
def test_rows_of_any_length(width: int, dtype: torch.dtype, target: int, served: Serve) -> None:
    served(target)
    student, teacher = pair(4, width, dtype, width)
    found = check(call(student, teacher, torch.tensor([-1.0, 2.0, 0.05, 0.4], dtype=torch.float64)))
    assert found.from_teacher[:2].tolist() == [True, False]
    check(call(student, teacher, uniforms=None))


@pytest.mark.parametrize("shift", [0, 1, 3, 8])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_rows_that_begin_anywhere_of_dtypes_that_differ(other: torch.dtype, shift: int, served: Serve) -> None:
    """What lies between two rows is a fault to read."""
    served()
    student = normal(3, 1100 + shift, torch.bfloat16, shift)[:, shift : 1003 + shift]
    for begin in (shift, 2):
        teacher = normal(3, 1100 + shift, other, shift + 50)[:, begin : 1003 + begin]
        check(call(student, teacher, temperature=0.7))


def hard_rows(width: int) -> tuple[Tensor, Tensor]:
    """Masks, ties, one-hots, and no two sides alike."""
    index = torch.arange(width)
    least = torch.finfo(torch.float32).min
    one_hot = torch.where(index == width // 3, 0.0, -INF)
    rows = [
        (one_hot, torch.where(index == width // 2, 5.0, -INF)),
        (one_hot, torch.zeros(width)),
        (torch.full((width,), 1.5), torch.full((width,), -7.0)),
        (torch.full((width,), least), torch.zeros(width)),
        (torch.where(index % 7 < 3, -INF, index / width), torch.where(index % 5 < 3, -INF, 3 - index / width)),
        ((index % 97).float(), (index % 89).float()),
        (normal(1, width)[0] * 1e37, normal(1, width, seed=3)[0] * 1e37),
        (torch.where(index < 3, index * 1.0, -1e5), torch.where(index < 3, 2.0 - index, -1e30)),
    ]
    return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])


SAMPLING = {
    "plain": {},
    "greedy": {"uniforms": None},
    "cold": {"temperature": 0.05},
    "k": {"top_k": 3},
    "large k": {"top_k": 1500, "temperature": 0.7},
    "p": {"top_p": 0.9},
    "least p": {"top_p": 1e-9},
    "both": {"top_k": 700, "top_p": 0.5, "temperature": 2.0},
}


@pytest.mark.parametrize("bits", [-1.0, 2.0])
@pytest.mark.parametrize("name", SAMPLING)
def test_hard_rows(name: str, bits: float, served: Serve) -> None:
    served()
    student, teacher = hard_rows(1801)
    found = check(call(student, teacher, bits, **SAMPLING[name]))
    assert found.jsd[0] > 1 - 1e-6
    assert found.jsd[2] == 0


@pytest.mark.parametrize("size", [0.0, 3e-5, 1e-3, 0.03, 0.3, 3.0])
def test_divergences_of_every_size(size: float, served: Serve) -> None:
    served()
    student = normal(3, 2099)
    found = check(call(student, student + size * normal(3, 2099, seed=5)))
    assert ((found.jsd == 0) == (size == 0)).all()


@pytest.mark.parametrize("u", [0.0, 1e-300, LAST])
def test_uniform_numbers_at_the_ends(u: float, served: Serve) -> None:
    served()
    student, teacher = pair(2, 1301)
    for x in (student, teacher):
        x[:, :5] = x[:, -4:] = -INF
    for options in ({}, {"top_k": 9}, {"top_p": 0.7}):
        found = check(call(student, teacher, uniforms=torch.full((2,), u, dtype=torch.float64), **options))
        if u == 0 and not options:
            assert found.token.tolist() == [5, 5]


def test_the_threshold_is_exceeded_strictly(served: Serve) -> None:
    served()
    student, teacher = pair(3, 1500)
    exact = check(call(student, teacher)).jsd.double()
    below = torch.nextafter(exact, torch.tensor(-1.0, dtype=torch.float64))
    assert not check(call(student, teacher, exact)).from_teacher.any()
    assert check(call(student, teacher, below)).from_teacher.all()


@pytest.mark.parametrize("name", ["plain", "greedy", "both"])
def test_rows_without_a_distribution_or_a_number_leave_others_alone(name: str, served: Serve) -> None:
    served()
    student, teacher = pair(8, 1200)
    student[1, 7] = NAN
    teacher[2, 1199] = INF
    student[3] = -INF
    teacher[4] = -INF
    threshold = torch.full((8,), 0.1, dtype=torch.float64)
    threshold[5] = NAN
    given = call(student, teacher, threshold, **SAMPLING[name])
    if given.uniforms is not None:
        given.uniforms[6] = 1.0
    found = check(given)
    assert found.jsd.isnan().tolist() == [False, *[True] * 5, False, False]


def test_heads_and_padding(served: Serve) -> None:
    served()
    student, teacher = pair(3, 1053, torch.bfloat16)
    student[:, 1001:], teacher[:, 1001:] = 100, NAN
    bias = normal(1, 1053)[0]
    sides = Side(student, bias, 0.7, 8.0), Side(teacher, None, 1.3, 0.0)
    for options in ({}, {"uniforms": None}, {"top_k": 30, "top_p": 0.9}):
        check(call(*sides, vocab=1001, **options))


def test_offsets_beyond_2_to_the_31(served: Serve) -> None:
    served()
    sides = []
    for seed in (1, 2):
        memory = torch.empty(2**31 + 64 + 3000, dtype=torch.bfloat16)  # pages that no one touches cost nothing
        sides.append(memory.as_strided((2, 3000), (2**31 + 64, 1)).copy_(normal(2, 3000, torch.bfloat16, seed)))
    check(call(*sides))


def test_ties_stay_with_the_lower_ids(served: Serve) -> None:
    served()
    student = torch.zeros(2, 3001)
    student[1, 1500:] = 1.0
    uniforms = torch.full((2,), LAST, dtype=torch.float64)
    for k in (7, 1200):
        found = check(call(student, student + 0.5, uniforms=uniforms, top_k=k))
        assert found.token.tolist() == [k - 1, 1500 + k - 1]
    assert check(call(student, student + 0.5, uniforms=None)).token.tolist() == [0, 1500]


def test_few_rows_use_every_multiprocessor_and_parts_stay_short() -> None:
    for rows, vocab, vector in ((1, 151936, 8), (8, 151936, 4), (64, 151936, 8), (500, 32000, 8), (1, 2**22, 4)):
        share, parts = launch.gate_parts(rows, vocab, vector)
        assert share % (128 * vector) == 0
        assert (parts - 1) * share < vocab + vector <= parts * share
        assert rows * parts >= 132
        assert share <= 4 * 128 * vector or parts > 512


def test_the_public_function_takes_it_and_nothing_unwritten_is_read(served: Serve) -> None:
    emulator = served()
    student, teacher = pair(3, 4099, torch.bfloat16)
    given = call(student, teacher, 0.1, top_p=0.95)
    with emulator.poison():
        found = kd.switch_gate(student, teacher, 0.1, uniforms=given.uniforms, top_p=0.95, backend="triton")
    assert_right(Decision(found.token, found.from_teacher, found.jsd), given)
    assert len(emulator.reports) == 3
    for sides in ((student.double(), teacher), (student, teacher.double())):
        with pytest.raises(ValueError, match="serves float32, bfloat16 and float16"):
            kd.switch_gate(*sides, 0.1, backend="triton")
