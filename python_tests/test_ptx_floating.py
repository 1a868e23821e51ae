"""The emulator's floating-point arithmetic against exact rational arithmetic and the ISA's words."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptx import Unsupported
from ptx.snippet import binary, per_thread, ternary, unary

F32, U16, U32, U64 = np.float32, np.uint16, np.uint32, np.uint64
NAN32 = 0x7FFFFFFF
Array = np.ndarray[Any, Any]

# precision, smallest exponent of a unit in the last place, and the largest finite number's exponent
FORMATS = {"f32": (24, -149, 127), "f16": (11, -24, 15), "bf16": (8, -133, 127)}


def exact_round(value: Fraction, kind: str, mode: str = "rn") -> Fraction | float:
    """A rational number rounded to a binary format; inf where it overflows."""
    precision, lowest, highest = FORMATS[kind]
    if value == 0:
        return Fraction(0)
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent += 1 if Fraction(2) ** exponent <= magnitude else 0
    unit = Fraction(2) ** max(exponent - precision, lowest)
    steps, rest = divmod(magnitude, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and steps % 2 == 1),
        "rz": False,
        "rm": value < 0 and rest > 0,
        "rp": value > 0 and rest > 0,
    }[mode]
    result = (steps + up) * unit * (1 if value > 0 else -1)
    if abs(result) >= Fraction(2) ** (highest + 1):
        finite = mode == "rz" or (mode == "rm" and value > 0) or (mode == "rp" and value < 0)
        limit = (Fraction(2) ** highest) * (2 - Fraction(2) ** (1 - precision))
        return (limit if finite else float("inf")) * (1 if value > 0 else -1)
    return result


def floats(seed: int, count: int, spread: int = 30) -> Array:
    """float32 with exponents all over, subnormals and ties among them."""
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(-(1 << 24), 1 << 24, count)
    mantissa[::5] &= ~0xFFF  # short ones, so that sums and products tie
    return np.ldexp(mantissa.astype(np.float64), rng.integers(-spread, spread, count) - 24).astype(F32)


def fused_cases() -> tuple[Array, Array, Array]:
    """Triples whose sum in float64 looks like a tie of float32 though it is none, and random ones."""
    a, b, c = floats(1, 400), floats(2, 400), floats(3, 400, 60)
    tie = F32(1) + F32(2.0**-23)
    a[:4], b[:4] = tie, tie  # (1 + u)^2 = 1 + 2u + u^2: u^2 decides
    c[:4] = [2.0**-24, -(2.0**-24), 2.0**-24 + 2.0**-47, 1.0]
    a[4:8], b[4:8], c[4:8] = 2.0**-74, [2.0**-75, -(2.0**-75), 1.5 * 2.0**-75, 2.0**-76], 2.0**-149  # subnormal ties
    a[8:12], b[8:12], c[8:12] = 2.0**-60, [2.0**-60, -(2.0**-60), 3, -3], 1 + 2.0**-23
    c[10:12] = F32(2.0**-37)
    a[12:14], b[12:14], c[12:14] = 2.0**-70, [2.0**-70, -(2.0**-70)], 1.0
    # 2^-24 (1 - 2^-46) below a tie that float64 rounds to, at odd neighbours
    a[14:16], b[14:16], c[14:16] = tie, [(1 - 2.0**-23) * 2.0**-24, (2.0**-23 - 1) * 2.0**-24], tie
    return a, b, c


def rational(result: Any) -> Fraction | float:
    return Fraction(float(result)) if np.isfinite(result) else float(result)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
def test_float32_rounds_once(opcode: str, mode: str) -> None:
    a, b, c = fused_cases()
    got = ternary(f"fma.{mode}.f32", a, b, c, F32) if opcode == "fma" else binary(f"{opcode}.{mode}.f32", a, b, F32)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        fx, fy, fz = (Fraction(float(value)) for value in (x, y, z))
        exact = {"add": fx + fy, "sub": fx - fy, "mul": fx * fy, "fma": fx * fy + fz}[opcode]
        assert rational(result) == exact_round(exact, "f32", mode), (opcode, x, y, z)


def test_a_fused_multiply_add_through_float64_alone_would_fail_these_cases() -> None:
    a, b, c = fused_cases()
    twice = (a.astype(np.float64) * b + c).astype(F32)
    assert (ternary("fma.rn.f32", a, b, c, F32) != twice).any()


def test_float64_fused_multiply_add_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(300), rng.standard_normal(300)
    c = -a * b * (1 + rng.standard_normal(300) * 2.0 ** rng.integers(-60, 0, 300))
    got = ternary("fma.rn.f64", a, b, c, np.float64)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert result == float(exact)  # Python rounds a fraction once


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("opcode", ["add", "mul", "fma"])
def test_sixteen_bit_arithmetic_rounds_once_in_packed_pairs(kind: str, opcode: str) -> None:
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    generator = torch.Generator().manual_seed(4)
    data = [
        (torch.randn(512, generator=generator) * 2.0 ** torch.randint(-6, 7, (512,), generator=generator)).to(dtype)
        for _ in range(3)
    ]
    data[2][:256] = (data[0][:256].double() * data[1][:256].double()).to(dtype)  # cancellation, ties
    words = [tensor.view(torch.int16).numpy().view(U32) for tensor in data]
    if opcode == "fma":
        got = ternary(f"fma.rn.{kind}x2", *words, U32)
    else:
        got = binary(f"{opcode}.rn.{kind}x2", *words[:2], U32)
    results = torch.from_numpy(got.view(np.int16).copy()).view(dtype)
    for x, y, z, result in zip(*(tensor.tolist() for tensor in data), results.tolist(), strict=True):
        fx, fy, fz = Fraction(x), Fraction(y), Fraction(z)
        exact = {"add": fx + fy, "mul": fx * fy, "fma": fx * fy + fz}[opcode]
        assert rational(result) == exact_round(exact, kind), (x, y, z)


def test_packed_float32_pairs_equal_two_scalar_instructions() -> None:
    a, b, c = floats(5, 256), floats(6, 256), floats(7, 256)
    for name, arrays in (("add.rn", (a, b)), ("mul.rn", (a, b)), ("fma.rn", (a, b, c))):
        call = {2: binary, 3: ternary}[len(arrays)]
        pairs = call(f"{name}.f32x2", *(array.view(U64) for array in arrays), U64)  # type: ignore[operator]
        single = call(f"{name}.f32", *arrays, F32)  # type: ignore[operator]
        assert (pairs.view(F32) == single).all()


def test_ftz_flushes_operands_and_results_to_zeros_of_their_sign() -> None:
    tiny = np.array([1e-40, -1e-40, 2.0**-126, -(2.0**-126), 1.0], F32)
    one = np.ones(5, F32)
    flushed = binary("mul.ftz.f32", tiny, one, U32)
    assert list(flushed) == [0, 0x80000000, *np.array([2.0**-126, -(2.0**-126), 1.0], F32).view(U32)]
    assert (binary("mul.f32", tiny, one, F32) == tiny).all()
    assert list(binary("mul.ftz.f32", np.full(2, 2.0**-100, F32), np.array([2.0**-30, -(2.0**-30)], F32), U32)) == [
        0,
        0x80000000,
    ]
    zero = np.zeros(5, F32)
    assert list(ternary("fma.rn.ftz.f32", tiny, one, zero, F32)) == [0, 0, 2.0**-126, -(2.0**-126), 1]
    assert list(unary("neg.ftz.f32", tiny, U32))[:2] == [0x80000000, 0]
    assert list(unary("abs.ftz.f32", tiny, U32))[:2] == [0, 0]


def test_results_that_are_nan_are_canonical() -> None:
    nan = np.array([0x7FC01234, 0xFFC00000, 0x7F800001], U32).view(F32)
    one = np.ones(3, F32)
    for result in (binary("add.f32", nan, one, U32), ternary("fma.rn.f32", nan, one, one, U32)):
        assert list(result) == [NAN32] * 3
    infinity = np.array([np.inf], F32)
    assert list(binary("sub.f32", infinity, infinity, U32)) == [NAN32]
    assert list(binary("max.NaN.f32", nan, one, U32)) == [NAN32] * 3
    assert list(binary("max.f32", nan, nan, U32)) == [NAN32] * 3


def test_minimum_and_maximum_know_nan_and_signed_zeros() -> None:
    nan, zero = F32(np.nan), F32(0)
    a = np.array([nan, 1, zero, -zero, -1, nan], F32)
    b = np.array([2, nan, -zero, zero, 1, -np.inf], F32)
    assert list(binary("max.f32", a, b, U32)) == list(np.array([2, 1, 0, 0, 1, -np.inf], F32).view(U32))
    assert list(binary("min.f32", a, b, U32)) == list(np.array([2, 1, -zero, -zero, -1, -np.inf], F32).view(U32))
    assert list(binary("min.NaN.f32", a, b, U32)[[0, 1, 5]]) == [NAN32] * 3
    three = per_thread("max.f32 {o0}, {0}, {1}, {2};", [a, b, np.full(6, 0.5, F32)], [F32])[0][0]
    assert list(three) == [2, 1, 0.5, 0.5, 1, 0.5]


def test_extremes_of_magnitudes_multiply_the_signs() -> None:
    a, b = np.array([1, -1, 3, -3, np.nan], F32), np.array([-2, -2, 2, -0.0, -2], F32)
    assert list(binary("min.xorsign.abs.f32", a, b, U32)) == list(np.array([-1, 1, 2, 0, -2], F32).view(U32))
    assert list(binary("max.xorsign.abs.f32", a, b, F32)[:4]) == [-2, 2, 3, 3]


def test_saturation_clamps_to_the_unit_interval_and_turns_nan_into_zero() -> None:
    a = np.array([0.25, 0.75, -1, np.nan, np.inf], F32)
    assert list(binary("add.sat.f32", a, np.full(5, 0.5, F32), F32)) == [0.75, 1, 0, 0, 1]
    assert list(ternary("fma.rn.sat.f32", a, np.ones(5, F32), np.zeros(5, F32), F32)) == [0.25, 0.75, 0, 0, 1]


def test_negation_and_absolute_value_touch_the_sign_bit_only() -> None:
    a = np.array([0.0, -0.0, 1.5, -np.inf], F32)
    assert list(unary("neg.f32", a, U32)) == list((-a).view(U32))
    assert list(unary("abs.f32", a, U32)) == list(np.abs(a).view(U32))
    halves = np.array([0x3C00BC00, 0x80007C00], U32)
    assert list(unary("neg.f16x2", halves, U32)) == [0xBC003C00, 0x0000FC00]
    assert list(unary("abs.bf16x2", halves, U32)) == [0x3C003C00, 0x00007C00]


def test_division_and_roots_round_to_nearest() -> None:
    a, b = floats(8, 200), floats(9, 200)
    b[b == 0] = 1
    for x, y, q in zip(a, b, binary("div.rn.f32", a, b, F32), strict=True):
        assert rational(q) == exact_round(Fraction(float(x)) / Fraction(float(y)), "f32")
    roots = unary("sqrt.rn.f32", np.abs(a), F32)
    assert (roots == np.sqrt(np.abs(a).astype(np.float64)).astype(F32)).all()


@pytest.mark.parametrize("text", ["add.rz.f64", "add.rn.ftz.bf16", "mul.rn.relu.f32", "fma.rz.bf16"])
def test_what_is_not_known_is_refused(text: str) -> None:
    dtype = {"f64": np.float64, "f16": U16, "bf16": U16, "f32": F32}[text.rsplit(".", maxsplit=1)[-1]]
    one = np.ones(4, dtype)
    with pytest.raises(Unsupported):
        (ternary(text, one, one, one, dtype) if text.startswith("fma") else binary(text, one, one, dtype))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mixed_precision_takes_sixteen_bit_operands_exactly(kind: str) -> None:
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b = (torch.from_numpy(np.clip(floats(seed, 100, 10), -1e3, 1e3)).to(dtype) for seed in (1, 2))
    x, y, c = a.view(torch.int16).numpy(), b.view(torch.int16).numpy(), floats(3, 100, 10)
    assert (binary(f"add.rn.f32.{kind}", x, c, F32) == a.float().numpy() + c).all()
    assert (binary(f"sub.rn.f32.{kind}", x, c, F32) == a.float().numpy() - c).all()
    fused = ternary("fma.rn.f32", a.float().numpy(), b.float().numpy(), c, F32)
    assert (ternary(f"fma.rn.f32.{kind}", x, y, c, F32) == fused).all()
    with pytest.raises(Unsupported):
        binary(f"mul.rn.f32.{kind}", x, c, F32)
