"""Clusters, mbarriers and bulk copies: a kernel that keeps rows on chip, and what happens when a piece is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import BarrierDivergence, Fault, Misaligned, OutOfBounds, SharedRace, Uninitialised, Unsupported, run
from ptx.snippet import kernel
from ptx.triton_shim import Emulator

F32, U32 = np.float32, np.uint32

# Each CTA of a pair copies its half of a row into shared memory, sums it, gives its part to both CTAs, adds the parts,
# scales its half in place and copies it back.
PAIR = """
    mov.u32 %w1, %tid.x; mov.u32 %w2, %cluster_ctarank; mov.u32 %w3, %ctaid.x; shr.u32 %w4, %w3, 1;
    ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; mul.wide.u32 %d3, %w3, 512; add.s64 %d1, %d1, %d3;
    setp.ne.u32 %p1, %w1, 0; @%p1 bra $ready;
    mbarrier.init.shared::cta.b64 [full], 1; fence.mbarrier_init.release.cluster;
    $ready: {ready}
    @%p1 bra $wait;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {expect};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [half], [%d1], {bytes}, [full];
    $wait: {wait}
    mov.u32 %w5, half; mad.lo.u32 %w5, %w1, 4, %w5; ld.shared.f32 %w6, [%w5];
    shfl.sync.bfly.b32 %w7, %w6, 16, 31, -1; add.f32 %w8, %w6, %w7;
    shfl.sync.bfly.b32 %w7, %w8, 8, 31, -1; add.f32 %w8, %w8, %w7;
    shfl.sync.bfly.b32 %w7, %w8, 4, 31, -1; add.f32 %w8, %w8, %w7;
    shfl.sync.bfly.b32 %w7, %w8, 2, 31, -1; add.f32 %w8, %w8, %w7;
    shfl.sync.bfly.b32 %w7, %w8, 1, 31, -1; add.f32 %w8, %w8, %w7;
    and.b32 %w9, %w1, 31; setp.ne.u32 %p2, %w9, 0; shr.u32 %w10, %w1, 5; mov.u32 %w11, parts;
    mad.lo.u32 %w12, %w2, 4, %w10; mad.lo.u32 %w12, %w12, 4, %w11;
    mapa.shared::cluster.u32 %w13, %w12, 0; mapa.shared::cluster.u32 %w14, %w12, 1;
    @%p2 bra $given; st.shared::cluster.f32 [%w13], %w8; st.shared::cluster.f32 [%w14], %w8;
    $given: {given}
    ld.shared.v4.f32 {{%w15, %w16, %w17, %w18}}, [parts]; ld.shared.v4.f32 {{%w19, %w20, %w21, %w22}}, [parts+16];
    add.f32 %w15, %w15, %w16; add.f32 %w17, %w17, %w18; add.f32 %w19, %w19, %w20; add.f32 %w21, %w21, %w22;
    add.f32 %w15, %w15, %w17; add.f32 %w19, %w19, %w21; add.f32 %w15, %w15, %w19;
    mul.f32 %w6, %w6, %w15; st.shared.f32 [%w5], %w6; {fence} bar.sync 0;
    @%p1 bra $end;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [half], 512; {commit}
    mul.wide.u32 %d4, %w4, 4; add.s64 %d2, %d2, %d4; setp.ne.u32 %p3, %w2, 0; @%p3 bra $end; st.global.f32 [%d2], %w15;
    $end:
