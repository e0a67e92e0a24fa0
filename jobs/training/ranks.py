"""Data-parallel training processes: gradients are averaged, everything else is replicated.

On a CPU two single-threaded ranks are faster than two threads in one process.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, distributed

__all__ = ["Ranks"]


class Ranks:
    """Context manager: membership in a group of processes that share gradients; one rank needs no
    group."""

    def __init__(self, rank: int, world: int, rendezvous: Path | None) -> None:
        self.rank, self.world, self.rendezvous = rank, world, rendezvous

    def __enter__(self) -> Ranks:
        if self.world > 1:
            if self.rendezvous is None:
                raise ValueError("several ranks need a rendezvous file: give --rendezvous")
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{self.rendezvous.resolve()}",
                rank=self.rank,
                world_size=self.world,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.world > 1:
            distributed.destroy_process_group()

    def average(self, gradients: list[Tensor]) -> None:
        """Replaces every gradient by its mean over ranks, in one all-reduce."""
        if self.world == 1:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.world
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
