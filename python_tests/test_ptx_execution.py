"""Divergence, barriers, batches and counts of the executor."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import BarrierDivergence, Fault, Settings, Trap, Unsupported, run
from ptx.snippet import kernel, per_thread

U32 = np.uint32

COLLATZ = """mov.u32 {o0}, 0; mov.u32 %w1, {0};
    $loop: setp.eq.u32 %p1, %w1, 1; @%p1 bra $done;
    and.b32 %w2, %w1, 1; setp.eq.u32 %p2, %w2, 0; @%p2 bra $even;
    mad.lo.u32 %w1, %w1, 3, 1; bra.uni $next;
    $even: shr.u32 %w1, %w1, 1;
    $next: add.u32 {o0}, {o0}, 1; bra.uni $loop;
    $done:"""


def collatz(number: int) -> int:
    steps = 0
    while number != 1:
        number, steps = (3 * number + 1 if number % 2 else number // 2), steps + 1
    return steps


def test_every_thread_takes_its_own_path() -> None:
    values = np.arange(1, 201, dtype=U32)
    got, report = per_thread(COLLATZ, [values], [U32])
    assert list(got[0]) == [collatz(int(v)) for v in values]
    increments = next(i for i, ins in enumerate(report.instructions) if ins.text.startswith("add.u32"))
    assert report.counts[increments].threads == got[0].sum()
    assert report.counts[increments].warps < got[0].sum()  # together, not one by one


@pytest.mark.parametrize("lanes", [32, 64, 1 << 14])
def test_results_and_counts_do_not_depend_on_the_batch(lanes: int) -> None:
    values = np.arange(1, 1001, dtype=U32)
    got, report = per_thread(COLLATZ, [values], [U32], settings=Settings(most_lanes=lanes))
    reference, expected = per_thread(COLLATZ, [values], [U32])
    assert (got[0] == reference[0]).all()
    assert report.thread_instructions == expected.thread_instructions


def test_threads_rejoin_after_a_branch() -> None:
    body = """setp.lt.u32 %p1, {tid}, 7; @%p1 bra $left; mov.u32 %w1, 1; bra.uni $join; $left: mov.u32 %w1, 2;
              $join: vote.sync.ballot.b32 {o0}, %p1, -1; add.u32 {o0}, {o0}, %w1;"""
    got = per_thread(body, [np.zeros(32, U32)], [U32])[0][0]
    assert list(got) == [127 + 2] * 7 + [127 + 1] * 25


def barrier(body: str, threads: int = 64) -> None:
    run(kernel(f"mov.u32 %w1, %tid.x; {body}"), (3,), threads, [])


def test_barriers_that_all_threads_reach_are_passed() -> None:
    barrier("setp.lt.u32 %p1, %w1, 32; @%p1 bra $a; add.u32 %w2, %w1, 1; $a: bar.sync 0; bar.sync 0;")
    barrier("setp.lt.u32 %p1, %w1, 32; @%p1 bra $end; bar.sync 0; $end:")  # whole warps have left


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p1, %w1, 32; @%p1 bra $a; bar.sync 0; bra $end; $a: bar.sync 0; $end:",
        "setp.lt.u32 %p1, %w1, 16; @%p1 bra $end; bar.sync 0; $end:",
        "setp.lt.u32 %p1, %w1, 16; @%p1 bar.sync 0;",
    ],
)
def test_divergent_barriers_are_faults(body: str) -> None:
    with pytest.raises(BarrierDivergence):
        barrier(body)


def test_blocks_need_not_be_whole_warps() -> None:
    values = np.arange(45, dtype=U32)
    got, report = per_thread("bar.sync 0; add.u32 {o0}, {0}, 3;", [values], [U32])
    assert (got[0] == values + 3).all()
    add = next(i for i, ins in enumerate(report.instructions) if ins.text.startswith("add.u32"))
    assert (report.counts[add].threads, report.counts[add].warps) == (45, 2)


def test_a_loop_without_an_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptx import executor

    monkeypatch.setattr(executor, "PATIENCE", 100)
    with pytest.raises(Fault, match="no end in sight"):
        barrier("$a: bra $a;")


def test_traps_named_barriers_and_unknown_opcodes_are_refused() -> None:
    with pytest.raises(Trap):
        barrier("trap;")
    barrier("setp.gt.u32 %p1, %w1, 1000; @%p1 trap;")
    for line in ("bar.sync 1;", "bar.sync 0, 32;", "bar.red.popc.u32 %w2, 0, %p1;", "wmma.load.a.sync %w1, %w2;"):
        with pytest.raises(Unsupported):
            barrier(line)


def test_a_launch_must_fit_the_kernel() -> None:
    with pytest.raises(Fault, match="compiled for 64"):
        run(kernel("", directives=".reqntid 64"), (1,), 32, [])
    with pytest.raises(ValueError, match="2 arguments for the 1 parameters"):
        run(kernel("", 1), (1,), 32, [1, 2])
    with pytest.raises(ValueError, match="no CTA"):
        run(kernel(""), (0,), 32, [])


def test_counts_by_opcode_and_class() -> None:
    body = """ex2.approx.f32 {o0}, {0}; rcp.approx.f32 {o0}, {o0}; add.f32 {o0}, {o0}, {0}; bar.sync 0;"""
    _, report = per_thread(body, [np.ones(256, np.float32)], [np.float32])
    assert report.special == 512
    assert report.by_opcode()["add.f32"] == 256
    classes = report.by_class()
    assert (classes["load"], classes["store"], classes["special"], classes["barrier"]) == (256, 256, 512, 256)
    assert sum(classes.values()) == report.thread_instructions <= 32 * report.warp_instructions
    assert report.summary()["load_sectors"] == 32
