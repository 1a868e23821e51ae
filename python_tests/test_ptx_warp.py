"""Instructions across lanes, against the ISA's pseudo-code, with partial masks and segments."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import Divergence, run
from ptx.snippet import kernel, per_thread

U32, F32 = np.uint32, np.float32


def shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """(source lane, predicate): the ISA's shfl."""
    b, segment, limit = b & 31, c >> 8 & 31, c & 31
    highest, lowest = (lane & segment) | (limit & ~segment), lane & segment
    j, inside = {
        "up": (lane - b, lane - b >= highest),
        "down": (lane + b, lane + b <= highest),
        "bfly": (lane ^ b, (lane ^ b) <= highest),
        "idx": (lowest | (b & ~segment), (lowest | (b & ~segment)) <= highest),
    }[mode]
    return (j if inside else lane), inside


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_by_any_offset_within_segments(mode: str, width: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 32, 256, np.uint64).astype(U32)
    for offset in (0, 1, 3, 7, 16, 31):
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        body = f"shfl.sync.{mode}.b32 {{o0}}|%p1, {{0}}, {offset}, {c}, -1; selp.u32 {{o1}}, 1, 0, %p1;"
        (got, flags), _ = per_thread(body, [values], [U32, U32])
        for thread in range(256):
            lane, inside = shuffle(mode, thread & 31, offset, c)
            assert got[thread] == values[(thread & ~31) + lane]
            assert flags[thread] == inside


