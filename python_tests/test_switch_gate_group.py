"""`kdkernels.switch_gate` on vocabulary shards: every rank gets what one process gets."""

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
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
group = dist.group.WORLD
SPLITS = {2: [(500, 501), (1001, 0)], 3: [(334, 333, 334), (0, 1001, 0), (3, 990, 8)]}
SHAPES = (
    {}, {"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.5}, {"do_sample": False},
    {"vocab_size": 600},
)
generator = torch.Generator().manual_seed(3)
zs, zt = (3 * torch.randn(6, 1001, generator=generator) for _ in range(2))
zs[0], zt[0] = 1.0, 1.0
zs[1, :400] = -torch.inf  # shards without mass in this row
zt[2, 600] = 60.0
zs[3] += 8192
threshold = torch.tensor([-1.0, 0.2, 2.0, 0.2, 0.9, 0.0])
u = torch.tensor([0.0, 0.3, 0.6, 1 - 2.0**-53, 0.11, 0.77], dtype=torch.float64)


def same(found, whole):
    assert torch.equal(found.from_teacher, whole.from_teacher)
    assert torch.equal(found.token, whole.token), (found.token, whole.token)
    assert (found.jsd.double() - whole.jsd.double()).abs().max() < 1e-6


def refused(text, kind=ValueError, **given):
    try:
        kd.switch_gate(**{"uniforms": u, "group": group, "threshold": 0.3} | given)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no error: {text}")


for split in SPLITS[world]:
    begin, end = sum(split[:rank]), sum(split[: rank + 1])
    for dtypes in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        s, t = zs.to(dtypes[0]), zt.to(dtypes[1])
        for shape in SHAPES:
            given = {"uniforms": u, **shape}
            mine = kd.switch_gate(s[:, begin:end], t[:, begin:end], threshold, group=group, **given)
            same(mine, kd.switch_gate(s, t, threshold, **given))
    drawn = torch.Generator().manual_seed(9 if rank == 0 else 100 + rank)  # the first rank's decide
    mine = kd.switch_gate(zs[:, begin:end], zt[:, begin:end], 0.3, generator=drawn, group=group)
    same(mine, kd.switch_gate(zs, zt, 0.3, generator=torch.Generator().manual_seed(9)))
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(1001, 8, generator=generator)
    head, part = kd.LinearLogits(hidden, weight, softcap=5.0), kd.LinearLogits(hidden, weight[begin:end], softcap=5.0)
    same(
        kd.switch_gate(part, zt[:, begin:end], 0.3, uniforms=u, group=group),
        kd.switch_gate(head, zt, 0.3, uniforms=u),
    )
    spoiled = zs.clone()
    spoiled[4, 335] = torch.nan
    refused("row 4", student_logits=spoiled[:, begin:end], teacher_logits=zt[:, begin:end])

last = rank == world - 1
held = slice(400 * rank, 400 * (rank + 1))
sides = {"student_logits": zs[:, held], "teacher_logits": zt[:, held]}
for name, values in {
    "temperature": (1.0, 2.0), "threshold": (0.3, 0.9), "top_k": (2, 3), "top_p": (0.5, 0.9),
    "do_sample": (True, False), "vocab_size": (700, 701), "backend": ("eager", "cpp"),
}.items():
    refused(f"{name} = rank 0: ", **sides, **{name: values[last]})
refused("threshold = rank 0: float64[6] with checksum", **sides, threshold=threshold + last)
refused("student leading shape = rank 0: [6]", **{name: z[last:] for name, z in sides.items()}, uniforms=u[last:])
refused("teacher dtype = rank 0: float32", **sides | {"teacher_logits": zt[:, held].double() if last else zt[:, held]})
for wrong, text, kind in (
    ({"temperature": -2.0}, "temperature = -2.0", ValueError),
    ({"uniforms": u[1:]}, "uniforms shape = [5]", ValueError),
    ({"uniforms": None, "generator": "seed"}, "generator", TypeError),
    ({"teacher_logits": None}, "teacher_logits = NoneType", TypeError),
):
    if last:
        refused(text, kind, **sides | wrong)
    else:
        refused(f"arguments of rank {world - 1} of the vocabulary shards = {kind.__name__}: ", **sides)
moved = zt[:, held.start - (rank == 1) : held.stop - (rank == 0)]
refused("shards = student", student_logits=zs[:, held], teacher_logits=moved)
refused("group = 'tp'", TypeError, **sides, group="tp")

mesh = init_device_mesh("cpu", (world,))
cut = [distribute_tensor(z, mesh, [Shard(-1)]) for z in (zs, zt)]
same(kd.switch_gate(*cut, threshold, uniforms=u), kd.switch_gate(zs, zt, threshold, uniforms=u))
head = kd.LinearLogits(hidden, distribute_tensor(weight, mesh, [Shard(0)]), softcap=5.0)
whole = kd.LinearLogits(hidden, weight, softcap=5.0)
same(kd.switch_gate(head, cut[1], 0.3, uniforms=u), kd.switch_gate(whole, zt, 0.3, uniforms=u))
begin, end = 400 * rank, 400 * (rank + 1)  # padding beyond vocab_size, of one side more than of the other
wide = torch.cat((zt[:, : 400 * world], torch.ones(6, 3)), -1)
given = {"uniforms": u, "vocab_size": 790}
mine = kd.switch_gate(zs[:, begin:end], wide[:, begin : end + 3 * last], threshold, group=group, **given)
same(mine, kd.switch_gate(zs, zt, threshold, **given))
dist.barrier()  # nobody leaves while others are still at their last collective
dist.destroy_process_group()
os._exit(0)  # threads of gloo and DTensors at times abort a process that ends in order
"""


@pytest.mark.parametrize("world", [2, 3])
def test_shards(tmp_path: Path, world: int) -> None:
    command = [sys.executable, "-c", WORKER]
    ranks = [
        subprocess.Popen([*command, str(r), str(world), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for r in range(world)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(said)
