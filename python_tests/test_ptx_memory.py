"""Global memory of the emulator: bounds, gaps, poison, alignment, sparse address space; sectors and widths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ptx import Misaligned, OutOfBounds, Uninitialised, Unsupported, Unwritten, WriteConflict, run
from ptx.snippet import kernel, per_thread

F32, U8, U32 = np.float32, np.uint8, np.uint32

# Thread i copies `bytes` at p0 + offset + i * step to p1 + i * bytes.
COPY = """ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; mov.u32 %w1, %tid.x;
    mad.wide.s32 %d1, %w1, {step}, %d1; mad.wide.s32 %d2, %w1, {size}, %d2;
    ld.global{vector} {registers}, [%d1+{offset}]; st.global{vector} [%d2], {registers};"""


def copy(source: Any, target: Any, *, step: int, offset: int = 0, words: int = 1, threads: int = 32) -> Any:
    registers = "%w2" if words == 1 else "{" + ", ".join(f"%w{i + 2}" for i in range(words)) + "}"
    vector = ".b32" if words == 1 else f".v{words}.b32"
    body = COPY.format(step=step, size=4 * words, vector=vector, registers=registers, offset=offset)
    return run(kernel(body, 2), (1,), threads, [source, target])


def test_vectors_of_four_words_are_copied_in_place() -> None:
    source, target = np.arange(128, dtype=U32), np.zeros(128, U32)
    report = copy(source, target, step=16, words=4)
    assert (target == source).all()
    assert report.widths() == {"load": {16}, "store": {16}}
    assert (report.load_sectors, report.store_sectors) == (16, 16)


@pytest.mark.parametrize("offset", [4, -4, 4096, 1 << 30])
def test_one_word_beyond_a_tensor_is_a_fault(offset: int) -> None:
    with pytest.raises(OutOfBounds, match=r"1 threads outside p0|32 threads outside p0"):
        copy(torch.zeros(32), np.zeros(32, U32), step=4, offset=offset)


def test_a_view_does_not_open_its_storage() -> None:
    storage = torch.zeros(64)
    with pytest.raises(OutOfBounds):
        copy(storage[:31], np.zeros(32, U32), step=4)
    with pytest.raises(OutOfBounds):
        copy(storage[8:40], np.zeros(32, U32), step=4, offset=-4)


def test_the_gap_between_rows_is_out_of_bounds() -> None:
    rows = torch.zeros(4, 16)[:, :8]
    copy(rows, np.zeros(8, U32), step=4, threads=8)
    with pytest.raises(OutOfBounds, match="gap"):
        copy(rows, np.zeros(32, U32), step=4, threads=9)
    with pytest.raises(OutOfBounds, match="gap"):
        copy(torch.zeros(64)[::2], np.zeros(2, U32), step=4, threads=2)


def test_unwritten_memory_may_be_written_then_read_but_not_read_first() -> None:
    body = """ld.param.u64 %d1, [p0]; mov.u32 %w1, %tid.x; mad.wide.s32 %d1, %w1, 4, %d1;
              {write} ld.global.b32 %w2, [%d1]; st.global.b32 [%d1], %w2;"""
    run(kernel(body.format(write="st.global.b32 [%d1], %w1;"), 1), (1,), 32, [Unwritten(np.zeros(32, U32))])
    for write in ("", "st.global.b16 [%d1], %h1;", "setp.lt.u32 %p1, %w1, 31; @%p1 st.global.b32 [%d1], %w1;"):
        with pytest.raises(Uninitialised):
            run(kernel(body.format(write=write), 1), (1,), 32, [Unwritten(np.zeros(32, U32))])


def test_threads_may_write_one_value_to_one_place_but_not_two() -> None:
    body = "ld.param.u64 %d1, [p0]; mov.u32 %w1, %tid.x; st.global.b32 [%d1], {value};"
    run(kernel(body.format(value=7), 1), (2,), 32, [np.zeros(1, U32)])
    with pytest.raises(WriteConflict):
        run(kernel(body.format(value="%w1"), 1), (2,), 32, [np.zeros(1, U32)])


def test_misaligned_accesses_are_faults() -> None:
    with pytest.raises(Misaligned):
        copy(np.zeros(64, U32), np.zeros(32, U32), step=4, offset=2)
    with pytest.raises(Misaligned):
        copy(np.zeros(256, U32), np.zeros(128, U32), step=16, words=4, offset=8)


def test_rows_beyond_two_to_the_thirty_first_elements() -> None:
    rows, stride, width = 3, (1 << 31) + 8, 32
    tensor = torch.empty(2 * stride + width, dtype=torch.bfloat16).as_strided((rows, width), (stride, 1))
    tensor.copy_(torch.arange(rows * width).view(rows, width))
    out = torch.zeros(rows, width, dtype=torch.bfloat16)
    body = f"""ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; mov.u32 %w1, %ctaid.x; mov.u32 %w2, %tid.x;
        cvt.u64.u32 %d3, %w1; mul.lo.s64 %d3, %d3, {2 * stride}; add.s64 %d1, %d1, %d3; mad.wide.u32 %d1, %w2, 2, %d1;
        mad.lo.s32 %w3, %w1, {width}, %w2; mad.wide.u32 %d2, %w3, 2, %d2;
        ld.global.b16 %h1, [%d1]; st.global.b16 [%d2], %h1;"""
    run(kernel(body, 2), (rows,), width, [tensor, out])
    assert (out == tensor).all()
    narrow = body.replace("add.s64 %d1", "cvt.u32.u64 %w4, %d3; cvt.u64.u32 %d3, %w4; add.s64 %d1")  # 32-bit offsets
    with pytest.raises(OutOfBounds):
        run(kernel(narrow, 2), (rows,), width, [tensor, out])


def test_byte_and_signed_loads_extend_into_wider_registers() -> None:
    body = """ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; mov.u32 %w1, %tid.x; cvt.u64.u32 %d3, %w1;
        add.s64 %d1, %d1, %d3; mad.wide.u32 %d2, %w1, 4, %d2; ld.global.{kind} %w2, [%d1]; st.global.b32 [%d2], %w2;"""
    source = np.arange(120, 152).astype(U8)
    for kind, expected in (("u8", source.astype(np.int64)), ("s8", source.view(np.int8).astype(np.int64))):
        out = np.zeros(32, np.int32)
        run(kernel(body.format(kind=kind), 2), (1,), 32, [source, out])
        assert (out == expected).all()


def test_sectors_are_counted_once_per_warp_request() -> None:
    source = np.zeros(4096, U32)
    sectors = {step: copy(source, np.zeros(32, U32), step=step).load_sectors for step in (0, 4, 8, 32, 64)}
    assert sectors == {0: 1, 4: 4, 8: 8, 32: 32, 64: 32}
    assert copy(source, np.zeros(64, U32), step=4, threads=64).load_sectors == 8
    assert copy(source, np.zeros(20, U32), step=4, threads=20).load_sectors == 3
    backwards = copy(source[100:], np.zeros(32, U32), step=-4, offset=124)
    assert backwards.load_sectors == 4


def test_a_shifted_view_costs_a_sector_more() -> None:
    whole = torch.zeros(64)
    assert copy(whole[0:32], np.zeros(32, U32), step=4).load_sectors == 4
    assert copy(whole[1:33], np.zeros(32, U32), step=4).load_sectors == 5


def test_guarded_accesses_count_only_threads_that_execute() -> None:
    body = """setp.lt.u32 %p1, {tid}, 10; mov.u32 {o0}, 7; @%p1 mov.u32 {o0}, {0};"""
    (values,), report = per_thread(body, [np.arange(32, dtype=U32)], [U32])
    assert list(values[8:12]) == [8, 9, 7, 7]
    move = next(i for i, ins in enumerate(report.instructions) if ins.guard == "%p1")
    assert (report.counts[move].threads, report.counts[move].warps) == (10, 1)


def test_generic_addresses_find_their_space() -> None:
    body = """cvta.to.global.u64 %d1, %d50; cvta.global.u64 %d2, %d1; ld.b32 %w1, [%d2]; ld.global.b32 %w2, [%d1];
              isspacep.global %p1, %d2; isspacep.shared %p2, %d2; selp.u32 {o1}, 1, 0, %p1;
              @%p2 mov.u32 {o1}, 9; sub.u32 {o0}, %w1, %w2;"""
    (difference, flag), _ = per_thread(body, [np.arange(32, dtype=U32)], [U32, U32])
    assert not difference.any()
    assert (flag == 1).all()


def test_module_constants_are_readable() -> None:
    head = ".global .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1};"
    out = np.zeros(2, U32)
    body = """ld.param.u64 %d1, [p0]; mov.u64 %d2, table; mov.u32 %w1, %tid.x; mad.wide.u32 %d2, %w1, 4, %d2;
              mad.wide.u32 %d1, %w1, 4, %d1; ld.global.b32 %w2, [%d2]; st.global.b32 [%d1], %w2;"""
    run(kernel(body, 1, head), (1,), 2, [out])
    assert list(out) == [1, 258]


def test_local_memory_is_private_and_bounded() -> None:
    body = """.local .align 4 .b8 mine[8]; mov.u32 %w1, mine; st.local.u32 [mine+4], {0}; st.local.u32 [mine], 5;
              ld.local.u32 {o0}, [%w1+4];"""
    values = np.arange(64, dtype=U32)
    assert (per_thread(body, [values], [U32])[0][0] == values).all()
    with pytest.raises(OutOfBounds):
        per_thread(body.replace("[%w1+4]", "[%w1+8]"), [values], [U32])


def test_tensors_elsewhere_and_unknown_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        copy(torch.zeros(4, device="meta"), np.zeros(4, U32), step=4)
    for line in ("ld.global.v2.b64.frobnicate {%d1, %d2}, [%d50];", "ld.global.b128 %d1, [%d50];", "tex.1d %w1, %w2;"):
        with pytest.raises(Unsupported):
            per_thread(line, [np.zeros(4, U32)], [U32])


def test_parameters_are_read_by_an_address_that_differs_between_threads() -> None:
    body = """mov.b64 %d1, p1; mov.u32 %w1, %tid.x; mul.wide.u32 %d2, %w1, 8; add.s64 %d1, %d1, %d2; {shift}
              {load}; ld.param.u64 %d3, [p0]; add.s64 %d3, %d3, %d2; st.global.u64 [%d3], %d4;"""
    load, out = "ld.param.u64 %d4, [%d1]", np.zeros(2, np.uint64)
    run(kernel(body.format(shift="", load=load), 3), (1,), 2, [out, 7, 11])
    assert out.tolist() == [7, 11]
    for shift, fault in (("add.s64 %d1, %d1, 8;", OutOfBounds), ("add.s64 %d1, %d1, 4;", Misaligned)):
        with pytest.raises(fault):
            run(kernel(body.format(shift=shift, load=load), 3), (1,), 2, [out, 7, 11])
    with pytest.raises(OutOfBounds):  # the address is one of parameters only
        run(kernel(body.format(shift="", load="ld.global.u64 %d4, [%d1]"), 3), (1,), 2, [out, 7, 11])