def test_shuffle_by_an_offset_of_each_lane() -> None:
    values, offsets = np.arange(64, dtype=U32), np.random.default_rng(1).integers(0, 32, 64).astype(U32)
    got = per_thread("shfl.sync.idx.b32 {o0}, {0}, {1}, 31, -1;", [values, offsets], [U32])[0][0]
    assert (got == values.reshape(2, 32)[np.arange(64) // 32, offsets]).all()


def test_half_a_warp_shuffles_under_its_own_mask() -> None:
    values = np.arange(64, dtype=U32)
    body = """and.b32 %w1, {tid}, 31; setp.lt.u32 %p1, %w1, 16; mov.u32 {o0}, 99; @!%p1 bra $rest;
              shfl.sync.bfly.b32 {o0}, {0}, 8, 31, 0x0000ffff; $rest: bar.warp.sync -1;"""
    got = per_thread(body, [values], [U32])[0][0].reshape(2, 32)
    assert (got[:, :16] == (np.arange(16) ^ 8) + np.array([[0], [32]])).all()
    assert (got[:, 16:] == 99).all()


@pytest.mark.parametrize("mask", ["-1", "0x0000ff00"])
def test_masks_that_do_not_fit_the_lanes_are_faults(mask: str) -> None:
    body = f"""and.b32 %w1, {{tid}}, 31; setp.lt.u32 %p1, %w1, 16; @!%p1 bra $rest;
               shfl.sync.bfly.b32 {{o0}}, {{0}}, 8, 31, {mask}; $rest: bar.warp.sync -1;"""
    with pytest.raises(Divergence, match="shfl"):
        per_thread(body, [np.arange(32, dtype=U32)], [U32])


def test_reading_a_lane_that_is_elsewhere_is_a_fault() -> None:
    body = """setp.lt.u32 %p1, {tid}, 16; @!%p1 bra $rest;
              shfl.sync.idx.b32 {o0}, {0}, 20, 31, 0x0000ffff; $rest: bar.warp.sync -1;"""
    with pytest.raises(Divergence, match="reads a lane"):
        per_thread(body, [np.arange(32, dtype=U32)], [U32])


def test_votes() -> None:
    values = np.random.default_rng(2).integers(0, 4, 128).astype(U32)
    values[32:64], values[64:96] = 0, 1
    body = """setp.eq.u32 %p1, {0}, 1; vote.sync.ballot.b32 {o0}, %p1, -1; vote.sync.any.pred %p2, %p1, -1;
              vote.sync.all.pred %p3, %p1, -1; vote.sync.uni.pred %p4, %p1, -1; vote.sync.all.pred %p5, !%p1, -1;
              selp.u32 %w1, 1, 0, %p2; selp.u32 %w2, 2, 0, %p3; selp.u32 %w3, 4, 0, %p4; selp.u32 %w4, 8, 0, %p5;
              or.b32 {o1}, %w1, %w2; or.b32 {o1}, {o1}, %w3; or.b32 {o1}, {o1}, %w4;"""
    (ballot, flags), _ = per_thread(body, [values], [U32, U32])
    rows = (values == 1).reshape(4, 32)
    assert (ballot.reshape(4, 32) == (rows << np.arange(32)).sum(1)[:, None]).all()
    expected = rows.any(1) + 2 * rows.all(1) + 4 * (rows.all(1) | ~rows.any(1)) + 8 * ~rows.any(1)
    assert (flags.reshape(4, 32) == expected[:, None]).all()


def test_match_finds_equal_values() -> None:
    values = np.random.default_rng(3).integers(0, 5, 64).astype(U32)
    values[32:] = 7
    body = "match.any.sync.b32 {o0}, {0}, -1; match.all.sync.b32 {o1}|%p1, {0}, -1; selp.u32 {o2}, 1, 0, %p1;"
    (some, every, flag), _ = per_thread(body, [values], [U32, U32, U32])
    equal = values.reshape(2, 32)[:, :, None] == values.reshape(2, 32)[:, None, :]
    assert (some.reshape(2, 32) == (equal << np.arange(32)).sum(2)).all()
    assert list(every[[0, 32]]) == [0, 0xFFFFFFFF]
    assert list(flag[[0, 32]]) == [0, 1]


def test_reductions_over_the_warp() -> None:
    values = np.random.default_rng(4).integers(0, 1 << 32, 64, np.uint64).astype(U32)
    body = " ".join(
        f"redux.sync.{name} {{o{i}}}, {{0}}, -1;"
        for i, name in enumerate(["add.s32", "min.s32", "max.u32", "and.b32", "or.b32", "xor.b32"])
    )
    results, _ = per_thread(body, [values], [U32] * 6)
    rows, signed = values.reshape(2, 32), values.view(np.int32).reshape(2, 32)
    expected = [
        rows.sum(1, dtype=U32),
        signed.min(1).view(U32),
        rows.max(1),
        np.bitwise_and.reduce(rows, 1),
        np.bitwise_or.reduce(rows, 1),
        np.bitwise_xor.reduce(rows, 1),
    ]
    for got, want in zip(results, expected, strict=True):
        assert (got.reshape(2, 32) == want[:, None]).all()


def test_float_reductions_skip_nan_unless_told() -> None:
    values = np.random.default_rng(5).standard_normal(64).astype(F32)
    values[3] = np.nan
    body = (
        "redux.sync.max.f32 {o0}, {0}, -1; redux.sync.min.NaN.f32 {o1}, {0}, -1; redux.sync.max.abs.f32 {o2}, {0}, -1;"
    )
    (most, least, size), _ = per_thread(body, [values], [F32, F32, F32])
    rows = values.reshape(2, 32)
    assert list(most[[0, 32]]) == list(np.nanmax(rows, 1))
    assert least.view(U32)[0] == 0x7FFFFFFF
    assert least[32] == rows[1].min()
    assert list(size[[0, 32]]) == list(np.nanmax(np.abs(rows), 1))


def test_one_leader_is_elected() -> None:
    body = "elect.sync {o0}|%p1, -1; selp.u32 {o1}, 1, 0, %p1;"
    (lane, flag), _ = per_thread(body, [np.zeros(64, U32)], [U32, U32])
    assert (lane == 0).all()
    assert list(np.flatnonzero(flag)) == [0, 32]


def test_special_registers() -> None:
    out = np.zeros((12, 7), U32)
    names = ["tid.x", "tid.y", "ctaid.x", "ctaid.y", "laneid", "lanemask_lt", "nctaid.y"]
    stores = " ".join(f"mov.u32 %w1, %{name}; st.global.u32 [%d1+{4 * i}], %w1;" for i, name in enumerate(names))
    body = f"""ld.param.u64 %d1, [p0]; mov.u32 %w1, %tid.x; mov.u32 %w2, %tid.y; mov.u32 %w3, %ctaid.y;
        mad.lo.u32 %w4, %w3, 6, %w1; mad.lo.u32 %w4, %w2, 2, %w4; mad.wide.u32 %d1, %w4, 28, %d1; {stores}"""
    run(kernel(body, 1), (1, 2, 1), (2, 3, 1), [out])
    assert [row[[0, 1, 3, 4, 6]].tolist() for row in out[[0, 5, 10]]] == [
        [0, 0, 0, 0, 2],
        [1, 2, 0, 5, 2],
        [0, 2, 1, 4, 2],
    ]
    assert out[10, 5] == 0b1111
