"""`kdkernels.switch_gate` on vocabulary shards: every rank gets what one process gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys
import torch
import torch.distributed as dist
import kdkernels as kd

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
    try:
        kd.switch_gate(spoiled[:, begin:end], zt[:, begin:end], 0.3, uniforms=u, group=group)
    except ValueError as error:
        assert "row 4" in str(error), error
    else:
        raise AssertionError("a row with NaN passed")
dist.destroy_process_group()
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
