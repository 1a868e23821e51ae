"""`kdkernels.compress` on vocabulary shards: every rank gets what one process gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKER = """
import os
import sys
import torch
import torch.distributed as dist
import kdkernels as kd
from compress_oracle import apart
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
group = dist.group.WORLD
SPLITS = {
    2: [(500, 501), (1001, 0), (0, 1001), (1, 1000)],
    3: [(334, 333, 334), (0, 1001, 0), (700, 0, 301), (3, 990, 8)],
}


def same(found, whole, tolerance=2e-6):
    assert torch.equal(found.ids, whole.ids), (found.ids, whole.ids)
    assert (found.vocab_size, found.temperature, found.kind) == (whole.vocab_size, whole.temperature, whole.kind)
    assert found.dtype == whole.dtype
    for name in ("log_probs", "log_tail", "entropy"):
        ours, theirs = getattr(found, name), getattr(whole, name)
        assert (ours is None) == (theirs is None) and (ours is None or apart(ours, theirs) < tolerance), name
    assert found.other_tails.keys() == whole.other_tails.keys()
    assert all(apart(x, whole.other_tails[t]) < tolerance for t, x in found.other_tails.items())


def rows(dtype):
    z = 3 * torch.randn(2, 4, 1001, generator=torch.Generator().manual_seed(3))
    z[0, 0] = 1.0  # ties across shards: the lower ids
    z[0, 1, :400] = -torch.inf  # shards without mass in this row
    z[0, 2] *= 100
    z[0, 3] += 8192
    z[1, 0] = -torch.inf
    z[1, 0, 333:360] = 2.0
    z[1, 1, 1000] = 60.0
    return z.to(dtype)


def refused(call, text, kind=ValueError):
    try:
        call()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no error: {text}")


for split in SPLITS[world]:
    begin, end = sum(split[:rank]), sum(split[: rank + 1])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        z = rows(dtype)
        mine = z[..., begin:end]
        for options in (
            {"k": 1}, {"k": 64, "entropy": True, "temperature": 1.7, "other_temperatures": [0.6, 4.0]},
            {"k": 600}, {"k": 1001, "entropy": True}, {"k": 50, "vocab_size": 600}, {"k": 40, "top_p": 0.8},
            {"k": 40, "top_p": 0.5, "other_temperatures": [2.0]},
        ):
            same(kd.compress(mine, group=group, **options), kd.compress(z, **options))
        whole = kd.compress(z, samples=40, generator=torch.Generator().manual_seed(9), entropy=True)
        generator = torch.Generator().manual_seed(9 if rank == 0 else 100 + rank)  # the first rank's decide
        same(kd.compress(mine, samples=40, generator=generator, entropy=True, group=group), whole)
    shapes = ((5, 8), (1001, 8), (1001,))
    hidden, weight, bias = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in shapes)
    head = kd.LinearLogits(hidden, weight[begin:end], bias[begin:end], scale=0.5)
    whole = kd.LinearLogits(hidden, weight, bias, scale=0.5)
    same(kd.compress(head, 30, group=group, entropy=True), kd.compress(whole, 30, entropy=True))
    spoiled = rows(torch.float32)
    spoiled[1, 2, 335] = torch.nan
    spoiled[1, 3] = -torch.inf
    for options in ({"k": 5}, {"samples": 5}):
        refused(lambda: kd.compress(spoiled[..., begin:end], group=group, **options), "row [1, 2]")
    refused(lambda: kd.compress(mine, k=1002, group=group), "k = 1002")
    refused(lambda: kd.compress(mine[rank:], k=4, group=group), "leading shape = rank 0: [2, 4], rank 1: [1, 4]")
    refused(lambda: kd.compress(mine, k=4 + rank, group=group), "k = rank 0: 4, rank 1: 5")

mine = rows(torch.float32)[..., 500 * rank : 500 * (rank + 1)]
last = rank == world - 1
for name, values in {
    "temperature": (1.0, 2.0), "other_temperatures": ([2.0], [3.0]), "top_p": (0.5, 0.9), "samples": (3, 4),
    "entropy": (False, True), "vocab_size": (900, 901), "backend": ("eager", "cpp"),
}.items():
    refused(lambda: kd.compress(mine, 3, group=group, **{name: values[last]}), f"{name} = rank 0: ")
refused(lambda: kd.compress(mine.double() if last else mine, 3, group=group), "dtype = rank 0: float32, ")
longer = [float(t) for t in range(2, 900)] + [1000.0 + rank]
refused(lambda: kd.compress(mine, 3, group=group, other_temperatures=longer), "with checksum")
for wrong, text, kind in (
    ({"k": 0}, "k = 0", ValueError), ({"temperature": -2.0}, "temperature = -2.0", ValueError),
    ({"samples": 3, "generator": "seed"}, "generator = str", TypeError),
    ({"logits": None}, "logits = NoneType", TypeError),
):
    given = {"logits": mine, "k": 3, "group": group} | (wrong if last else {})
    told = text if last else f"arguments of rank {world - 1} of the vocabulary shards = {kind.__name__}: {text}"
    refused(lambda: kd.compress(**given), told, kind if last else ValueError)
refused(lambda: kd.compress(mine, 3, group="tp"), "group = 'tp'", TypeError)

mesh = init_device_mesh("cpu", (world,))
whole = rows(torch.float32)
same(kd.compress(distribute_tensor(whole, mesh, [Shard(-1)]), 9), kd.compress(whole, 9))
hidden, weight = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 101))
head = kd.LinearLogits(hidden, distribute_tensor(weight, mesh, [Shard(0)]))
same(kd.compress(head, 9), kd.compress(kd.LinearLogits(hidden, weight), 9))
refused(lambda: kd.compress(distribute_tensor(whole, mesh, [Shard(0)]), 9), "Shard(-1)")
replicated = kd.LinearLogits(distribute_tensor(hidden, mesh, [Replicate()]), weight)
refused(lambda: kd.compress(replicated, 9), "hidden = a DTensor")
same(kd.compress(torch.randn(0, 5), 3, group=group), kd.compress(torch.randn(0, 5 * world), 3))
dist.barrier()  # nobody leaves while others are still at their last collective
dist.destroy_process_group()
print("good", flush=True)
os._exit(0)  # threads of gloo and DTensors at times abort a process that ends in order
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_shards_give_the_answer_of_the_whole(tmp_path: Path, world: int) -> None:
    here = Path(__file__).parent
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=here,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [text.splitlines()[-1:] for text in said] == [["good"]] * world, "\n".join(said)
