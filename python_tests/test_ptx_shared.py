"""Shared memory: races, reads of what nothing wrote, bounds, bank conflicts, atomics, asynchronous copies."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import Misaligned, OutOfBounds, Settings, SharedRace, Uninitialised, Unsupported, WriteConflict, run
from ptx.snippet import kernel

F32, U16, U32, U64 = np.float32, np.uint16, np.uint32, np.uint64
HEAD = ".shared .align 16 .b8 buffer[4096];"


def shared(body: str, threads: int = 128, outputs: int = 0, dynamic: int = 0, head: str = HEAD) -> np.ndarray:
    """Runs a body with %w1 = thread, %w2 = buffer + 4 * thread; it leaves a result in %w3, which is returned."""
    out = np.zeros(threads, U32)
    start = "mov.u32 %w1, %tid.x; mov.u32 %w4, buffer; mad.lo.u32 %w2, %w1, 4, %w4;"
    end = "ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %w1, 4, %d1; st.global.u32 [%d1], %w3;"
    run(kernel(f"{start} {body} {end}", 1, head), (2,), threads, [out], shared=dynamic)
    return out


REVERSE = """st.shared.u32 [%w2], %w1; {barrier} sub.u32 %w5, 127, %w1; mad.lo.u32 %w5, %w5, 4, %w4;
             ld.shared.u32 %w3, [%w5]; {second} st.shared.u32 [%w2], %w3;"""


def test_a_barrier_orders_writes_before_reads() -> None:
    out = shared(REVERSE.format(barrier="bar.sync 0;", second="bar.sync 0;"))
    assert (out == 127 - np.arange(128)).all()


def test_a_missing_barrier_is_a_race() -> None:
    with pytest.raises(SharedRace, match="reads what another warp wrote"):
        shared(REVERSE.format(barrier="st.shared.u32 [%w2], %w1;", second="bar.sync 0;"))
    with pytest.raises(SharedRace, match="writes what another warp read"):
        shared(REVERSE.format(barrier="bar.sync 0;", second=""))


def test_two_warps_may_write_one_value_but_not_two() -> None:
    assert (shared("st.shared.u32 [buffer], 5; bar.sync 0; ld.shared.u32 %w3, [buffer];") == 5).all()
    with pytest.raises(WriteConflict):
        shared("shr.u32 %w5, %w1, 5; st.shared.u32 [buffer], %w5; bar.sync 0; ld.shared.u32 %w3, [buffer];")


def test_two_lanes_may_not_write_different_values() -> None:
    with pytest.raises(WriteConflict):
        shared("st.shared.u32 [buffer], %w1; ld.shared.u32 %w3, [buffer];", threads=32)


def test_neighbouring_halves_of_a_word_are_not_a_race() -> None:
    body = """cvt.u16.u32 %h1, %w1; and.b32 %w6, %w1, 31; mad.lo.u32 %w5, %w6, 8, %w4;
              shr.u32 %w6, %w1, 5; mad.lo.u32 %w5, %w6, 2, %w5;
              st.shared.u16 [%w5], %h1; ld.shared.u16 %h2, [%w5]; cvt.u32.u16 %w3, %h2;"""
    assert (shared(body) == np.arange(128)).all()


def test_the_race_check_can_be_switched_off() -> None:
    body = REVERSE.format(barrier="", second="")
    text = kernel(f"mov.u32 %w1, %tid.x; mov.u32 %w4, buffer; mad.lo.u32 %w2, %w1, 4, %w4; {body}", 0, HEAD)
    run(text, (1,), 128, [], settings=Settings(check_races=False))
    with pytest.raises(SharedRace):
        run(text, (1,), 128, [])


def test_reading_what_nothing_wrote_is_a_fault() -> None:
    with pytest.raises(Uninitialised):
        shared("ld.shared.u32 %w3, [%w2];")
    with pytest.raises(Uninitialised):
        shared("setp.ne.u32 %p1, %w1, 77; @%p1 st.shared.u32 [%w2], %w1; ld.shared.u32 %w3, [%w2];")


def test_bounds_and_alignment() -> None:
    with pytest.raises(OutOfBounds):
        shared("st.shared.u32 [%w2+3588], %w1;")
    with pytest.raises(Misaligned):
        shared("st.shared.u64 [%w2], %d1;")


def test_dynamic_shared_memory_follows_static() -> None:
    head = f".extern .shared .align 16 .b8 more[]; {HEAD}"
    body = "mov.u32 %w5, more; st.shared.u32 [%w2], %w5; ld.shared.u32 %w3, [%w2]; st.shared.u32 [more+60], %w4;"
    assert (shared(body, 32, dynamic=64, head=head) == 4096).all()
    with pytest.raises(OutOfBounds):
        shared(body.replace("more+60", "more+64"), 32, dynamic=64, head=head)


def conflicts(line: str) -> int:
    body = f"mov.u32 %w1, %tid.x; mov.u32 %w4, buffer; {line}"
    return run(kernel(body, 0, HEAD), (1,), 32, []).bank_conflicts


def test_bank_conflicts() -> None:
    store = "mad.lo.u32 %w2, %w1, {step}, %w4; st.shared.{kind} [%w2], {value};"
    word = [conflicts(store.format(step=step, kind="u32", value="%w1")) for step in (4, 8, 16, 64, 128)]
    assert word == [0, 1, 3, 15, 31]
    assert conflicts(store.format(step=8, kind="u64", value="%d1")) == 0
    assert conflicts(store.format(step=16, kind="v4.u32", value="{%w5, %w6, %w7, %w8}")) == 0
    assert conflicts(store.format(step=32, kind="v4.u32", value="{%w5, %w6, %w7, %w8}")) == 4
    assert conflicts(store.format(step=0, kind="u32", value="5")) == 0
    assert conflicts(store.format(step=2, kind="u16", value="%h1")) == 0


def test_atomics_on_shared_memory_add_up_and_return_old_values() -> None:
    body = """setp.eq.u32 %p1, %w1, 0; @%p1 st.shared.u32 [buffer], 0; bar.sync 0;
              atom.shared.add.u32 %w3, [buffer], 2; bar.sync 0; ld.shared.u32 %w5, [buffer]; @%p1 mov.u32 %w3, %w5;"""
    out = shared(body)
    assert list(out) == [256, *range(2, 256, 2)]


def test_a_plain_read_beside_an_atomic_is_a_race() -> None:
    body = """setp.eq.u32 %p1, %w1, 0; @%p1 st.shared.u32 [buffer], 0; bar.sync 0;
              red.shared.add.u32 [buffer], 2; ld.shared.u32 %w3, [buffer];"""
    with pytest.raises(SharedRace):
        shared(body)


@pytest.mark.parametrize(
    ("operation", "kind", "function"),
    [
        ("add", "f32", lambda v: v.sum(dtype=F32)),
        ("max", "s32", lambda v: v.max()),
        ("min", "u32", lambda v: v.min()),
        ("xor", "b32", np.bitwise_xor.reduce),
        ("and", "b32", np.bitwise_and.reduce),
        ("add", "u64", lambda v: v.sum()),
    ],
)
def test_atomics_on_global_memory(operation: str, kind: str, function: object) -> None:
    dtype = {"f32": F32, "s32": np.int32, "u32": U32, "b32": U32, "u64": U64}[kind]
    values = np.random.default_rng(0).integers(-1000, 1000, 96).astype(dtype)
    cell = np.full(1, values[0])
    bits = 8 * values.itemsize
    register = "%w2" if bits == 32 else "%d4"
    body = f"""ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; mov.u32 %w1, %tid.x;
        mad.wide.u32 %d1, %w1, {bits // 8}, %d1; ld.global.b{bits} {register}, [%d1]; setp.ne.u32 %p1, %w1, 0;
        @%p1 red.global.{operation}.{kind} [%d2], {register};"""
    run(kernel(body, 2), (1,), 96, [values, cell])
    assert cell[0] == function(values)  # type: ignore[operator]


def test_compare_and_swap_exchange_and_counters() -> None:
    body = """ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; mov.u32 %w1, %tid.x; mad.wide.u32 %d2, %w1, 4, %d2;
        {line} st.global.u32 [%d2], %w2;"""
    cases = {
        "atom.global.cas.b32 %w2, [%d1], %w1, 9;": (9, [0] + [9] * 31),
        "atom.global.exch.b32 %w2, [%d1], %w1;": (31, [0, *range(31)]),
        "atom.global.inc.u32 %w2, [%d1], 4;": (2, [i % 5 for i in range(32)]),
        "atom.global.gpu.relaxed.dec.u32 %w2, [%d1], 3;": (0, [(4 - i) % 4 for i in range(32)]),
    }
    for line, (last, old) in cases.items():
        cell, out = np.zeros(1, U32), np.zeros(32, U32)
        run(kernel(body.format(line=line), 2), (1,), 32, [cell, out])
        assert (cell[0], list(out)) == (last, old), line


COPY = """ld.param.u64 %d2, [p0]; mad.wide.u32 %d2, %w1, 16, %d2; mad.lo.u32 %w2, %w1, 16, %w4;
    cp.async.cg.shared.global [%w2], [%d2], 16, {size}; cp.async.commit_group; {wait} {barrier}
    xor.b32 %w5, %w1, 64; mad.lo.u32 %w5, %w5, 16, %w4; ld.shared.u32 %w3, [%w5+12];"""


def asynchronous(size: str = "16", wait: str = "cp.async.wait_group 0;", barrier: str = "bar.sync 0;") -> np.ndarray:
    source, out = np.arange(512, dtype=U32), np.zeros(128, U32)
    body = COPY.format(size=size, wait=wait, barrier=barrier)
    start = "mov.u32 %w1, %tid.x; mov.u32 %w4, buffer;"
    end = "ld.param.u64 %d1, [p1]; mad.wide.u32 %d1, %w1, 4, %d1; st.global.u32 [%d1], %w3;"
    report = run(kernel(f"{start} {body} {end}", 2, HEAD), (1,), 128, [source, out])
    assert report.load_sectors == (64 if size == "16" else 0)
    return out


def test_asynchronous_copies_arrive_with_their_wait() -> None:
    assert (asynchronous() == (np.arange(128) ^ 64) * 4 + 3).all()
    assert (asynchronous(wait="cp.async.wait_all;") == (np.arange(128) ^ 64) * 4 + 3).all()
    assert not asynchronous(size="0").any()


def test_a_missing_wait_or_barrier_is_noticed() -> None:
    with pytest.raises(Uninitialised):
        asynchronous(wait="")
    with pytest.raises(Uninitialised):
        asynchronous(wait="cp.async.wait_group 1;")
    with pytest.raises(SharedRace):
        asynchronous(barrier="")


def test_groups_complete_in_order() -> None:
    body = """ld.param.u64 %d1, [p0]; mov.u32 %w1, %tid.x; mov.u32 %w4, buffer; mad.lo.u32 %w2, %w1, 4, %w4;
        cvta.to.global.u64 %d1, %d1; st.shared.u32 [%w2], 7; st.shared.u32 [%w2+128], 7;
        cp.async.ca.shared.global [%w2], [%d1], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%w2+128], [%d1], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.u32 %w5, [%w2]; ld.shared.u32 %w6, [%w2+128];
        mad.lo.u32 %w5, %w6, 100, %w5;
        ld.param.u64 %d2, [p1]; mad.wide.u32 %d2, %w1, 4, %d2; st.global.u32 [%d2], %w5;"""
    out = np.zeros(32, U32)
    run(kernel(body, 2, HEAD), (1,), 32, [np.full(1, 3, U32), out])
    assert (out == 703).all()


def test_partial_sources_are_refused() -> None:
    with pytest.raises(Unsupported, match="partial"):
        asynchronous(size="8")


def test_packed_sixteen_bit_atomics() -> None:
    cell = np.zeros(1, U32)
    body = "red.global.add.noftz.bf16x2 [%d4], %w2;"
    text = f"ld.param.u64 %d4, [p0]; mov.u32 %w2, 0x3f804000; {body}"  # 2 and 1
    run(kernel(text, 1), (1,), 32, [cell])
    assert cell[0] == 0x42004280  # 32 and 64
