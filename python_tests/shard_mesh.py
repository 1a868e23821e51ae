"""A tiny Llama on a mesh of 2 x 2: FSDP2 or DDP over "data", the head's vocabulary over "tensor"."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import kdkernels as kd

VOCAB, TOKENS = 307, 12  # 307: shards of 154 and 153


class Distilled(nn.Module):
    """A student that computes its own loss, so that the wrapper's hooks see the head used."""

    def __init__(self, body: nn.Module, head: Tensor, group: Any) -> None:
        super().__init__()
        self.body, self.group = body, group
        self.head = nn.Parameter(head)

    def forward(self, ids: Tensor, teacher: kd.LinearLogits, items: Tensor) -> Tensor:
        hidden = self.body(ids).last_hidden_state
        student = kd.LinearLogits(hidden, self.head)
        value: Tensor = kd.distillation_loss(
            student, teacher, "jsd", labels=ids, ce_weight=0.5, shift=True, num_items=items, group=self.group
        )
        return value


def student(layers: int = 2, **options: Any) -> Any:
    return tiny_models.llama(layers, VOCAB, tie_word_embeddings=False, **options).double()


def batch() -> tuple[Tensor, kd.LinearLogits]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCAB, (4, TOKENS), generator=generator)
    hidden = torch.randn(4, TOKENS, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 16, generator=generator, dtype=torch.float64)
    return ids, kd.LinearLogits(hidden, weight)


def alone() -> tuple[Tensor, dict[str, Tensor]]:
    """One process, the whole batch: loss, and the gradients of body and head."""
    model = student()
    whole = Distilled(model.model, model.lm_head.weight.detach().clone(), None)
    ids, teacher = batch()
    value = whole(ids, teacher, torch.tensor(ids.numel() - len(ids)))
    value.backward()
    return value.detach(), {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def compare(model: nn.Module, expected: dict[str, Tensor], columns: slice, factor: float) -> None:
    seen = 0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = expected[name.removeprefix("module.")]
        made = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        whole = whole[columns] if made.shape != whole.shape else whole
        error = (made * factor - whole).norm() / whole.norm()
        assert error < 1e-10, f"{name}: {error}"
        seen += 1
    assert seen == len(expected)


def run() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor, data = mesh["tensor"], mesh["data"]
    expected_loss, expected = alone()
    ids, teacher = batch()
    share = slice(2 * data.get_local_rank(), 2 * data.get_local_rank() + 2)
    items = torch.tensor(ids.numel() - len(ids))
    ours = kd.LinearLogits(teacher.hidden[share], dist.tensor.distribute_tensor(teacher.weight, tensor, [Shard(0)]))
    columns = slice(0, 154) if tensor.get_local_rank() == 0 else slice(154, VOCAB)
    plain = kd.LinearLogits(ours.hidden, teacher.weight[columns].clone())

    def total(value: Tensor) -> Tensor:
        summed = value.detach().clone()
        dist.all_reduce(summed, group=data.get_group())
        return summed

    for checkpointing in (False, True):
        model = student()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        head = dist.tensor.distribute_tensor(model.lm_head.weight.detach(), tensor, [Shard(0)])
        wrapped = Distilled(model.model, head, None)
        for layer in wrapped.body.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=data)
        fully_shard(wrapped, mesh=data)
        value = wrapped(ids[share], ours, items)
        value.backward()
        assert torch.allclose(total(value), expected_loss, rtol=1e-11)
        compare(wrapped, expected, columns, factor=2.0)  # FSDP averages over data ranks

    model = student()
    shard = Distilled(model.model, model.lm_head.weight.detach()[columns].clone(), tensor)
    replicas = DistributedDataParallel(shard, process_group=data.get_group())
    value = replicas(ids[share], plain, items)
    value.backward()
    assert torch.allclose(total(value), expected_loss, rtol=1e-11)
    compare(replicas, expected, columns, factor=2.0)
