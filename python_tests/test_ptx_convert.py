"""Conversions and comparisons of the emulator, against torch, exact arithmetic and the ISA's words."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.snippet import binary, per_thread, unary
from test_ptx_floating import exact_round, floats, rational

F32, U16, U32, U64 = np.float32, np.uint16, np.uint32, np.uint64
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 65519.9, 65520, 3.4e38, 1e-40, 2.5, 3.5, -2.5, 0.5], F32)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_narrowing_rounds_to_nearest_even_as_torch_does(kind: str) -> None:
    values = np.concatenate([SPECIAL, floats(1, 500)])
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(U16)
    assert (unary(f"cvt.rn.{kind}.f32", values, U16) == expected).all()
    pair = binary(f"cvt.rn.{kind}x2.f32", values, values[::-1].copy(), U32)
    assert (pair == (expected.astype(U32) << U32(16) | expected[::-1])).all()


def test_narrowed_nan_is_canonical_and_widening_is_exact() -> None:
    nan = np.array([0x7F800001, 0xFFC00000], U32).view(F32)
    assert list(unary("cvt.rn.bf16.f32", nan, U16)) == [0x7FFF] * 2
    assert list(unary("cvt.rn.f16.f32", nan, U16)) == [0x7FFF] * 2
    every = np.arange(1 << 16, dtype=np.int64).astype(U16)[::7].copy()
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        wide = torch.from_numpy(every.view(np.int16).copy()).view(dtype).float().numpy()
        got = unary(f"cvt.f32.{kind}", every, F32)
        assert (np.isnan(got) == np.isnan(wide)).all()
        assert (got == wide)[~np.isnan(wide)].all()


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_narrowing_in_each_rounding_mode(kind: str, mode: str) -> None:
    values = np.concatenate([SPECIAL[4:], floats(2, 300)])
    words = unary(f"cvt.{mode}.{kind}.f32", values, U16)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    results = torch.from_numpy(words.view(np.int16).copy()).view(dtype).double().tolist()
    for value, result in zip(values, results, strict=True):
        assert rational(result) == exact_round(Fraction(float(value)), kind, mode), value


def test_floats_to_integers_round_clamp_and_turn_nan_into_zero() -> None:
    values = np.array([2.5, 3.5, -2.5, -2.7, 2.7, 3e9, -3e9, 1e20, np.nan, np.inf, -np.inf, -0.4], F32)
    low, high = -(1 << 31), (1 << 31) - 1
    assert list(unary("cvt.rni.s32.f32", values, np.int32)) == [2, 4, -2, -3, 3, high, low, high, 0, high, low, 0]
    assert list(unary("cvt.rzi.s32.f32", values, np.int32)) == [2, 3, -2, -2, 2, high, low, high, 0, high, low, 0]
    assert list(unary("cvt.rmi.s32.f32", values, np.int32)) == [2, 3, -3, -3, 2, high, low, high, 0, high, low, -1]
    assert list(unary("cvt.rpi.s32.f32", values, np.int32)) == [3, 4, -2, -2, 3, high, low, high, 0, high, low, 0]
    assert list(unary("cvt.rzi.u32.f32", values, U32))[5:] == [3000000000, 0, 2**32 - 1, 0, 2**32 - 1, 0, 0]
    assert list(unary("cvt.rzi.u64.f32", values, U64))[7:10] == [2**64 - 1, 0, 2**64 - 1]
    assert list(unary("cvt.rzi.s64.f32", values, np.int64))[7:] == [2**63 - 1, 0, 2**63 - 1, -(2**63), 0]


def test_integers_to_floats_round_to_nearest() -> None:
    whole = np.array([(1 << 24) + 1, (1 << 24) + 3, -(1 << 24) - 1, (1 << 31) - 1], np.int32)
    assert (unary("cvt.rn.f32.s32", whole, F32) == whole.astype(np.float64).astype(F32)).all()
    big = np.array([2**64 - 1, 2**63 + 1, 2**40 + 2**16 + 1], U64)
    expected = [2.0**64, 2.0**63, float(2**40 + 2**17)]
    assert list(unary("cvt.rn.f32.u64", big, F32)) == expected


def test_integer_widths_extend_by_the_source_type_and_saturate_on_request() -> None:
    values = np.array([0x00000080, 0x0000FFFF, 0x80000000, 0x7FFFFFFF, 0xFFFFFF7F], U32)
    assert list(unary("cvt.s32.s8", values, np.int32)) == [-128, -1, 0, -1, 127]
    assert list(unary("cvt.u32.u16", values, U32)) == [0x80, 0xFFFF, 0, 0xFFFF, 0xFF7F]
    assert list(unary("cvt.s64.s32", values, np.int64))[2:] == [-(1 << 31), (1 << 31) - 1, -129]
    assert list(unary("cvt.u64.u32", values, U64))[2] == 1 << 31
    assert list(unary("cvt.sat.s8.s32", values, np.int32)) == [127, 127, -128, 127, -128]
    assert list(unary("cvt.sat.u8.s32", values, U32)) == [128, 255, 0, 255, 0]


def test_rounding_to_whole_floats_flushing_and_saturating() -> None:
    values = np.array([2.5, -0.5, 1e-40, np.nan], F32)
    assert list(unary("cvt.rni.f32.f32", values, F32))[:2] == [2, 0]
    assert list(unary("cvt.rpi.f32.f32", values, F32))[:2] == [3, 0]
    assert unary("cvt.ftz.f32.f32", values, U32)[2] == 0
    assert list(unary("cvt.sat.f32.f32", values, F32)) == [1, 0, F32(1e-40), 0]


ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"])
def test_float_comparisons_know_nan(name: str, kind: str) -> None:
    a = torch.tensor([1.0, 2.0, 2.0, float("nan"), 1.0, float("nan"), -0.0])
    b = torch.tensor([2.0, 1.0, 2.0, 1.0, float("nan"), float("nan"), 0.0])
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    raw = torch.int32 if kind == "f32" else torch.int16
    x, y = (v.to(dtype).view(raw).numpy() for v in (a, b))
    got = per_thread(f"setp.{name}.{kind} %p1, {{0}}, {{1}}; selp.u32 {{o0}}, 1, 0, %p1;", [x, y], [U32])[0][0]
    nan = np.isnan(a.numpy()) | np.isnan(b.numpy())
    if name in {"num", "nan"}:
        expected = nan if name == "nan" else ~nan
    else:
        ordered = ORDERED[name.removesuffix("u")](a.numpy(), b.numpy())
        expected = ordered | nan if name.endswith("u") else ordered & ~nan
    assert (got == expected).all()


def test_packed_comparison_gives_two_predicates() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, float("nan")]).to(torch.bfloat16).view(torch.int16).numpy().view(U32)
    b = torch.tensor([2.0, 2.0, 2.0, 2.0]).to(torch.bfloat16).view(torch.int16).numpy().view(U32)
    body = "setp.le.bf16x2 %p1|%p2, {0}, {1}; selp.u32 {o0}, 1, 0, %p1; selp.u32 {o1}, 1, 0, %p2;"
    (low, high), _ = per_thread(body, [a, b], [U32, U32])
    assert (list(low), list(high)) == ([1, 0], [1, 0])
