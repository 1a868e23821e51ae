"""Collectives over the ranks that hold a vocabulary's shards: a gather and a sum, started now and waited for later."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""torch's name of it: from 2.13 on the first, of which the second warns."""

DOUBTS: dict[str, Tensor] = {}
"""By a group's name: whether the digests that rode in its last call's first gather differed."""


class Pending:
    """A collective under way; `wait` returns its result."""

    def __init__(self, ranks: Ranks, work: Any, result: Tensor, sent: Tensor) -> None:
        self._ranks, self._work, self._result, self._sent = ranks, work, result, sent  # gloo needs both alive

    def wait(self) -> Tensor:
        """The result; on a GPU, the current stream waits and the host does not."""
        try:
            self._work.wait()
        except RuntimeError as error:
            self._ranks.fail(error)
        return self._result


class Ranks:
    """The process group whose ranks hold the shards, in rank order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    @classmethod
    def named(cls, name: str) -> Ranks:
        """The group that `name` stands for in an operator's arguments."""
        return cls(_resolve_process_group(cast(Any, name)))

    @property
    def name(self) -> str:
        """What `named` takes."""
        return str(self.group.group_name)

    def device_of(self, side: object) -> torch.device:
        """Where a side's numbers are; of what is no side, where the group's collectives take tensors."""
        found = getattr(getattr(side, "hidden", side), "device", None)
        if isinstance(found, torch.device):
            return found
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")

    def gather(self, x: Tensor) -> Pending:
        """Every rank's ``x``, of one shape, as ``[ranks, *x.shape]``."""
        x = x.contiguous()
        result = x.new_empty((self.size, *x.shape))
        try:
            work = getattr(dist, GATHER)(result.view(-1), x.view(-1), group=self.group, async_op=True)
        except RuntimeError as error:
            self.fail(error)
        return Pending(self, work, result, x)

    def add_(self, x: Tensor) -> Pending:
        """``x``, contiguous, becomes the sum of every rank's."""
        try:
            work = dist.all_reduce(x, group=self.group, async_op=True)
        except RuntimeError as error:
            self.fail(error)
        return Pending(self, work, x, x)

    def fail(self, error: RuntimeError) -> NoReturn:
        """A collective's failure, in words of its meaning."""
        raise RuntimeError(
            f"kdkernels: a collective of the vocabulary shards failed on rank {self.rank} of {self.size}: a peer died, "
            f"is later than the group's timeout, or calls something else. The group cannot be used any further: "
            f"{str(error).splitlines()[0]}"
        ) from error