"""
HEAD = ".shared .align 16 .b8 half[512]; .shared .align 16 .b8 parts[32]; .shared .align 8 .b64 full;"
WHOLE = {
    "ready": "bar.sync 0;",
    "expect": 512,
    "bytes": 512,
    "wait": "mbarrier.try_wait.parity.shared::cta.b64 %p4, [full], 0; @!%p4 bra $wait;",
    "given": "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
    "fence": "fence.proxy.async.shared::cta;",
    "commit": "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;",
}


def pair(rows: int = 3, **changes: object) -> None:
    """Runs the kernel with some pieces changed and checks its results."""
    generator = np.random.default_rng(0)
    x = generator.integers(-8, 8, (rows, 256)).astype(F32)
    expected, sums = x * x.sum(1, keepdims=True), np.zeros(rows, F32)
    total = x.sum(1)
    text = kernel(PAIR.format(**(WHOLE | changes)), 2, HEAD, ".explicitcluster .reqnctapercluster 2")
    report = run(text, (2 * rows,), 128, [x, sums])
    assert (sums == total).all()
    assert (x == expected).all()
    assert (report.load_sectors, report.store_sectors) == (rows * 32, rows * 32 + rows)


def test_a_row_kept_on_chip_by_a_pair_of_ctas() -> None:
    pair()


ONE_WAITS = "@%p1 bra $on; $again: mbarrier.try_wait.parity.shared.b64 %p4, [full], 0; @!%p4 bra $again; $on:"


@pytest.mark.parametrize(
    ("piece", "instead", "fault"),
    [
        ("wait", "", Uninitialised),
        ("wait", ONE_WAITS, SharedRace),
        ("ready", "", SharedRace),
        ("given", "", SharedRace),
        ("given", "bar.sync 0;", SharedRace),
        ("given", "barrier.cluster.arrive.aligned;", SharedRace),
        ("given", "barrier.cluster.wait.aligned;", BarrierDivergence),
        ("fence", "", SharedRace),
        ("commit", "", Fault),
        ("commit", "cp.async.bulk.commit_group;", Fault),
        ("expect", 528, BarrierDivergence),
        ("bytes", 504, Misaligned),
        ("bytes", 1024, OutOfBounds),
    ],
)
def test_a_missing_piece_is_noticed(piece: str, instead: object, fault: type[Exception]) -> None:
    with pytest.raises(fault):
        pair(**{piece: instead})


def test_a_wait_by_one_thread_and_a_barrier_serve_all() -> None:
    pair(wait=f"{ONE_WAITS} bar.sync 0;")


def exchange(barrier: str) -> None:
    """Every thread reads its neighbour's word in the other CTA, then may leave."""
    out = np.zeros(128, U32)
    body = f"""mov.u32 %w1, %tid.x; mov.u32 %w2, %cluster_ctarank; mov.u32 %w3, half; mad.lo.u32 %w3, %w1, 4, %w3;
        mad.lo.u32 %w4, %w2, 64, %w1; st.shared.u32 [%w3], %w4; barrier.cluster.arrive; barrier.cluster.wait;
        xor.b32 %w5, %w2, 1; mapa.shared::cluster.u32 %w6, %w3, %w5; ld.shared::cluster.u32 %w7, [%w6]; {barrier}
        getctarank.shared::cluster.u32 %w8, %w6; sub.u32 %w8, %w8, %w5; add.u32 %w7, %w7, %w8;
        ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %w4, 4, %d1; st.global.u32 [%d1], %w7;"""
    run(kernel(body, 1, HEAD, ".reqnctapercluster 2"), (2,), 64, [out])
    assert (out == (np.arange(128) + 64) % 128).all()


def test_a_cta_may_not_leave_while_its_memory_is_read() -> None:
    exchange("barrier.cluster.arrive; barrier.cluster.wait;")
    with pytest.raises(SharedRace, match="may leave"):
        exchange("")


def test_stores_that_complete_on_a_remote_mbarrier() -> None:
    out = np.zeros(64, U32)
    body = """mov.u32 %w1, %tid.x; mov.u32 %w2, %cluster_ctarank; xor.b32 %w3, %w2, 1; setp.ne.u32 %p1, %w1, 0;
        @!%p1 mbarrier.init.shared.b64 [full], 1; @!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [full], 128;
        barrier.cluster.arrive; barrier.cluster.wait;
        mov.u32 %w4, half; mad.lo.u32 %w5, %w1, 4, %w4; mapa.shared::cluster.u32 %w6, %w5, %w3; mov.u32 %w7, full;
        mapa.shared::cluster.u32 %w8, %w7, %w3; mad.lo.u32 %w9, %w2, 100, %w1;
        st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%w6], %w9, [%w8];
        $wait: mbarrier.try_wait.parity.shared.b64 %p2, [full], 0; @!%p2 bra $wait;
        ld.shared.u32 %w10, [%w5]; mad.lo.u32 %w11, %w2, 32, %w1; ld.param.u64 %d1, [p0];
        mad.wide.u32 %d1, %w11, 4, %d1; st.global.u32 [%d1], %w10;"""
    run(kernel(body, 1, HEAD, ".reqnctapercluster 2"), (2,), 32, [out])
    assert list(out) == [*range(100, 132), *range(32)]


