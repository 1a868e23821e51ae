"""Registers, spills and occupancy from ptxas."""

from __future__ import annotations

import pytest
from ptx.snippet import kernel
from ptx.static_facts import StaticFacts, parse_log, ptxas, static_facts

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rows' for 'sm_90a'
ptxas info    : Function properties for rows
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4112 bytes smem, 544 bytes cmem[0]
"""


def test_the_log_is_read() -> None:
    facts = parse_log(LOG, 90)
    assert facts == StaticFacts(40, 12, 8, 16, 4112, 1, 90)
    assert facts.spills == 20
    with pytest.raises(RuntimeError, match="no register count"):
        parse_log("ptxas fatal", 90)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "target", "ctas"),
    [
        (32, 1024, 0, 90, 2),
        (33, 1024, 0, 90, 1),  # 40 registers a thread are given out: 1.6 CTAs
        (64, 512, 0, 90, 2),
        (65, 1024, 0, 90, 0),
        (255, 128, 0, 90, 2),
        (16, 32, 0, 90, 32),
        (32, 256, 100 * 1024, 90, 2),
        (32, 256, 100 * 1024, 80, 1),
        (32, 256, 227 * 1024, 90, 1),
        (32, 256, 164 * 1024, 80, 0),
    ],
)
def test_occupancy_by_the_scarcest_resource(registers: int, threads: int, shared: int, target: int, ctas: int) -> None:
    facts = StaticFacts(registers, 0, 0, 0, 0, 1, target)
    assert facts.ctas(threads, shared) == ctas
    assert facts.occupancy(threads, shared) == ctas * threads / 2048


@pytest.mark.skipif(ptxas(90) is None, reason="no ptxas here")
def test_facts_of_assembled_text() -> None:
    body = "ld.param.u64 %d1, [p0]; mov.u32 %w1, %tid.x; mad.wide.u32 %d1, %w1, 4, %d1; st.global.u32 [%d1], %w1;"
    facts = static_facts(kernel(body, 1, ".shared .align 16 .b8 buffer[256];"), 90)
    assert 4 <= facts.registers <= 16
    assert facts.spills == 0
    assert facts.target == 90
    with pytest.raises(RuntimeError, match="ptxas failed"):
        static_facts(kernel("frobnicate.u32 %w1, %w2;"), 90)
