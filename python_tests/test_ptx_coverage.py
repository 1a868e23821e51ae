"""Triton programs of many kinds compiled for every target and executed: what row kernels may come to use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx import Unsupported
from ptx.compile import TARGETS
from ptx.triton_shim import Emulator

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
N = 512


@triton.jit
def elementwise(X, Y, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(OUT + i, libdevice.tanh(x))
    tl.store(OUT + N + i, tl.sigmoid(x) + tl.sqrt(tl.abs(y)) + tl.rsqrt(tl.abs(y) + 1))
    tl.store(OUT + 2 * N + i, libdevice.log1p(tl.abs(x)) * libdevice.expm1(y))
    tl.store(OUT + 3 * N + i, tl.sin(x) + tl.cos(y))
    tl.store(OUT + 4 * N + i, tl.floor(x) + tl.ceil(y) + libdevice.rint(x) + libdevice.trunc(y))
    tl.store(OUT + 5 * N + i, tl.erf(x) / (tl.exp(y) + 1))
    tl.store(OUT + 6 * N + i, tl.clamp(x, -1.0, 1.0) + tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(OUT + 7 * N + i, tl.div_rn(x, tl.abs(y) + 1) + tl.sqrt_rn(tl.abs(x)) + tl.fma(x, y, x))
    tl.store(OUT + 8 * N + i, libdevice.pow(tl.abs(x) + 0.5, y))


@triton.jit
def collective(X, OUT, IDX, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(OUT + i, tl.cumsum(x, 0))
    tl.store(OUT + N + i, tl.sort(x))
    tl.store(IDX + i, tl.zeros_like(i) + tl.argmax(x, 0))
    tl.store(IDX + N + i, tl.zeros_like(i) + tl.argmin(x, 0))
    tl.store(IDX + 2 * N + i, tl.zeros_like(i) + tl.sum((x > 0).to(tl.int32), 0))
    tl.store(IDX + 3 * N + i, tl.flip(i))
    counts = tl.histogram((i * i) % 16, 16)
    tl.store(IDX + 4 * N + tl.arange(0, 16), counts)


@triton.jit
def transposed(X, OUT, A: tl.constexpr, B: tl.constexpr):
    rows, columns = tl.arange(0, A), tl.arange(0, B)
    x = tl.load(X + rows[:, None] * B + columns[None, :])
    tl.store(OUT + columns[:, None] * A + rows[None, :], tl.trans(x) + tl.sum(x, 0)[:, None] + tl.max(x, 1)[None, :])


@triton.jit
def integers(A, B, OUT, OUT64, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(A + i), tl.load(B + i)
    tl.store(OUT + i, a // b)
    tl.store(OUT + N + i, a % b)
    tl.store(OUT + 2 * N + i, (a << (b & 31)) ^ (a >> (b & 7)))
    tl.store(OUT + 3 * N + i, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32))
    tl.store(OUT + 4 * N + i, tl.where(a > b, a & b, a | b))
    tl.store(OUT + 5 * N + i, a.to(tl.float32).to(tl.int32, bitcast=True))
    tl.store(OUT64 + i, a.to(tl.int64) * b.to(tl.int64) // 7)
    tl.store(OUT64 + N + i, (a.to(tl.int64) << 20) % (tl.abs(b).to(tl.int64) + 1))


@triton.jit
def narrow(X, B16, F16, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    x, b, f = tl.load(X + i), tl.load(B16 + i), tl.load(F16 + i)
    tl.store(OUT + i, (b + b * b).to(tl.float32) + (f - f * f).to(tl.float32))
    tl.store(OUT + N + i, tl.maximum(b, -b).to(tl.float32) + tl.where(f > 0, f, 0.0).to(tl.float32))
    tl.store(OUT + 2 * N + i, x.to(tl.bfloat16).to(tl.float32) + x.to(tl.float16).to(tl.float32))
    tl.store(OUT + 3 * N + i, tl.exp(b.to(tl.float32)) * f)
    tl.store(OUT + 4 * N + i, tl.sum(b.to(tl.float32), 0) + tl.max(f, 0))


@triton.jit
def doubles(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(OUT + i, tl.exp(x))
    tl.store(OUT + N + i, tl.log(tl.abs(x) + 1) / (x * x + 1) + tl.sqrt(tl.abs(x)))
    tl.store(OUT + 2 * N + i, tl.sum(x, 0) + x)


@triton.jit
def atomics(F, I, L, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    place = tl.program_id(0) * N + i
    tl.atomic_add(F + i % 3, 1.0)
    tl.atomic_max(I + i % 5, place)
    tl.atomic_min(I + 8 + i % 5, -place)
    tl.atomic_xor(I + 16 + i * 0, place)
    tl.store(OUT + place, tl.atomic_add(L + i * 0, 1))
    if tl.atomic_cas(I + 24, 0, 1) == 0:
        tl.store(I + 25, 7)


@triton.jit
def tensor_core(X, OUT, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(X + o)
    tl.store(OUT + o, tl.dot(x, x))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=TARGETS)
def emulator(request: pytest.FixtureRequest) -> Emulator:
    return Emulator(request.param)


def start(emulator: Emulator, kernel: Any, grid: int = 1, **arguments: Any) -> None:
    emulator.start(kernel, (grid, 1, 1), arguments, OPTIONS)


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_elementwise_functions(emulator: Emulator) -> None:
    x, y, out = 2 * normal(N), normal(N, 1), torch.empty(9, N)
    start(emulator, elementwise, X=x, Y=y, OUT=out, N=N)
    a, b = x.double(), y.double()
    expected = [
        a.tanh(),
        a.sigmoid() + b.abs().sqrt() + (b.abs() + 1).rsqrt(),
        a.abs().log1p() * b.expm1(),
        a.sin() + b.cos(),
        a.floor() + b.ceil() + a.round() + b.trunc(),
        a.erf() / (b.exp() + 1),
        a.clamp(-1, 1) + torch.minimum(a, b),
        a / (b.abs() + 1) + a.abs().sqrt() + (a * b + a),
        (a.abs() + 0.5) ** b,
    ]
    for got, want in zip(out, expected, strict=True):
        close(got, want, 2e-6)


def test_scans_sorts_and_reductions(emulator: Emulator) -> None:
    x, out, index = normal(N), torch.empty(2, N), torch.zeros(5, N, dtype=torch.int32)
    start(emulator, collective, X=x, OUT=out, IDX=index, N=N)
    close(out[0], x.double().cumsum(0), 1e-5)
    assert (out[1] == x.sort().values).all()
    assert (index[0] == x.argmax()).all()
    assert (index[1] == x.argmin()).all()
    assert (index[2] == (x > 0).sum()).all()
    assert (index[3] == torch.arange(N).flip(0)).all()
    assert (index[4, :16] == (torch.arange(N) ** 2 % 16).bincount(minlength=16)).all()


def test_transposition_through_shared_memory(emulator: Emulator) -> None:
    x = normal(64 * 32).view(64, 32)
    out = torch.empty(32, 64)
    start(emulator, transposed, X=x, OUT=out, A=64, B=32)
    close(out, x.T + x.sum(0)[:, None] + x.max(1).values[None, :], 1e-5)
    assert emulator.reports[0].by_class()["barrier"] > 0


def test_integer_arithmetic(emulator: Emulator) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(1 << 30), 1 << 30, (N,), generator=generator, dtype=torch.int32)
    b = torch.randint(1, 1000, (N,), generator=generator, dtype=torch.int32) * (2 * torch.randint(0, 2, (N,)) - 1).int()
    out, wide = torch.empty(6, N, dtype=torch.int32), torch.empty(2, N, dtype=torch.int64)
    start(emulator, integers, A=a, B=b, OUT=out, OUT64=wide, N=N)
    x, y = a.long(), b.long()
    assert (out[0] == torch.div(x, y, rounding_mode="trunc")).all()
    assert (out[1] == torch.fmod(x, y)).all()
    shifted = (x << (y & 31)).int() ^ (a >> (b & 7))
    assert (out[2] == shifted).all()
    products = [(p % 2**32) * (q % 2**32) >> 32 for p, q in zip(x.tolist(), y.tolist(), strict=True)]
    assert [value % 2**32 for value in out[3].tolist()] == products
    assert (out[4] == torch.where(a > b, a & b, a | b)).all()
    assert (out[5] == a.float().view(torch.int32)).all()
    assert (wide[0] == torch.div(x * y, 7, rounding_mode="trunc")).all()
    assert (wide[1] == torch.fmod(x << 20, y.abs() + 1)).all()


def test_sixteen_bit_arithmetic(emulator: Emulator) -> None:
    x, b, f = normal(N), normal(N, 1).bfloat16(), normal(N, 2).half()
    out = torch.empty(5, N)
    start(emulator, narrow, X=x, B16=b, F16=f, OUT=out, N=N)
    close(out[0], (b + b * b).double() + (f - f * f).double(), 3e-2)
    close(out[1], b.abs().double() + f.clamp(min=0).double(), 0)
    close(out[2], x.bfloat16().double() + x.half().double(), 1e-7)
    close(out[3], b.double().exp() * f.double(), 1e-6)
    close(out[4], (b.double().sum() + f.max().double()).expand(N), 1e-5)


def test_float64(emulator: Emulator) -> None:
    x, out = normal(N).double(), torch.empty(3, N, dtype=torch.float64)
    start(emulator, doubles, X=x, OUT=out, N=N)
    close(out[0], x.exp(), 1e-14)
    close(out[1], (x.abs() + 1).log() / (x * x + 1) + x.abs().sqrt(), 1e-14)
    close(out[2], x.sum() + x, 1e-12)


def test_atomics_across_programs(emulator: Emulator) -> None:
    floats, ints = torch.zeros(3), torch.zeros(32, dtype=torch.int32)
    long, out = torch.zeros(1, dtype=torch.int64), torch.empty(4 * N, dtype=torch.int64)
    start(emulator, atomics, 4, F=floats, I=ints, L=long, OUT=out, N=N)
    places = torch.arange(4 * N)
    assert floats.tolist() == [4.0 * len(range(k, N, 3)) for k in range(3)]
    assert ints[:5].tolist() == [int(places[places % N % 5 == k].max()) for k in range(5)]
    assert ints[8:13].tolist() == [-int(places[places % N % 5 == k].max()) for k in range(5)]
    assert ints[24:26].tolist() == [1, 7]
    assert long.item() == 4 * N
    assert (out.sort().values == places).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_of_warps(dtype: torch.dtype) -> None:
    """Triton's product for sm_80: ldmatrix, plain and transposed, and mma."""
    emulator = Emulator(80)
    x, out = normal(64 * 64).view(64, 64).to(dtype), torch.empty(64, 64)
    start(emulator, tensor_core, X=x, OUT=out, N=64)
    assert {"ldmatrix", "mma"} <= {name.split(".")[0] for name in emulator.reports[0].by_opcode()}
    close(out, x.double() @ x.double(), 1e-5)


@pytest.mark.parametrize("target", [90, 100])
def test_tensor_cores_of_more_than_a_warp_are_refused(target: int) -> None:
    x = normal(64 * 64).view(64, 64).half()
    with pytest.raises(Unsupported, match=r"wgmma|tcgen"):
        start(Emulator(target), tensor_core, X=x, OUT=torch.empty(64, 64), N=64)
