"""`kdkernels.switch_gate`: divergence, decision and token, against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import golden_gate as golden
import pytest
import torch
from gate_cases import DTYPES, check_jsd, check_tokens, pair, uniforms

import kdkernels as kd

pytestmark = pytest.mark.sample(3)
MIXED = ((torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.float64))
VOCABULARIES = (1, 2, 127, 129, 301, 4096, 8193, 50257, 151936)


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + list(MIXED), ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_values(backend: str, vocab: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rows = 3
    zs, zt = pair(rows, vocab, dtypes)
    threshold, u = torch.tensor([-1.0, 2.0, float(golden.jsd_bits(zs, zt)[2]) - 1e-3]), uniforms(rows)
    found = kd.switch_gate(zs, zt, threshold, uniforms=u, backend=backend)
    check_jsd(found.jsd, zs, zt)
    check_tokens(found, zs, zt, u)
    assert found.from_teacher.tolist() == [True, False, True]
    assert found.jsd.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert (found.token.dtype, found.from_teacher.dtype) == (torch.int64, torch.bool)


def test_the_paper_s_example(backend: str) -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    found = kd.switch_gate(q, p, 0.2, uniforms=torch.tensor([0.75]), backend=backend)
    assert abs(float(found.jsd) - 0.218364) < 1e-6
    assert (found.from_teacher.item(), found.token.item()) == (True, 1)  # .7 <= .75 < .9
    found = kd.switch_gate(q, p, 0.22, uniforms=torch.tensor([0.75]), backend=backend)
    assert (found.from_teacher.item(), found.token.item()) == (False, 2)  # .5 <= .75


@pytest.mark.parametrize("size", [1e-4, 3e-3, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_divergences(backend: str, dtype: torch.dtype, size: float) -> None:
    zs, noise = pair(2, 5003, (dtype, dtype))
    zt = zs + size * noise
    expected = golden.jsd_bits(zs, zt)
    found = kd.switch_gate(zs, zt, 0.5, do_sample=False, backend=backend).jsd.double()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    if backend == "eager":
        assert ((found - expected).abs() <= 1e-14 + 1e-6 * expected).all()
    else:
        assert ((found / expected - 1).abs() < tolerance).all(), found / expected - 1
    assert 1e-12 < expected.max() < 1


def test_threshold_is_strict_and_divergence_clamped(backend: str) -> None:
    zs, zt = pair(4, 301, (torch.float32, torch.float32))
    jsd = kd.switch_gate(zs, zt, 0.0, do_sample=False, backend=backend).jsd
    at = kd.switch_gate(zs, zt, jsd, do_sample=False, backend=backend)
    below = kd.switch_gate(zs, zt, jsd.double() - 1e-9, do_sample=False, backend=backend)
    assert not at.from_teacher.any()
    assert below.from_teacher.all()
    same = kd.switch_gate(zs, zs, 0.0, do_sample=False, backend=backend)
    assert (same.jsd.double() < 1e-15).all()
    assert (same.jsd >= 0).all()
    assert not kd.switch_gate(zs, zs, 1e-12, do_sample=False, backend=backend).from_teacher.any()
    one_hot = torch.full((2, 5000), -torch.inf).scatter_(1, torch.tensor([[1], [4999]]), 3.0)
    apart = kd.switch_gate(one_hot, one_hot.flip(0), 1.0, uniforms=uniforms(2), backend=backend)
    assert ((apart.jsd - 1).abs() < 1e-6).all()
    assert (apart.jsd <= 1).all()
    assert not apart.from_teacher.any()
    assert apart.token.tolist() == [1, 4999]
    always = kd.switch_gate(one_hot, one_hot.flip(0), -math.inf, uniforms=uniforms(2), backend=backend)
    assert always.token.tolist() == [4999, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_entries(backend: str, dtype: torch.dtype) -> None:
    zs, zt = pair(5, 9001, (dtype, dtype))
    zs[0, :5000] = -torch.inf
    zt[1, 4000:] = -torch.inf
    zs[2, ::2] = zt[2, ::2] = -torch.inf
    zs[3, 1:] = -torch.inf
    zt[4] = torch.finfo(dtype).min
    zt[4, 17] = 1.0
    u = uniforms(5)
    for threshold in (-1.0, 2.0):
        found = kd.switch_gate(zs, zt, threshold, uniforms=u, backend=backend)
        check_jsd(found.jsd, zs, zt)
        check_tokens(found, zs, zt, u)


@pytest.mark.parametrize("shift", [-8192.0, 8192.0])
def test_far_from_zero(backend: str, shift: float) -> None:
    zs, zt = pair(3, 12000, (torch.float32, torch.float32))
    zs, zt = zs + shift, zt - shift
    found = kd.switch_gate(zs, zt, 0.1, uniforms=uniforms(3), backend=backend)
    check_jsd(found.jsd, zs, zt)
    check_tokens(found, zs, zt, uniforms(3))


@pytest.mark.parametrize("offset", [-100.0, 3000.0])
def test_masked_against_far_from_zero(backend: str, offset: float) -> None:
    """What takes a quick way and what takes a careful one must mean the same normaliser."""
    zs, zt = pair(3, 12000, (torch.float32, torch.float32))
    zs, zt = zs + offset, torch.where(zt > 0, zt, -torch.inf)
    for ours, theirs in ((zs, zt), (zt, zs)):
        check_jsd(kd.switch_gate(ours, theirs, 0.1, do_sample=False, backend=backend).jsd, ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_entries_far_below_the_largest(backend: str, dtype: torch.dtype) -> None:
    """At the end of what a float32 exponential can say, wherever that is."""
    below = torch.arange(60.0, 100.0, 0.05)
    zs = torch.zeros(len(below), 4096).to(dtype)
    zs[:, 1234] = -below.to(dtype)
    zt = zs.flip(0).roll(7, 1)
    found = kd.switch_gate(zs, zt, 0.0, do_sample=False, backend=backend)
    check_jsd(found.jsd, zs, zt)
    zs[:, 5] = zt[:, 9] = 30.0
    found = kd.switch_gate(zs, zt, 2.0, do_sample=False, backend=backend)
    check_jsd(found.jsd, zs, zt)
    assert found.token.unique().tolist() == [5]


@pytest.mark.parametrize("kind", ["peaked", "flat", "late peak", "ascending", "wide"])
def test_hard_rows(backend: str, kind: str) -> None:
    i, noise = torch.arange(20011.0), torch.randn(2, 20011, generator=torch.Generator().manual_seed(1))
    rows = {
        "peaked": torch.where(i == 12345, 60.0, 0.0) + noise,
        "flat": 1e-3 * noise,
        "late peak": torch.where(i > 20005, 90.0, 0.0) + noise,  # far above what the first entries show
        "ascending": i * 1e-2 + noise,
        "wide": 60 * noise,
    }[kind]
    zs, zt, u = rows[:1], rows[1:], uniforms(1)
    for threshold in (-1.0, 2.0):
        found = kd.switch_gate(zs, zt, threshold, uniforms=u, backend=backend)
        check_jsd(found.jsd, zs, zt)
        check_tokens(found, zs, zt, u)
    found = kd.switch_gate(zs, zt, -1.0, do_sample=False, backend=backend)
    assert found.token.item() == int(zt[0].argmax())


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    try:
        for rows, vocab, dtype in ((1, 151936, torch.float32), (5, 40001, torch.bfloat16), (2, 9000, torch.float16)):
            zs, zt = pair(rows, vocab, (dtype, dtype))
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found += [kd.switch_gate(zs, zt, 0.1, uniforms=uniforms(rows)) for _ in range(3)]
            for name in ("token", "from_teacher", "jsd"):
                assert all(torch.equal(getattr(f, name), getattr(found[0], name)) for f in found)
    finally:
        torch.set_num_threads(before)


FILES = (__file__, __file__.replace(".py", "_sampling.py"))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa: str) -> None:
    chosen = "test_values and 8193 or test_masked or test_small or test_hard or test_most or test_shapes and 5003"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--backends",
        "cpp",
        "-k",
        chosen,
        *FILES,
        "-p",
        "no:xdist",
    ]
    ran = subprocess.run(
        command, env={**os.environ, "KDKERNELS_ISA": isa}, capture_output=True, text=True, check=False,
        cwd=os.path.dirname(__file__),
    )  # fmt: skip
    if "this machine runs:" in ran.stdout:  # refused: this processor has no such instructions
        pytest.skip(f"no {isa} here")
    assert ran.returncode == 0, ran.stdout + ran.stderr
