"""Top-k in CUDA C++: the launcher's own launches, executed as PTX, or on a GPU, against the definition in float64."""

from __future__ import annotations

import ctypes
import math

import cuda_topk
import pytest
import torch
from cuda_topk import Head, Kept, load_ratio, topk
from cuda_topk_oracle import assert_right, select
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ptx.harness import GPU, places
from torch import Tensor

from kdkernels import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.sample(4),
    pytest.mark.skipif(bool(cuda_topk.obstacle()), reason=cuda_topk.obstacle() or "can be had"),
]

INF, NAN = float("inf"), float("nan")
DTYPES = list(cuda_topk.DTYPES)
LENGTHS = (1, 2, 7, 9, 127, 129, 301, 2047, 4099)
ONE_BLOCK, MANY_BLOCKS = 1, 132
"""Multiprocessors: a row is one block's, or its share of 264 blocks'."""

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""It would take minutes in an emulator."""


def normal(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check(place: int | str, logits: Tensor, k: int, head: Head | None = None, multiprocessors: int = ONE_BLOCK) -> Kept:
    kept = topk(place, logits, k, head, multiprocessors=multiprocessors)
    assert_right(kept, logits, k, head)
    return kept


@pytest.fixture(params=places(80, 90))
def place(request: pytest.FixtureRequest) -> int | str:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.thin(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", LENGTHS)
def test_rows_of_any_length(place: int | str, width: int, dtype: torch.dtype) -> None:
    if place == 80 and dtype != DTYPES[width % 3]:
        return  # a dtype of each length is enough there
    for k in {1, min(width, 33), width}:
        check(place, normal(3, width, dtype, width), k)


@pytest.mark.parametrize("shift", range(1, 9))
def test_rows_that_begin_anywhere(shift: int) -> None:
    """Strides and offsets of any number of elements: vectors where there are boundaries, single entries before and
    after. What lies between two rows is a fault to read."""
    for dtype in (torch.bfloat16, torch.float32):
        whole = normal(4, 1100 + shift, dtype, shift)
        kept = check(90, whole[:, shift : 1000 + 2 * shift], 20)
        assert all(report.widths()["load"] <= {16, dtype.itemsize} for report in kept.reports)


def test_padding_columns_count_for_nothing(place: int | str) -> None:
    logits = normal(3, 1024, torch.bfloat16)
    logits[:, 1001:] = 100
    kept = topk(place, logits, 40, vocab=1001)
    assert_right(kept, logits[:, :1001], 40)


def hard_rows(width: int) -> Tensor:
    """Rows on which guesses from a sample or from digits go wrong."""
    index, coin = torch.arange(width), torch.rand(width, generator=torch.Generator().manual_seed(1)) < 0.5
    least = torch.finfo(torch.bfloat16).min
    rows = [
        torch.full((width,), 1.5),
        index / width * 10,
        -index / width * 10,
        coin.float(),
        torch.where(coin, 0.0, -0.0),
        (index % 97).float(),
        torch.where(index == width // 3, 20.0, -50.0),
        torch.where(index % 1000 == 999, index.float(), -INF),
        torch.where(index < 100, index.float(), least),
        torch.full((width,), least),
        normal(1, width)[0] * 1e37,
        torch.where(index % 8 < 1, 9 - index / width, index / width),
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("dtype", "k", "multiprocessors"),
    [
        (torch.float32, 64, ONE_BLOCK),
        (torch.bfloat16, 64, 600),
        (torch.float32, 1000, ONE_BLOCK),
        (torch.bfloat16, 4096, ONE_BLOCK),
    ],
    ids=str,
)
def test_hard_rows_stay_exact_and_read_once(dtype: torch.dtype, k: int, multiprocessors: int) -> None:
    logits = hard_rows(9221).to(dtype)
    kept = check(90, logits, k, multiprocessors=multiprocessors)
    assert len(kept.reports) == (1 if multiprocessors == ONE_BLOCK else 2)
    most = 1.07 if multiprocessors == ONE_BLOCK else 1.3  # odd rows: a warp asks for 17 sectors to get 16
    assert load_ratio(kept.reports, logits, 9221) < most


@pytest.mark.gpu
def test_hard_rows_on_a_gpu() -> None:
    for k in (64, 1000, 4096):
        check(GPU, hard_rows(151936).bfloat16(), k)


@pytest.mark.parametrize("multiprocessors", [ONE_BLOCK, MANY_BLOCKS])
def test_rows_without_a_distribution_are_nan_and_leave_others_alone(place: int | str, multiprocessors: int) -> None:
    logits = normal(9, 4200)
    logits[1, 7] = NAN
    logits[2, 4199] = INF
    logits[3] = -INF
    logits[4, :4190] = -INF  # ten entries, fewer than k
    logits[5, 5] = -NAN
    logits[6] = NAN
    logits[7, :50] = INF
    kept = check(place, logits, 16, Head(others=(2.0,), entropy=True), multiprocessors)
    bad = [1, 2, 3, 5, 6, 7]
    assert (kept.ids[bad] == -1).all()
    assert (kept.ids[4] == torch.tensor([*range(4190, 4200), *[-1] * 6])).all()
    for tensor in kept.tensors()[1:]:
        assert tensor is not None
        assert tensor[bad].isnan().all()
        assert not tensor[[0, 4, 8]].isnan().any()


@pytest.mark.parametrize("mass", [1e-3, 1e-12, 1e-30])
@pytest.mark.parametrize("multiprocessors", [ONE_BLOCK, MANY_BLOCKS])
def test_a_small_tail_keeps_its_digits(place: int | str, mass: float, multiprocessors: int) -> None:
    logits = normal(2, 5000)
    logits[:, 100:108] += 20 - math.log(mass)
    kept = topk(place, logits, 8, multiprocessors=multiprocessors)
    assert_right(kept, logits, 8)
    expected = select(logits, 8)["log_tail"]
    half_ulp = 2.0**-24 * expected.abs().max().item()
    assert (kept.log_tail.double() - expected).abs().max() < 1e-6 + 2 * half_ulp


HEADS = {
    "temperature": Head(temperature=0.05),
    "hot": Head(temperature=8.0, others=(1.0,), entropy=True),
    "entropy": Head(entropy=True),
    "cap": Head(softcap=30.0, temperature=1.5, entropy=True),
    "scale": Head(scale=-0.7, others=(0.9, 1.5)),
    "all": Head(torch.empty(0), 0.7, 30.0, 1.5, (0.9, 1.0, 2.0, 3.0, 5.0), True),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("multiprocessors", [ONE_BLOCK, MANY_BLOCKS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_heads_and_temperatures(name: str, dtype: torch.dtype, multiprocessors: int) -> None:
    head = HEADS[name]
    if head.bias is not None:
        head.bias = normal(1, 5003)[0]
    check(90, normal(2, 5003, dtype), 20, head, multiprocessors)


def test_a_soft_cap_makes_finite_numbers_of_infinite_ones(place: int | str) -> None:
    logits = normal(3, 777)
    logits[:, 5::7] = -INF
    logits[1, 700] = INF
    logits[2] = -INF
    kept = check(place, logits, 700, Head(softcap=5.0, others=(2.0,), entropy=True))
    assert (kept.ids >= 0).all()


@pytest.mark.parametrize("multiprocessors", [ONE_BLOCK, MANY_BLOCKS])
def test_what_has_no_mass_has_no_part_in_the_entropy(multiprocessors: int) -> None:
    logits = normal(4, 4999)
    logits[0, 9:] = -INF
    logits[1, 9:] = torch.finfo(torch.float32).min
    logits[2, 30:] = torch.finfo(torch.float32).min
    logits[3, ::2] = -INF
    check(90, logits, 20, Head(temperature=0.05, others=(0.5,), entropy=True), multiprocessors)


@pytest.mark.gpu
@pytest.mark.parametrize("name", HEADS)
def test_heads_on_a_gpu(name: str) -> None:
    head = HEADS[name]
    if head.bias is not None:
        head.bias = normal(1, 5003)[0]
    for rows in (2, 700):
        check(GPU, normal(rows, 5003, torch.bfloat16), 20, head)


def test_a_bias_between_16_byte_boundaries() -> None:
    shift = normal(1, 1200)[0]
    for offset in (1, 4):
        check(90, normal(2, 1000), 20, Head(bias=shift[offset:]))
        check(90, normal(2, 1008)[:, 3:], 20, Head(bias=shift[offset:]))


@pytest.mark.parametrize("target", [80, 90])
def test_offsets_beyond_2_to_the_31(target: int) -> None:
    stride = 2**31 + 64 + 1
    memory = torch.empty(stride + 3000, dtype=torch.bfloat16)  # pages that no one touches cost nothing
    logits = memory.as_strided((2, 3000), (stride, 1))
    logits.copy_(normal(2, 3000, torch.bfloat16))
    check(target, logits, 20, Head(entropy=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_on_a_gpu() -> None:
    logits = normal(1, 151936, torch.bfloat16).cuda().expand(15000, -1).contiguous()
    ids = torch.empty(15000, 8, dtype=torch.int32, device="cuda")
    numbers = torch.empty(15000, 8, device="cuda"), torch.empty(15000, device="cuda")
    torch.ops.kdkernels_C.topk_.default(logits, None, 1.0, 0.0, 1.0, 151936, 8, [], ids, *numbers, None, None)
    assert (ids == ids[0]).all()
    assert (ids[0].cpu() == select(logits[:1].cpu(), 8)["ids"][0]).all()


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    logits = normal(4, 50257).cuda()
    ids = torch.empty(4, 8, dtype=torch.int32, device="cuda")
    numbers = torch.empty(4, 8, device="cuda"), torch.empty(4, device="cuda")

    def call() -> None:
        torch.ops.kdkernels_C.topk_.default(logits, None, 1.0, 0.0, 1.0, 50257, 8, [], ids, *numbers, None, None)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    logits.copy_(normal(4, 50257, seed=1))
    graph.replay()
    torch.cuda.synchronize()
    assert (ids.cpu() == select(logits.cpu(), 8)["ids"]).all()


def _plan(rows: int, vocab: int, k: int, entropy: bool = False) -> list[cuda_topk.Launch]:
    side = cuda_topk._Side(1 << 20, vocab, None, 1.0, 0.0)
    none = ctypes.POINTER(ctypes.c_double)()
    call = cuda_topk._Call(side, 2, rows, vocab, k, 1.0, none, 0, 1, 1, 1, 1 if entropy else None, None)
    return cuda_topk.plan(call, 1 << 30, cuda_topk.MULTIPROCESSORS)


def test_few_rows_go_to_many_blocks_and_many_rows_to_one_each() -> None:
    one = _plan(1, 151936, 64)
    assert [launch.kernel for launch in one] == ["kd_topk_rows_bf16", "kd_topk_merge"]
    assert one[0].grid[1] >= 70  # a block takes 2048 entries at least
    assert _plan(30, 151936, 64)[0].grid == (30, 9, 1)
    assert [launch.grid for launch in _plan(512, 151936, 64)] == [(512, 1, 1)]
    assert [launch.grid for launch in _plan(1, 151936, 4096)] == [(1, 2, 1), (1, 1, 1)]
    names = [launch.kernel for launch in _plan(512, 151936, 64, entropy=True)]
    assert names == ["kd_topk_rows_bf16", "kd_topk_sums_bf16", "kd_topk_finish"]


def test_every_launch_is_one_that_cuda_takes() -> None:
    for rows, vocab, k in ((1, 1, 1), (1, 2**31 - 1, 4096), (2**31 - 1, 2048, 1), (3, 262144, 1024)):
        for launch in _plan(rows, vocab, k, entropy=True):
            x, y, z = launch.grid
            assert (1 <= x < 2**31, 1 <= y < 2**16, z) == (True, True, 1)
            assert launch.shared <= 96 * 1024


def test_the_leaf_is_registered_for_cuda_and_cpu_tensors_still_work() -> None:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels_C::topk_", key), key
    assert native.facts()["cuda_sources"].count("topk.cu") == 1
    logits = normal(3, 301)
    kept = Kept.empty(3, 5, Head())
    torch.ops.kdkernels_C.topk_.default(logits, None, 1.0, 0.0, 1.0, 301, 5, [], *kept.tensors())
    assert_right(kept, logits, 5)


def draw_case(data: st.DataObject) -> None:
    width, rows = data.draw(st.integers(1, 9000)), data.draw(st.integers(1, 3))
    k = data.draw(st.integers(1, min(width, data.draw(st.sampled_from([8, 300, 4096])))))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 999))
    start, gap = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    logits = normal(rows, start + width + gap, dtype, seed)[:, start : start + width]
    levels = data.draw(st.sampled_from([0, 1, 3, 50]))  # of rounded logits: ties
    if levels:
        logits.copy_((logits * levels / 10).round())
    if data.draw(st.booleans()):
        logits.copy_(logits.sort(dim=-1, descending=data.draw(st.booleans())).values)
    masked = data.draw(st.sampled_from([0.0, 0.1, 0.999]))
    logits.masked_fill_(torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < masked, -INF)
    head = Head(
        bias=normal(1, width, seed=seed + 1)[0] if data.draw(st.booleans()) else None,
        scale=data.draw(st.sampled_from([1.0, 0.3, -1.0])),
        softcap=data.draw(st.sampled_from([0.0, 50.0])),
        temperature=data.draw(st.sampled_from([0.05, 1.0, 8.0])),
        others=tuple(data.draw(st.sampled_from([(), (2.0,), (0.5, 1.0, 2.0, 3.0, 4.0)]))),
        entropy=data.draw(st.booleans()),
    )
    if masked and not head.softcap:
        head.scale = abs(head.scale)
    kept = topk(
        data.draw(st.sampled_from([80, 90])), logits, k, head, multiprocessors=data.draw(st.sampled_from([1, 9]))
    )
    assert_right(kept, logits, k, head, tolerance=3e-6)


@settings(max_examples=10, phases=NO_SHRINKING)
@given(st.data())
def test_random_calls(data: st.DataObject) -> None:
    draw_case(data)


@pytest.mark.soak
@settings(max_examples=200, phases=NO_SHRINKING)
@given(st.data())
def test_many_random_calls(data: st.DataObject) -> None:
    draw_case(data)
