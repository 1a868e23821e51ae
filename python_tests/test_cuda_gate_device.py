"""The gate's CUDA kernels on a whole GPU: waves, graphs, many blocks, long offsets."""

from __future__ import annotations

import pytest
import torch
from cuda_gate import GPU, H100, Machine, gate, load_ratio, obstacle
from cuda_gate_cases import DTYPES, SAMPLING, call, check, draws, normal, pair, place
from gate_oracle import Decision, assert_right

from kdkernels import native

__all__ = ["place"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.sample(16),
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "can be had"),
]


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