def test_warps_hand_work_over_through_phases_of_an_mbarrier() -> None:
    """Warp 0 produces four times, warp 1 consumes; tokens and parities."""
    out = np.zeros(32, U32)
    body = """mov.u32 %w1, %tid.x; and.b32 %w2, %w1, 31; mov.u32 %w4, half; mad.lo.u32 %w4, %w2, 4, %w4;
        setp.eq.u32 %p1, %w1, 0; @%p1 mbarrier.init.shared.b64 [full], 32; @%p1 mbarrier.init.shared.b64 [parts], 32;
        bar.sync 0; setp.ge.u32 %p2, %w1, 32; mov.u32 %w5, 0; mov.u32 %w6, 0; @%p2 bra $consume;
        $produce: mad.lo.u32 %w7, %w5, 10, %w2; st.shared.u32 [%w4], %w7;
        {arrive} and.b32 %w8, %w5, 1;
        $empty: mbarrier.try_wait.parity.shared.b64 %p3, [parts], %w8; @!%p3 bra $empty;
        add.u32 %w5, %w5, 1; setp.lt.u32 %p4, %w5, 4; @%p4 bra $produce; bra.uni $end;
        $consume: and.b32 %w8, %w5, 1;
        $full: mbarrier.test_wait.parity.shared.b64 %p3, [full], %w8; @!%p3 bra $full;
        ld.shared.u32 %w7, [%w4]; add.u32 %w6, %w6, %w7; mbarrier.arrive.shared.b64 %d2, [parts];
        add.u32 %w5, %w5, 1; setp.lt.u32 %p4, %w5, 4; @%p4 bra $consume;
        ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %w2, 4, %d1; st.global.u32 [%d1], %w6;
        $end:"""
    run(kernel(body.format(arrive="mbarrier.arrive.shared.b64 %d2, [full];"), 1, HEAD), (1,), 64, [out])
    assert (out == 4 * np.arange(32) + 60).all()
    with pytest.raises(BarrierDivergence, match="never ends"):
        run(kernel(body.format(arrive=""), 1, HEAD), (1,), 64, [out])


def test_what_is_not_known_of_them_is_refused() -> None:
    for line in (
        "mbarrier.arrive_drop.shared.b64 %d1, [full];",
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [half], [%d1, {%w1}], [full];",
        "cp.async.bulk.prefetch.L2.global [%d1], 16;",
        "cp.async.mbarrier.arrive.shared.b64 [full];",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%d1], [half], 16;",
    ):
        with pytest.raises(Unsupported):
            run(kernel(line, 0, HEAD), (1,), 32, [])
    with pytest.raises(Fault, match="no mbarrier"):
        run(kernel("mbarrier.arrive.shared.b64 %d1, [full];", 0, HEAD), (1,), 32, [])


@pytest.mark.parametrize("ctas", [2, 4])
def test_a_triton_kernel_on_a_cluster(ctas: int) -> None:
    pytest.importorskip("triton")
    from test_ptx_triton import OPTIONS, softmax_rows

    x, out = torch.randn(3, 6000, generator=torch.Generator().manual_seed(0)), torch.empty(3, 6000)
    arguments = {"X": x, "OUT": out, "BIAS": None, "stride": 6000, "V": 6000, "BLOCK": 4096}
    emulator = Emulator(90)
    emulator.start(softmax_rows, (3, 1, 1), arguments, OPTIONS | {"num_ctas": ctas})
    torch.testing.assert_close(out, x.softmax(-1), rtol=3e-6, atol=0)
    assert emulator.compiled[0].cluster == ctas
    assert emulator.reports[0].load_sectors == 2 * 3 * 6000 * 4 // 32
