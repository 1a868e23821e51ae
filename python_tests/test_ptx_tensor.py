"""mma.sync and ldmatrix against the ISA's tables of fragments, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import Divergence, Misaligned, Uninitialised, Unsupported, run
from ptx.snippet import kernel

LANES = range(32)
POINTERS = "mov.u32 %w60, %tid.x;" + "".join(
    f"ld.param.u64 %d{i}, [p{i}]; mad.wide.u32 %d{i}, %w60, {size}, %d{i};" for i, size in enumerate((16, 8, 16, 16))
)


def a_place(lane: int, i: int) -> tuple[int, int]:
    """Row and column of a_i, by the ISA's formulas for .m16n8k16."""
    row = lane >> 2 if i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (0 if i < 4 else 8)


def b_place(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", [8, 16])
def test_a_product(inner: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(inner)
    a, b = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((16, inner), (inner, 8)))
    c = torch.randn(16, 8, generator=draw)
    a_lanes = np.array([[bits(a)[a_place(lane, i)] for i in range(inner // 2)] for lane in LANES], np.uint16)
    b_lanes = np.array([[bits(b)[b_place(lane, i)] for i in range(inner // 4)] for lane in LANES], np.uint16)
    a_lanes, b_lanes = (np.pad(x, ((0, 0), (0, n - x.shape[1]))) for x, n in ((a_lanes, 8), (b_lanes, 4)))
    c_lanes = np.array([[c[c_place(lane, i)] for i in range(4)] for lane in LANES], np.float32)
    d_lanes, name = np.zeros_like(c_lanes), {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    registers = ("{%w1, %w2, %w3, %w4}", "{%w5, %w6}") if inner == 16 else ("{%w1, %w2}", "{%w5}")
    body = f"""{POINTERS} ld.global.v4.u32 {{%w1, %w2, %w3, %w4}}, [%d0]; ld.global.v2.u32 {{%w5, %w6}}, [%d1];
        ld.global.v4.u32 {{%w7, %w8, %w9, %w10}}, [%d2];
        mma.sync.aligned.m16n8k{inner}.row.col.f32.{name}.{name}.f32 {{%w7, %w8, %w9, %w10}}, {registers[0]},
            {registers[1]}, {{%w7, %w8, %w9, %w10}};
        st.global.v4.u32 [%d3], {{%w7, %w8, %w9, %w10}};"""
    run(kernel(body, 4), (1,), 32, [a_lanes, b_lanes, c_lanes, d_lanes])
    due = c.double() + a.double() @ b.double()
    for lane in LANES:
        for i in range(4):
            assert d_lanes[lane, i] == pytest.approx(float(due[c_place(lane, i)]), rel=1e-5, abs=1e-5)


MATRICES = "mov.u32 %w1, %tid.x; mov.u32 %w4, buffer; mad.lo.u32 %w2, %w1, 16, %w4; mov.u32 %w5, %w1;"
PAIR = "mad.lo.u32 %w1{i}, %w5, 8, {first}; mad.lo.u32 %w2{i}, %w1{i}, 65536, 65536; add.u32 %w1{i}, %w1{i}, %w2{i};"
FILL = "".join(PAIR.format(i=i, first=2 * i) for i in range(4))
FILL += "st.shared.v4.u32 [%w2], {%w10, %w11, %w12, %w13}; bar.sync 0;"
"""Row i of the four matrices holds 8 i .. 8 i + 7."""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(transposed: bool) -> None:
    out, trans = np.zeros((32, 4, 2), np.uint16), ".trans" * transposed
    body = f"""{MATRICES} {FILL} ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%w30, %w31, %w32, %w33}}, [%w2];
        ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %w1, 16, %d1; st.global.v4.u32 [%d1], {{%w30, %w31, %w32, %w33}};"""
    run(kernel(body, 1, ".shared .align 16 .b8 buffer[512];"), (1,), 32, [out])
    stored = np.arange(256).reshape(4, 8, 8)
    for lane in LANES:
        for k in range(4):
            for j in range(2):
                place = (lane // 4, 2 * (lane % 4) + j)
                assert out[lane, k, j] == stored[k][place[::-1] if transposed else place]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%w3}, [%w2];", Uninitialised),
        (f"{FILL} add.u32 %w2, %w2, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%w3}}, [%w2];", Misaligned),
        (f"{FILL} setp.lt.u32 %p1, %w1, 16; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%w3}}, [%w2];", Divergence),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%w1}, {%w2}, {%w3}, {%w4};", Unsupported),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%w1}, {%w2}, {%w3}, {%w4};", Unsupported),
    ],
)
def test_misuse(body: str, fault: type[Exception]) -> None:
    with pytest.raises(fault):
        run(kernel(f"{MATRICES} {body}", 0, ".shared .align 16 .b8 buffer[520];"), (1,), 32, [])
