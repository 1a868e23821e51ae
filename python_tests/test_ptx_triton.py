"""Triton launches through the emulator: specialisation, targets, poison, agreement with a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx import OutOfBounds, Settings, Uninitialised
from ptx.compile import TARGETS, compile_triton
from ptx.triton_shim import Emulator

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def softmax_rows(X, OUT, BIAS, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + column, mask=column < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(tl.maximum(top, x), -3e38)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    most = tl.max(top, 0)
    z = tl.sum(total * tl.exp(top - most), 0)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + column, mask=column < V, other=0.0).to(tl.float32)
        p = tl.exp(x - most) / z
        if BIAS is not None:
            p += tl.load(BIAS + column, mask=column < V, other=0.0)
        tl.store(OUT + row * stride + column, p.to(OUT.dtype.element_ty), mask=column < V)


@triton.jit
def count_tokens(IDS, COUNTS, N, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(IDS + place, mask=place < N, other=0)
    tl.atomic_add(COUNTS + ids, 1, mask=place < N)


@triton.jit
def careless(X, OUT, V, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(OUT + column, tl.load(X + column) + 1.0, mask=column < V)


def softmax(
    emulator: Emulator, rows: int, width: int, dtype: torch.dtype, pitch: int | None = None, bias: bool = False
) -> None:
    """Runs softmax_rows on views of `pitch` columns and compares with float64."""
    pitch = pitch or width
    generator = torch.Generator().manual_seed(width)
    x = (4 * torch.randn(rows, pitch, generator=generator)).to(dtype)[:, :width]
    out = torch.empty(rows, pitch, dtype=dtype)[:, :width]
    added = torch.ones(width) if bias else None
    arguments: dict[str, Any] = {"X": x, "OUT": out, "BIAS": added, "stride": pitch, "V": width, "BLOCK": 1024}
    emulator.start(softmax_rows, (rows, 1, 1), arguments, OPTIONS)
    expected = x.double().softmax(-1) + (1 if bias else 0)
    tolerance = (
        torch.finfo(dtype).eps * expected / 2 + 3e-6 * expected + (2.0**-25 if dtype == torch.float16 else 1e-30)
    )
    assert ((out.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_a_row_kernel_on_every_target(target: int, dtype: torch.dtype) -> None:
    emulator = Emulator(target)
    with emulator.poison():
        softmax(emulator, 3, 2048, dtype)
        softmax(emulator, 2, 1, dtype)
        softmax(emulator, 2, 1023, dtype, pitch=1040, bias=True)
    whole = emulator.reports[0]
    ideal = 3 * 2048 * dtype.itemsize // 32
    assert (whole.load_sectors, whole.store_sectors) == (2 * ideal, ideal)
    assert whole.widths() == {"load": {16}, "store": {16}}
    assert emulator.reports[2].widths()["store"] == {dtype.itemsize}


def test_specialisation_is_that_of_the_jit() -> None:
    x = torch.zeros(4, 64)
    arguments = {"X": x, "OUT": x, "BIAS": None, "stride": 64, "V": 60, "BLOCK": 64}
    aligned = compile_triton(softmax_rows, arguments, OPTIONS, 90)
    assert aligned.runtime == ("X", "OUT", "stride", "V")
    assert "ld.global.v4" not in aligned.ptx
    assert "ld.global.v4" in compile_triton(softmax_rows, arguments | {"V": 64, "BLOCK": 1024}, OPTIONS, 90).ptx
    shifted = arguments | {"V": 64, "X": torch.zeros(65)[1:], "BLOCK": 1024}
    assert "ld.global.v4" not in compile_triton(softmax_rows, shifted, OPTIONS, 90).ptx
    assert compile_triton(softmax_rows, arguments | {"V": 1}, OPTIONS, 90).runtime == ("X", "OUT", "stride")
    again = compile_triton(softmax_rows, arguments | {"V": 76}, OPTIONS, 90)
    assert again is aligned  # 60 and 76 are specialised alike


def test_atomics_through_triton() -> None:
    emulator = Emulator(90)
    ids = torch.randint(0, 7, (1000,), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(7, dtype=torch.int32)
    emulator.start(count_tokens, (4, 1, 1), {"IDS": ids, "COUNTS": counts, "N": 1000, "BLOCK": 256}, OPTIONS)
    assert (counts == ids.bincount(minlength=7)).all()
    assert emulator.reports[0].atomic_sectors > 0


def test_a_missing_mask_and_an_unwritten_input_are_faults() -> None:
    emulator = Emulator(80)
    x, out = torch.zeros(100), torch.zeros(100)
    with pytest.raises(OutOfBounds, match="28 threads outside"):
        emulator.start(careless, (1, 1, 1), {"X": x, "OUT": out, "V": 100, "BLOCK": 128}, OPTIONS)
    with emulator.poison():
        unwritten, filled = torch.empty(128), torch.empty(128).fill_(2.0)
        emulator.start(careless, (1, 1, 1), {"X": filled, "OUT": unwritten, "V": 100, "BLOCK": 128}, OPTIONS)
        assert (unwritten[:100] == 3).all()
        with pytest.raises(Uninitialised):  # the last 28 are still unwritten
            emulator.start(careless, (1, 1, 1), {"X": unwritten, "OUT": filled, "V": 100, "BLOCK": 128}, OPTIONS)


def test_poison_reaches_into_custom_operators_and_sees_what_torch_writes() -> None:
    emulator = Emulator(90)

    @torch.library.custom_op("ptx_tests::add_one", mutates_args=())
    def add_one(x: torch.Tensor) -> torch.Tensor:
        scratch, out = torch.empty_like(x), x.new_empty(x.shape)
        if x[0] > 0:
            scratch.copy_(x)
        emulator.start(careless, (1, 1, 1), {"X": scratch, "OUT": out, "V": 128, "BLOCK": 128}, OPTIONS)
        return out

    originals = torch.empty_like, torch.Tensor.new_empty
    with emulator.poison():
        assert (add_one(torch.ones(128)) == 2).all()
        with pytest.raises(Uninitialised, match="X"):
            add_one(torch.zeros(128))
    assert (torch.empty_like, torch.Tensor.new_empty) == originals


def test_seeds_change_results_within_the_bound() -> None:
    results = []
    for seed in (0, 0, 1):
        emulator = Emulator(90, Settings(seed=seed))
        out = torch.empty(1, 512)
        x = torch.linspace(-4, 4, 512).reshape(1, 512)
        arguments = {"X": x, "OUT": out, "BIAS": None, "stride": 512, "V": 512, "BLOCK": 1024}
        emulator.start(softmax_rows, (1, 1, 1), arguments, OPTIONS)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[2], rtol=3e-6, atol=0)


def test_tensors_on_other_devices_are_refused() -> None:
    arguments = {"X": torch.zeros(8, device="meta"), "OUT": torch.zeros(8), "V": 8, "BLOCK": 8}
    with pytest.raises(ValueError, match="X is on meta"):
        Emulator(90).start(careless, (1, 1, 1), arguments, OPTIONS)


@pytest.mark.gpu
def test_the_emulator_agrees_with_this_gpu() -> None:
    major, minor = torch.cuda.get_device_capability()
    x = 4 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(1))
    out, expected = torch.empty_like(x), torch.empty_like(x, device="cuda")
    arguments: dict[str, Any] = {"BIAS": None, "stride": 5000, "V": 5000, "BLOCK": 1024}
    Emulator(10 * major + minor).start(softmax_rows, (8, 1, 1), {"X": x, "OUT": out, **arguments}, OPTIONS)
    softmax_rows[8, 1, 1](X=x.cuda(), OUT=expected, **arguments, **OPTIONS)
    torch.testing.assert_close(out, expected.cpu(), rtol=3e-6, atol=0)
