"""The emulator's integer and bit instructions against Python integers and the ISA's pseudo-code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ptx.snippet import binary, per_thread, ternary, unary

U16, U32, S32, U64, S64 = np.uint16, np.uint32, np.int32, np.uint64, np.int64
Array = np.ndarray[Any, Any]
EDGES32 = [0, 1, 2, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678]


def words(seed: int, count: int = 200) -> Array:
    values = np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint64).astype(U32)
    values[: len(EDGES32)] = np.roll(EDGES32, seed)
    return values


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def check(got: Array, expect: Callable[..., int], *operands: Array) -> None:
    bits = got.itemsize * 8
    for result, *values in zip(got.tolist(), *(operand.tolist() for operand in operands), strict=True):
        assert result % (1 << bits) == expect(*values) % (1 << bits), values


def test_addition_and_products_wrap() -> None:
    a, b, c = words(1), words(2), words(3)
    check(binary("add.s32", a, b, U32), lambda x, y: x + y, a, b)
    check(binary("sub.u32", a, b, U32), lambda x, y: x - y, a, b)
    check(binary("mul.lo.s32", a, b, U32), lambda x, y: x * y, a, b)
    check(binary("mul.hi.u32", a, b, U32), lambda x, y: x * y >> 32, a, b)
    check(binary("mul.hi.s32", a, b, U32), lambda x, y: signed(x) * signed(y) >> 32, a, b)
    check(binary("mul.wide.s32", a, b, U64), lambda x, y: signed(x) * signed(y), a, b)
    check(binary("mul.wide.u32", a, b, U64), lambda x, y: x * y, a, b)
    check(ternary("mad.lo.u32", a, b, c, U32), lambda x, y, z: x * y + z, a, b, c)
    wide = c.astype(U64) << U64(31)
    check(ternary("mad.wide.s32", a, b, wide, U64), lambda x, y, z: signed(x) * signed(y) + z, a, b, wide)


def test_sixty_four_bit_upper_products() -> None:
    a = (words(1).astype(U64) << U64(32)) | words(2)
    b = (words(3).astype(U64) << U64(32)) | words(4)
    check(binary("mul.hi.u64", a, b, U64), lambda x, y: x * y >> 64, a, b)
    check(binary("mul.hi.s64", a, b, U64), lambda x, y: signed(x, 64) * signed(y, 64) >> 64, a, b)


def test_saturating_addition() -> None:
    a, b = words(1), words(2)
    clamp = lambda v: max(-(1 << 31), min((1 << 31) - 1, v))  # noqa: E731
    check(binary("add.sat.s32", a, b, U32), lambda x, y: clamp(signed(x) + signed(y)), a, b)
    check(binary("sub.sat.s32", a, b, U32), lambda x, y: clamp(signed(x) - signed(y)), a, b)


def test_division_truncates_toward_zero() -> None:
    a, b = words(1), words(2)
    b[b == 0] = 7
    quotient = lambda x, y: abs(signed(x)) // abs(signed(y)) * (1 if (signed(x) < 0) == (signed(y) < 0) else -1)  # noqa: E731
    check(binary("div.s32", a, b, U32), quotient, a, b)
    check(binary("rem.s32", a, b, U32), lambda x, y: signed(x) - quotient(x, y) * signed(y), a, b)
    check(binary("div.u32", a, b, U32), lambda x, y: x // y, a, b)
    check(binary("rem.u32", a, b, U32), lambda x, y: x % y, a, b)


def test_extremes_absolute_values_and_differences() -> None:
    a, b, c = words(1), words(2), words(3)
    check(binary("min.s32", a, b, U32), lambda x, y: min(signed(x), signed(y)), a, b)
    check(binary("max.u32", a, b, U32), max, a, b)
    check(unary("abs.s32", a, U32), lambda x: abs(signed(x)), a)
    check(unary("neg.s32", a, U32), lambda x: -x, a)
    check(ternary("sad.u32", a, b, c, U32), lambda x, y, z: abs(x - y) + z, a, b, c)


def test_shift_amounts_are_clamped_not_masked() -> None:
    a, n = words(1), words(2) % U32(70)
    n[:2] = 0xFFFFFFFF
    check(binary("shl.b32", a, n, U32), lambda x, s: x << s if s < 32 else 0, a, n)
    check(binary("shr.u32", a, n, U32), lambda x, s: x >> min(s, 32), a, n)
    check(binary("shr.s32", a, n, U32), lambda x, s: signed(x) >> min(s, 32), a, n)
    wide = (a.astype(U64) << U64(32)) | words(5)
    check(binary("shr.s64", wide, n, U64), lambda x, s: signed(x, 64) >> min(s, 64), wide, n)


def test_funnel_shifts() -> None:
    a, b, n = words(1), words(2), words(3) % U32(40)
    pair = lambda x, y: y << 32 | x  # noqa: E731
    check(ternary("shf.l.wrap.b32", a, b, n, U32), lambda x, y, s: pair(x, y) << (s & 31) >> 32, a, b, n)
    check(ternary("shf.r.wrap.b32", a, b, n, U32), lambda x, y, s: pair(x, y) >> (s & 31), a, b, n)
    check(ternary("shf.l.clamp.b32", a, b, n, U32), lambda x, y, s: pair(x, y) << min(s, 32) >> 32, a, b, n)
    check(ternary("shf.r.clamp.b32", a, b, n, U32), lambda x, y, s: pair(x, y) >> min(s, 32), a, b, n)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xCA, 0x1A])
def test_three_input_logic_follows_its_table(table: int) -> None:
    a, b, c = words(1), words(2), words(3)

    def expect(x: int, y: int, z: int) -> int:
        index = [(x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1) for i in range(32)]
        return sum((table >> index[i] & 1) << i for i in range(32))

    got = per_thread(f"lop3.b32 {{o0}}, {{0}}, {{1}}, {{2}}, {table};", [a, b, c], [U32])[0][0]
    check(got, expect, a, b, c)


def test_byte_permutation_replicates_signs() -> None:
    a, b, s = words(1), words(2), words(3)

    def expect(x: int, y: int, selector: int) -> int:
        result = 0
        for i in range(4):
            choice = selector >> 4 * i & 15
            byte = (y << 32 | x) >> 8 * (choice & 7) & 255
            result |= ((255 if byte & 128 else 0) if choice & 8 else byte) << 8 * i
        return result

    check(ternary("prmt.b32", a, b, s, U32), expect, a, b, s)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extraction_follows_the_pseudo_code(kind: str) -> None:
    bits, dtype = int(kind[1:]), U32 if kind.endswith("32") else U64
    a = words(1).astype(dtype) if bits == 32 else (words(1).astype(U64) << U64(32)) | words(2)
    position, length = words(3) % U32(80), words(4) % U32(80)
    position[:3], length[:3] = [0, 31, 256], [0, 40, 8]

    def expect(value: int, pos: int, size: int) -> int:
        pos, size, msb = pos & 255, size & 255, bits - 1
        sign = 0 if kind[0] == "u" or size == 0 else value >> min(pos + size - 1, msb) & 1
        return sum((value >> pos + i & 1 if i < size and pos + i <= msb else sign) << i for i in range(bits))

    check(ternary(f"bfe.{kind}", a, position, length, dtype), expect, a, position, length)


def test_bit_field_insertion_follows_the_pseudo_code() -> None:
    a, b, position, length = words(1), words(2), words(3) % U32(40), words(4) % U32(40)

    def expect(x: int, y: int, pos: int, size: int) -> int:
        for i in range(size):
            if pos + i <= 31:
                y = y & ~(1 << pos + i) | (x >> i & 1) << pos + i
        return y

    got = per_thread("bfi.b32 {o0}, {0}, {1}, {2}, {3};", [a, b, position, length], [U32])[0][0]
    check(got, expect, a, b, position, length)


def test_counting_bits() -> None:
    a = words(1)
    check(unary("popc.b32", a, U32), lambda x: x.bit_count(), a)
    check(unary("clz.b32", a, U32), lambda x: 32 - x.bit_length(), a)
    check(unary("brev.b32", a, U32), lambda x: int(f"{x:032b}"[::-1], 2), a)
    check(unary("bfind.u32", a, U32), lambda x: x.bit_length() - 1, a)
    check(unary("bfind.shiftamt.u32", a, U32), lambda x: 32 - x.bit_length() if x else -1, a)
    flip = lambda x: (~signed(x) if signed(x) < 0 else x).bit_length() - 1  # noqa: E731
    check(unary("bfind.s32", a, U32), flip, a)
    wide = (a.astype(U64) << U64(32)) | words(2)
    check(unary("clz.b64", wide, U32), lambda x: 64 - x.bit_length(), wide)


def test_moves_pack_and_unpack_with_the_first_element_lowest() -> None:
    a, b = words(1), words(2)
    (wide, low, high), _ = per_thread(
        "mov.b64 {o0}, {{0}, {1}}; mov.b64 {{o1}, {o2}}, {o0};".replace("{{0}", "{ {0}")
        .replace("{1}}", "{1} }")
        .replace("{{o1}", "{ {o1}")
        .replace("{o2}}", "{o2} }"),
        [a, b],
        [U64, U32, U32],
    )
    assert (wide == (b.astype(U64) << U64(32) | a)).all()
    assert (low == a).all()
    assert (high == b).all()


def test_predicates_select_and_combine() -> None:
    a, b = words(1), words(2)
    body = """setp.lt.s32 %p1|%p2, {0}, {1}; setp.hi.or.u32 %p3, {0}, {1}, !%p1; and.pred %p4, %p1, !%p3;
              not.pred %p5, %p4; xor.pred %p6, %p5, %p2; selp.b32 {o0}, {0}, {1}, %p3; selp.u32 {o1}, 1, 0, %p6;"""
    (chosen, flag), _ = per_thread(body, [a, b], [U32, U32])
    less = a.view(S32) < b.view(S32)
    third = (a > b) | ~less
    assert (chosen == np.where(third, a, b)).all()
    assert (flag == (~(less & ~third) ^ ~less)).all()


def test_guards_keep_other_threads_as_they_are() -> None:
    a, b = words(1), words(2)
    body = "mov.u32 {o0}, {0}; setp.lt.u32 %p1, {0}, {1}; @%p1 add.u32 {o0}, {0}, 5; @!%p1 mov.u32 {o0}, {1};"
    got = per_thread(body, [a, b], [U32])[0][0]
    assert (got == np.where(a < b, a + U32(5), b)).all()


def test_carries_chain_words_into_wide_numbers() -> None:
    a, b, c, d = (words(seed) for seed in (1, 2, 3, 4))
    body = """add.cc.u32 {o0}, {0}, {2}; addc.u32 {o1}, {1}, {3}; sub.cc.u32 {o2}, {0}, {2}; subc.u32 {o3}, {1}, {3};"""
    (low, high, less, rest), _ = per_thread(body, [a, b, c, d], [U32] * 4)
    x, y = (b.astype(object) << 32) + a, (d.astype(object) << 32) + c
    assert ((high.astype(object) << 32) + low == (x + y) % 2**64).all()
    assert ((rest.astype(object) << 32) + less == (x - y) % 2**64).all()
    body = "mad.lo.cc.u32 {o0}, {0}, {1}, {2}; madc.hi.u32 {o1}, {0}, {1}, {3};"
    (low, high), _ = per_thread(body, [a, b, c, d], [U32] * 2)
    assert ((high.astype(object) << 32) + low == (a.astype(object) * b.astype(object) + y) % 2**64).all()
