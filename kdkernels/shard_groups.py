"""Which process group holds a vocabulary's shards, and this rank's part of DTensors."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from kdkernels._checks import fail
from kdkernels.logits import LinearLogits


def _tensors(side: object) -> tuple[object, ...]:
    return (side.hidden, side.weight, side.bias) if isinstance(side, LinearLogits) else (side,)


def _is_dtensor(x: object) -> bool:
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def resolve(group: object | None, *sides: object) -> Any:
    """The ProcessGroup of ``group``, or of the DTensors among the sides."""
    given = None if group is None else _process_group(group)
    for side in sides:
        for x, vocabulary in zip(_tensors(side), (0, 0, 0) if isinstance(side, LinearLogits) else (-1,), strict=False):
            if not _is_dtensor(x) or (isinstance(side, LinearLogits) and x is side.hidden):
                continue
            found = _group_of(x, vocabulary)
            if given is not None and dist.get_process_group_ranks(given) != dist.get_process_group_ranks(found):
                fail(
                    ValueError, "group", group, "the mesh dimension over which the DTensors are sharded", "leave it out"
                )
            given = found
    return given


def _process_group(group: object) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        fail(ValueError, "group", group, "used after torch.distributed.init_process_group", "start with torchrun")
    if isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            remedy = 'choose the dimension that holds the shards, as in mesh["tensor"]'
            fail(ValueError, "group", f"a DeviceMesh of {group.ndim} dimensions", "of one dimension", remedy)
        return group.get_group()
    if isinstance(group, int):
        fail(ValueError, "group", group, "a group this process belongs to", "new_group returns this to all others")
    fail(TypeError, "group", type(group).__name__, "a ProcessGroup, a one-dimensional DeviceMesh, or None")


def _group_of(x: Any, vocabulary: int) -> Any:
    """The group of the mesh dimension that shards the vocabulary of a DTensor."""
    from torch.distributed.tensor import Replicate, Shard

    wanted = vocabulary % x.dim()
    over = [i for i, p in enumerate(x.placements) if type(p) is Shard and p.dim % x.dim() == wanted]
    others = [p for i, p in enumerate(x.placements) if i not in over]
    rows = all(type(p) is Replicate or (type(p) is Shard and vocabulary == -1) for p in others)
    if len(over) != 1 or not rows:
        allowed = f"Shard({vocabulary}) over one dimension of the mesh" + (
            " and Replicate over others" * (vocabulary == 0)
        )
        fail(ValueError, "placements", x.placements, allowed, "redistribute it, or pass its local part and group=")
    return x.device_mesh.get_group(over[0])


def localize(side: Any) -> Any:
    """The same side with this rank's part in place of each DTensor; gradients come back as DTensors."""
    if isinstance(side, LinearLogits):
        hidden, weight, bias = (_local(x) for x in _tensors(side))
        return LinearLogits(hidden, weight, bias, side.softcap, side.scale)
    return _local(side)


def _local(x: Any) -> Any:
    if not _is_dtensor(x):
        return x
    if any(p.is_partial() for p in x.placements):
        fail(
            ValueError, "placements", x.placements, "Shard or Replicate", "redistribute it: partial sums are no logits"
        )
    return x.to_local(grad_placements=x.placements)
