"""The gate's CUDA kernels: which token is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_gate import H100, Machine, obstacle
from cuda_gate_cases import (
    DTYPES,
    FEW_BLOCKS,
    INF,
    LAST,
    NAN,
    SAMPLING,
    call,
    check,
    draws,
    hard_rows,
    normal,
    pair,
    place,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kdkernels.ops.rows import Side

__all__ = ["place"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.sample(16),
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "can be had"),
]
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


@pytest.mark.parametrize("machine", [FEW_BLOCKS, H100], ids=["few", "many"])
@pytest.mark.parametrize("name", SAMPLING)
def test_hard_rows(place: int | str, name: str, machine: Machine) -> None:
    student, teacher = hard_rows(2309)
    threshold = torch.tensor([-1.0, 2.0], dtype=torch.float64).repeat(6)[: len(student)]
    for bits in (threshold, 1 - threshold):
        found = check(place, call(student, teacher, bits, **SAMPLING[name]), machine)
        assert found.jsd[0] > 1 - 1e-6
        assert found.jsd[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, 1 - 1e-9, LAST])
def test_uniform_numbers_at_the_ends(place: int | str, u: float) -> None:
    """0 takes the first entry that has any mass, the largest number below 1 the last one."""
    student, teacher = pair(2, 3001)
    for x in (student, teacher):
        x[:, :5] = x[:, -4:] = -INF
    for options in ({}, {"top_k": 9}, {"top_p": 0.7}, {"temperature": 0.3}):
        made = call(student, teacher, uniforms=torch.full((2,), u, dtype=torch.float64), **options)
        found = check(place, made)
        assert u != 0 or not options or (found.token >= 5).all()
        if u == 0 and not options:
            assert found.token.tolist() == [5, 5]


def test_entries_that_have_mass_together_only(place: int | str) -> None:
    """Each of the others rounds to none of 2^-40 of the largest, not so their sum."""
    faint = torch.full((2, 3000), -42 * math.log(2))
    faint[:, 0] = 0
    found = check(place, call(faint, faint + 1, uniforms=torch.tensor([0.5, LAST], dtype=torch.float64)))
    assert found.token[0] == 0
    assert found.token[1] > 0


def test_uniform_numbers_that_are_none_have_no_token(place: int | str) -> None:
    student, teacher = pair(5, 300)
    uniforms = torch.tensor([1.0, -1e-9, NAN, INF, 0.5], dtype=torch.float64)
    for options in ({}, {"top_k": 3}):
        found = check(place, call(student, teacher, uniforms=uniforms, **options))
        assert found.token[:4].tolist() == [-1] * 4
        assert found.token[4] >= 0
        assert not found.jsd.isnan().any()


def test_ties_stay_with_the_lower_ids(place: int | str) -> None:
    """More equal entries than a block can sort: they are told apart by their ids."""
    student = torch.zeros(2, 6001)
    student[1, 3000:] = 1.0
    teacher = student + 0.5
    for k in (7, 2500):
        uniforms = torch.tensor([LAST, LAST], dtype=torch.float64)
        found = check(place, call(student, teacher, uniforms=uniforms, top_k=k))
        assert found.token.tolist() == [k - 1, 3000 + k - 1]
    found = check(place, call(student, teacher, uniforms=torch.full((2,), LAST, dtype=torch.float64), top_p=0.5))
    assert abs(found.token[0] - 3000) <= 1
    assert check(place, call(student, teacher, uniforms=None)).token.tolist() == [0, 3000]


@pytest.mark.parametrize("seed", range(4))
def test_top_k_and_top_p_of_long_rows(seed: int) -> None:
    """Narrow and wide logits, many and few entries in doubt; a histogram or two at most on such rows."""
    scale = (0.01, 1.0, 4.0, 30.0)[seed]
    student, teacher = normal(1, 50257, seed=seed) * scale, normal(1, 50257, seed=9) * scale
    for options in ({"top_k": 50}, {"top_k": 20000}, {"top_p": 0.95}, {"top_k": 3000, "top_p": 0.3}):
        given_ = call(student, teacher, **options)
        found = check(90, given_, H100)
        stages = len(options)
        assert found.reports[-1].load_sectors * 32 <= (1.1 + 3 * stages) * student.nbytes


def draw_case(data: st.DataObject) -> None:
    width, rows = data.draw(st.integers(1, 6000)), data.draw(st.integers(1, 4))
    seed, sides = data.draw(st.integers(0, 999)), []
    for offset in range(2):
        dtype = data.draw(st.sampled_from(DTYPES))
        start, gap = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
        x = normal(rows, start + width + gap, dtype, seed + offset)[:, start : start + width]
        levels = data.draw(st.sampled_from([0, 1, 3, 50]))  # of rounded logits: ties
        if levels:
            x.copy_((x * levels / 10).round())
        masked = data.draw(st.sampled_from([0.0, 0.1, 0.999]))
        x.masked_fill_(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < masked, -INF)
        bias = normal(1, width, seed=seed + 7)[0] if data.draw(st.booleans()) else None
        head = (bias, data.draw(st.sampled_from([1.0, 0.3])), data.draw(st.sampled_from([0.0, 50.0])))
        sides.append(Side(x, *head))
    given_ = call(
        *sides,
        data.draw(st.sampled_from([-1.0, 0.01, 0.2, 0.6, 2.0])),
        uniforms=data.draw(st.sampled_from([None, draws(rows, seed)])),
        temperature=data.draw(st.sampled_from([0.05, 1.0, 1.0, 8.0])),
        top_k=data.draw(st.sampled_from([0, 1, 50, 3000])),
        top_p=data.draw(st.sampled_from([1.0, 0.95, 0.1])),
    )
    cache = data.draw(st.sampled_from([50 * 2**20, given_.least_bytes]))
    check(data.draw(st.sampled_from([80, 90])), given_, Machine(data.draw(st.sampled_from([1, 9, 132])), cache))


@settings(max_examples=3, phases=NO_SHRINKING)
@given(st.data())
def test_random_calls(data: st.DataObject) -> None:
    draw_case(data)


@pytest.mark.soak
@settings(max_examples=200, phases=NO_SHRINKING)
@given(st.data())
def test_many_random_calls(data: st.DataObject) -> None:
    draw_case(data)


@pytest.mark.parametrize("target", [90, 100])
def test_the_vectors_of_the_paper(target: int) -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.3, 0.5]])
    found = check(target, call(q.log(), p.log()))
    assert math.isclose(found.jsd.item(), 0.218364, abs_tol=2e-6)
