"""The processes of one job, as torchrun starts them: who this one is, and waiting for the others."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from kdkernels.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """rank of world; `wait` returns when every rank has come to it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """From RANK and WORLD_SIZE, which torchrun sets; one process without them."""
        try:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise UserError(f"RANK and WORLD_SIZE must be numbers ({error}); start the job with torchrun") from error
        if not 0 <= rank < world:
            raise UserError(f"RANK is {rank}; allowed: 0 to WORLD_SIZE - 1 ({world - 1}); start the job with torchrun")
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(rank, world)

    def wait(self) -> None:
        """A barrier; a rank that died is an error here, not a hang."""
        if self.world > 1:
            dist.barrier()

    def share(self, count: int) -> range:
        """This rank's part of `count` things, contiguous."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)
