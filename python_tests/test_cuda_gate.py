"""The gate in CUDA C++: the launches of the native launcher, executed as PTX or on a GPU, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_gate import GPU, H100, Machine, gate, load_ratio, obstacle
from gate_oracle import Call, Decision, assert_right
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ptx import Report
from ptx.harness import places
from torch import Tensor

from kdkernels import native
from kdkernels.ops.rows import Side

pytestmark = [
    pytest.mark.slow,
    pytest.mark.sample(16),
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "can be had"),
]

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 7, 127, 129, 301, 2049, 5003)
FEW_BLOCKS = Machine(1, 50 * 2**20)
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""It would take minutes in an emulator."""
LAST = 1 - 2.0**-53


@pytest.fixture(params=places(80, 90))
def place(request: pytest.FixtureRequest) -> int | str:
    return request.param  # type: ignore[no-any-return]


def normal(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def pair(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A student and a teacher that resemble each other."""
    student = normal(rows, width, dtype, seed)
    return student, (0.8 * student.float() + 0.5 * normal(rows, width, seed=seed + 1)).to(dtype)


def draws(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call(student: Tensor | Side, teacher: Tensor | Side, threshold: float | Tensor = 0.2, **options: Any) -> Call:
    """Uniform numbers are drawn unless given; None is greedy."""
    sides = [Side(x) if isinstance(x, Tensor) else x for x in (student, teacher)]
    rows = len(sides[0].x)
    bits = threshold if isinstance(threshold, Tensor) else torch.full((rows,), threshold, dtype=torch.float64)
    return Call(*sides, bits, **{"uniforms": draws(rows), **options})


def check(place: int | str, given_: Call, machine: Machine = FEW_BLOCKS) -> Decision:
    found = gate(place, given_, machine)
    assert_right(found, given_)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", LENGTHS)
def test_rows_of_any_length(place: int | str, width: int, dtype: torch.dtype) -> None:
    student, teacher = pair(4, width, dtype, width)
    for machine in (FEW_BLOCKS, H100):
        found = check(place, call(student, teacher, torch.tensor([-1.0, 2.0, 0.05, 0.4], dtype=torch.float64)), machine)
        assert found.from_teacher[:2].tolist() == [True, False]
    check(place, call(student, teacher, uniforms=None))


@pytest.mark.parametrize("shift", range(1, 9))
def test_rows_that_begin_anywhere(shift: int) -> None:
    """What lies between two rows is a fault to read. Vectors where both sides' lie side by side."""
    for dtype, other in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        a, b = normal(3, 1100 + shift, dtype, shift), normal(3, 1100 + shift, other, shift + 50)
        student = a[:, shift : 1000 + 2 * shift]
        for teacher in (b[:, shift : 1000 + 2 * shift], b[:, 1 : 1001 + shift]):
            check(90, call(student, teacher))
            check(90, call(student, teacher, top_k=40, top_p=0.9))
            check(90, call(student, teacher, uniforms=None))


def widths(reports: list[Report]) -> set[int]:
    return set().union(*(report.widths()["load"] for report in reports))


def test_whole_vectors_are_loaded_where_both_sides_have_them() -> None:
    for dtype in DTYPES:
        for width in (8192, 8192 + 3):
            found = check(90, call(*pair(2, width, dtype)))
            main = found.reports[0]
            assert max(main.widths()["load"]) == 16
            assert main.load_sectors * 32 <= 1.02 * call(*pair(2, width, dtype)).least_bytes
            assert main.thread_instructions < 40 * 2 * width


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_may_differ(place: int | str, dtype: torch.dtype, other: torch.dtype) -> None:
    student, teacher = pair(3, 2053)
    check(place, call(student.to(dtype), teacher.to(other), temperature=0.7))
    check(place, call(student.to(dtype), teacher.to(other), top_p=0.8))


def test_padding_columns_count_for_nothing(place: int | str) -> None:
    student, teacher = pair(3, 1024, torch.bfloat16)
    student[:, 1001:], teacher[:, 1001:] = 100, NAN
    for options in ({}, {"top_k": 5}, {"top_p": 0.99}, {"uniforms": None}):
        check(place, call(student, teacher, vocab=1001, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 3e-5, 1e-3, 0.03, 0.3, 1.0, 3.0, 30.0])
def test_divergences_of_every_size(size: float, dtype: torch.dtype) -> None:
    """From 0 to 1 bit; equal rows are 0 to the last digit, whatever the exponential's errors."""
    student = normal(3, 4099).to(dtype).float()
    teacher = student + size * normal(3, 4099, seed=5)
    found = check(90, call(student, teacher))
    for row, expected in enumerate(found.jsd.tolist()):
        assert (expected == 0) == (size == 0), row
    check(90, call(student.to(dtype), teacher.to(dtype)))


def test_offsets_of_logits_cost_no_digits(place: int | str) -> None:
    student, teacher = (x.bfloat16().float() for x in pair(3, 3001))
    one = check(place, call(student, teacher))
    far = check(place, call(student + 8192, teacher - 4096))
    assert (one.jsd - far.jsd).abs().max() < 1e-3  # the sums themselves are rounded
    assert (check(place, call(student, teacher + 64)).jsd - one.jsd).abs().max() < 2e-5


def hard_rows(width: int) -> tuple[Tensor, Tensor]:
    """Masks, ties, one-hots, and no two sides alike."""
    index = torch.arange(width)
    least = torch.finfo(torch.float32).min
    one_hot = torch.where(index == width // 3, 0.0, -INF)
    rows = [
        (one_hot, torch.where(index == width // 2, 5.0, -INF)),
        (one_hot, one_hot + 3),
        (one_hot, torch.zeros(width)),
        (torch.full((width,), 1.5), torch.full((width,), -7.0)),
        (torch.full((width,), least), torch.zeros(width)),
        (torch.where(index < 5, 0.0, least), torch.where(index < 5, -INF, 0.0)),
        (torch.where(index % 7 < 3, -INF, index / width), torch.where(index % 5 < 3, -INF, 3 - index / width)),
        ((index % 97).float(), (index % 89).float()),
        (torch.where(index == width - 1, 40.0, -40.0), torch.where(index == 0, 40.0, -40.0)),
        (normal(1, width)[0] * 1e37, normal(1, width, seed=3)[0] * 1e37),
        (torch.where(index < 3, index * 1.0, -1e5), torch.where(index < 3, 2.0 - index, -1e30)),
    ]
    return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])


SAMPLING = {
    "plain": {},
    "greedy": {"uniforms": None},
    "cold": {"temperature": 0.05},
    "hot": {"temperature": 8.0},
    "k": {"top_k": 3},
    "large k": {"top_k": 2500, "temperature": 0.7},
    "p": {"top_p": 0.9},
    "least p": {"top_p": 1e-9},
    "most p": {"top_p": 1 - 1e-7, "temperature": 3.0},
    "both": {"top_k": 700, "top_p": 0.5, "temperature": 2.0},
}


@pytest.mark.parametrize("machine", [FEW_BLOCKS, H100], ids=["few", "many"])
@pytest.mark.parametrize("name", SAMPLING)
def test_hard_rows(place: int | str, name: str, machine: Machine) -> None:
    student, teacher = hard_rows(2309)
    threshold = torch.tensor([-1.0, 2.0], dtype=torch.float64).repeat(6)[: len(student)]
    for bits in (threshold, 1 - threshold):
        found = check(place, call(student, teacher, bits, **SAMPLING[name]), machine)
        assert found.jsd[0] > 1 - 1e-6
        assert found.jsd[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, 1 - 1e-9, LAST])
def test_uniform_numbers_at_the_ends(place: int | str, u: float) -> None:
    """0 takes the first entry that has any mass, the largest number below 1 the last one."""
    student, teacher = pair(2, 3001)
    for x in (student, teacher):
        x[:, :5] = x[:, -4:] = -INF
    for options in ({}, {"top_k": 9}, {"top_p": 0.7}, {"temperature": 0.3}):
        made = call(student, teacher, uniforms=torch.full((2,), u, dtype=torch.float64), **options)
        found = check(place, made)
        assert u != 0 or not options or (found.token >= 5).all()
        if u == 0 and not options:
            assert found.token.tolist() == [5, 5]


def test_entries_that_have_mass_together_only(place: int | str) -> None:
    """Each of the others rounds to none of 2^-40 of the largest, not so their sum."""
    faint = torch.full((2, 3000), -42 * math.log(2))
    faint[:, 0] = 0
    found = check(place, call(faint, faint + 1, uniforms=torch.tensor([0.5, LAST], dtype=torch.float64)))
    assert found.token[0] == 0
    assert found.token[1] > 0


def test_uniform_numbers_that_are_none_have_no_token(place: int | str) -> None:
    student, teacher = pair(5, 300)
    uniforms = torch.tensor([1.0, -1e-9, NAN, INF, 0.5], dtype=torch.float64)
    for options in ({}, {"top_k": 3}):
        found = check(place, call(student, teacher, uniforms=uniforms, **options))
        assert found.token[:4].tolist() == [-1] * 4
        assert found.token[4] >= 0
        assert not found.jsd.isnan().any()


def test_the_threshold_is_exceeded_strictly(place: int | str) -> None:
    """At the divergence itself, as float32 gives it, the student speaks; one unit in float64 below, the teacher."""
    student, teacher = pair(4, 1500)
    student[3], teacher[3] = normal(1, 1500), -INF
    teacher[3, 9], student[3, 9] = 0, -INF
    exact = check(place, call(student, teacher)).jsd.double()
    below = torch.nextafter(exact, torch.tensor(-1.0, dtype=torch.float64))
    assert not check(place, call(student, teacher, exact)).from_teacher.any()
    assert check(place, call(student, teacher, below)).from_teacher.all()
    assert not check(place, call(student, teacher, 1.0)).from_teacher.any()


@pytest.mark.parametrize("machine", [FEW_BLOCKS, H100], ids=["few", "many"])
@pytest.mark.parametrize("name", ["plain", "greedy", "both"])
def test_rows_without_a_distribution_are_nan_and_leave_others_alone(
    place: int | str, name: str, machine: Machine
) -> None:
    student, teacher = pair(9, 4200)
    student[1, 7] = NAN
    teacher[2, 4199] = INF
    student[3] = -INF
    teacher[4] = -INF
    teacher[5, 5] = -NAN
    student[6] = NAN
    threshold = torch.full((9,), 0.1, dtype=torch.float64)
    threshold[7] = NAN
    found = check(place, call(student, teacher, threshold, **SAMPLING[name]), machine)
    assert found.jsd.isnan().tolist() == [False, *[True] * 7, False]


HEADS = {
    "bias": ({"bias": 1}, {}),
    "scale": ({"scale": -0.4}, {"scale": 2.0}),
    "cap": ({"softcap": 5.0}, {"softcap": 30.0}),
    "all": ({"bias": 1, "scale": 0.7, "softcap": 8.0}, {"bias": 2, "scale": 1.3}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_heads(place: int | str, name: str, dtype: torch.dtype) -> None:
    def side(x: Tensor, options: dict[str, Any]) -> Side:
        bias = normal(1, 2053, seed=options["bias"])[0] if "bias" in options else None
        return Side(x, bias, options.get("scale", 1.0), options.get("softcap", 0.0))

    student, teacher = pair(3, 2053, dtype)
    for options in ({}, {"uniforms": None}, {"top_k": 99, "top_p": 0.9}):
        given_ = call(*(side(x, o) for x, o in zip((student, teacher), HEADS[name], strict=True)), **options)
        check(place, given_)


def test_a_soft_cap_makes_finite_numbers_of_infinite_ones(place: int | str) -> None:
    student, teacher = pair(3, 777)
    student[:, 5::7] = -INF
    teacher[1, 700] = INF
    check(place, call(Side(student, softcap=5.0), Side(teacher, softcap=7.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_go_in_waves(place: int | str, dtype: torch.dtype) -> None:
    """A launch sums up one wave and decides on the one before; every row as if alone."""
    student, teacher = pair(7, 1201, dtype)
    given_ = call(student, teacher)
    small = Machine(2, 5 * 2 * 1201 * dtype.itemsize)
    found = check(place, given_, small)
    if place != GPU:
        assert len(found.reports) == 5  # waves of two
    alone = gate(place, call(student[5:6], teacher[5:6], uniforms=given_.uniforms[5:6]), small)  # type: ignore[index]
    assert (alone.token, alone.from_teacher) == (found.token[5], found.from_teacher[5])
    assert abs(alone.jsd - found.jsd[5]) < 1e-6


def test_repeated_runs_are_equal_whichever_block_ends_last() -> None:
    student, teacher = pair(3, 20011, torch.bfloat16)
    given_ = call(student, teacher, top_p=0.9)
    one, two = gate(90, given_), gate(90, given_)
    assert torch.equal(one.jsd, two.jsd)
    assert torch.equal(one.token, two.token)


@pytest.mark.parametrize("target", [80, 90])
def test_offsets_beyond_2_to_the_31(target: int) -> None:
    sides = []
    for seed, dtype in ((1, torch.bfloat16), (2, torch.bfloat16)):
        stride = 2**31 + 64
        memory = torch.empty(stride + 3000, dtype=dtype)  # pages that no one touches cost nothing
        sides.append(memory.as_strided((2, 3000), (stride, 1)).copy_(normal(2, 3000, dtype, seed)))
    check(target, call(*sides))
    check(target, call(*sides, top_k=20))


def test_ties_stay_with_the_lower_ids(place: int | str) -> None:
    """More equal entries than a block can sort: they are told apart by their ids."""
    student = torch.zeros(2, 6001)
    student[1, 3000:] = 1.0
    teacher = student + 0.5
    for k in (7, 2500):
        uniforms = torch.tensor([LAST, LAST], dtype=torch.float64)
        found = check(place, call(student, teacher, uniforms=uniforms, top_k=k))
        assert found.token.tolist() == [k - 1, 3000 + k - 1]
    found = check(place, call(student, teacher, uniforms=torch.full((2,), LAST, dtype=torch.float64), top_p=0.5))
    assert abs(found.token[0] - 3000) <= 1
    assert check(place, call(student, teacher, uniforms=None)).token.tolist() == [0, 3000]


@pytest.mark.parametrize("seed", range(4))
def test_top_k_and_top_p_of_long_rows(seed: int) -> None:
    """Narrow and wide logits, many and few entries in doubt; a histogram or two at most on such rows."""
    scale = (0.01, 1.0, 4.0, 30.0)[seed]
    student, teacher = normal(1, 50257, seed=seed) * scale, normal(1, 50257, seed=9) * scale
    for options in ({"top_k": 50}, {"top_k": 20000}, {"top_p": 0.95}, {"top_k": 3000, "top_p": 0.3}):
        given_ = call(student, teacher, **options)
        found = check(90, given_, H100)
        stages = len(options)
        assert found.reports[-1].load_sectors * 32 <= (1.1 + 3 * stages) * student.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 64, 300])
def test_large_vocabularies_on_a_gpu(rows: int, dtype: torch.dtype) -> None:
    student, teacher = pair(rows, 151936, dtype)
    for options in SAMPLING.values():
        check(GPU, call(student, teacher, 0.3, **options))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_vocabulary_uses_every_multiprocessor(dtype: torch.dtype) -> None:
    given_ = call(*pair(1, 151936, dtype))
    found = check(90, given_, H100)
    assert [report.grid[0] for report in found.reports] == [149, 149]
    norms, records = 149 * 149 * 16, 4 * 149 * 2 * 32  # a sector an access
    assert load_ratio(found.reports, given_) <= 1.05 * (2 + (norms + records) / given_.least_bytes)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    student, teacher = (x.cuda() for x in pair(4, 50257))
    given_ = call(student, teacher, top_p=0.9)
    bits, uniforms = given_.threshold.cuda(), draws(4).cuda()
    made = [x.cuda() for x in (Decision.empty(4).token, Decision.empty(4).from_teacher, Decision.empty(4).jsd)]

    def run() -> None:
        torch.ops.kdkernels_C.gate_.default(
            student, None, 1.0, 0.0, teacher, None, 1.0, 0.0, bits, uniforms, 1.0, 0, 0.9, 50257, *made
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    fresh = pair(4, 50257, seed=8)
    student.copy_(fresh[0])
    teacher.copy_(fresh[1])
    graph.replay()
    torch.cuda.synchronize()
    assert_right(Decision(*(x.cpu() for x in made)), call(*fresh, top_p=0.9))


def test_the_leaf_is_registered_for_cuda() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels_C::gate_", "CUDA")
    assert native.facts()["cuda_sources"].count("gate.cu") == 1


def draw_case(data: st.DataObject) -> None:
    width, rows = data.draw(st.integers(1, 6000)), data.draw(st.integers(1, 4))
    seed, sides = data.draw(st.integers(0, 999)), []
    for offset in range(2):
        dtype = data.draw(st.sampled_from(DTYPES))
        start, gap = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
        x = normal(rows, start + width + gap, dtype, seed + offset)[:, start : start + width]
        levels = data.draw(st.sampled_from([0, 1, 3, 50]))  # of rounded logits: ties
        if levels:
            x.copy_((x * levels / 10).round())
        masked = data.draw(st.sampled_from([0.0, 0.1, 0.999]))
        x.masked_fill_(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < masked, -INF)
        bias = normal(1, width, seed=seed + 7)[0] if data.draw(st.booleans()) else None
        head = (bias, data.draw(st.sampled_from([1.0, 0.3])), data.draw(st.sampled_from([0.0, 50.0])))
        sides.append(Side(x, *head))
    given_ = call(
        *sides,
        data.draw(st.sampled_from([-1.0, 0.01, 0.2, 0.6, 2.0])),
        uniforms=data.draw(st.sampled_from([None, draws(rows, seed)])),
        temperature=data.draw(st.sampled_from([0.05, 1.0, 1.0, 8.0])),
        top_k=data.draw(st.sampled_from([0, 1, 50, 3000])),
        top_p=data.draw(st.sampled_from([1.0, 0.95, 0.1])),
    )
    cache = data.draw(st.sampled_from([50 * 2**20, given_.least_bytes]))
    check(data.draw(st.sampled_from([80, 90])), given_, Machine(data.draw(st.sampled_from([1, 9, 132])), cache))


@settings(max_examples=3, phases=NO_SHRINKING)
@given(st.data())
def test_random_calls(data: st.DataObject) -> None:
    draw_case(data)


@pytest.mark.soak
@settings(max_examples=200, phases=NO_SHRINKING)
@given(st.data())
def test_many_random_calls(data: st.DataObject) -> None:
    draw_case(data)


@pytest.mark.parametrize("target", [90, 100])
def test_the_vectors_of_the_paper(target: int) -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.3, 0.5]])
    found = check(target, call(q.log(), p.log()))
    assert math.isclose(found.jsd.item(), 0.218364, abs_tol=2e-6)
