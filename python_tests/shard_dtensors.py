"""Cases with DTensors and meshes, and torch's own sharded loss as a witness."""

from __future__ import annotations

import dataclasses

import cases
import torch
import torch.distributed as dist
from shard_cases import V, World, linear_pair, loss
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

import kdkernels as kd


def case_dtensors(world: World) -> None:
    """Logits Shard(-1), heads Shard(0), also uneven: no group needed, gradients come back as DTensors."""
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("tensor",))
    student, teacher, _, _, _ = linear_pair(world, "even", torch.float64, bias=True)
    whole = dataclasses.replace(
        student, hidden=student.hidden.clone().requires_grad_(), weight=student.weight.clone().requires_grad_()
    )
    alone = kd.distillation_loss(whole, teacher, "jsd")
    alone.backward()
    for hidden_too in (False, True):
        weight = dist.tensor.distribute_tensor(student.weight, mesh, [Shard(0)]).requires_grad_()
        bias = dist.tensor.distribute_tensor(student.bias, mesh, [Shard(0)])
        hidden = student.hidden.clone()
        hidden = dist.tensor.distribute_tensor(hidden, mesh, [Replicate()]) if hidden_too else hidden
        hidden.requires_grad_()
        mine = dataclasses.replace(student, hidden=hidden, weight=weight, bias=bias)
        theirs = dataclasses.replace(teacher, weight=dist.tensor.distribute_tensor(teacher.weight, mesh, [Shard(0)]))
        value = kd.distillation_loss(mine, theirs, "jsd", group=mesh if hidden_too else None)
        value.backward()
        assert torch.allclose(value, alone, rtol=1e-12)
        assert isinstance(weight.grad, DTensor)
        assert torch.allclose(weight.grad.full_tensor(), whole.weight.grad, rtol=1e-10, atol=1e-15)
        made = hidden.grad.full_tensor() if isinstance(hidden.grad, DTensor) else hidden.grad
        assert torch.allclose(made, whole.hidden.grad, rtol=1e-10, atol=1e-15)
    few = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))  # 4 ranks: one is empty
    logits = dist.tensor.distribute_tensor(few, mesh, [Shard(1)]).requires_grad_()
    other = dist.tensor.distribute_tensor(few.flip(0), mesh, [Shard(1)])
    plain = few.clone().requires_grad_()
    kd.distillation_loss(logits, other, "reverse_kl").backward()
    kd.distillation_loss(plain, few.flip(0), "reverse_kl").backward()
    assert isinstance(logits.grad, DTensor)
    assert torch.allclose(logits.grad.full_tensor(), plain.grad, rtol=1e-11, atol=1e-16)


def case_torch_agrees(world: World) -> None:
    """torch's own log-softmax and kl_div on sharded DTensors."""
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (world.size,))
    student, teacher = cases.pair("ordinary", 6, 12 * world.size, torch.float64)
    logits, other = (dist.tensor.distribute_tensor(x, mesh, [Shard(1)]) for x in (student, teacher))
    with loss_parallel():
        lq, lp = (torch.log_softmax(x, -1) for x in (logits, other))
        expected = torch.nn.functional.kl_div(lq, lp, reduction="sum", log_target=True) / 6
    expected = expected.full_tensor() if isinstance(expected, DTensor) else expected
    assert torch.allclose(kd.distillation_loss(logits, other, "forward_kl"), expected, rtol=1e-12)


def case_compositions(world: World) -> None:
    """Gradient checkpointing, a retained graph, torch.compile, and what opcheck says of the operator."""
    from torch.utils.checkpoint import checkpoint

    student, teacher, mine, theirs, _ = linear_pair(world, "even", torch.float64, bias=False)
    whole = student.hidden.clone().requires_grad_()
    kd.distillation_loss(dataclasses.replace(student, hidden=whole), teacher, "jsd").backward()
    hidden = student.hidden.clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        value: Tensor = loss(dataclasses.replace(mine, hidden=torch.tanh(x)), theirs)
        return value

    checkpoint(run, hidden, use_reentrant=False).backward()
    once = hidden.clone().detach().requires_grad_()
    run(once).backward()
    assert torch.allclose(hidden.grad, once.grad, rtol=1e-12, atol=1e-16)
    again = student.hidden.clone().requires_grad_()
    value = loss(dataclasses.replace(mine, hidden=again), theirs)
    value.backward(retain_graph=True)
    value.backward()
    assert torch.allclose(again.grad, 2 * whole.grad, rtol=1e-11, atol=1e-15)
    if world.size == 2:
        compiled = torch.compile(run, backend="eager")
        assert torch.allclose(compiled(hidden), run(hidden), rtol=1e-12)
    ones = torch.ones(5, dtype=torch.float64)
    arguments = (
        mine.hidden, mine.weight, None, 1.0, 0.0, theirs.hidden, theirs.weight, None, 1.0, 0.0, ones, None, None,
        "jsd", 0.5, 0.0, 1.0, mine.weight.shape[0], world.cuts("even")[world.rank], V,
        dist.group.WORLD.group_name, 0, 2, "eager", False, True, True, False, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kdkernels.shards.default, arguments, test_utils=("test_schema", "test_faketensor"))


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}
