"""The processes of one training, one a GPU, as torchrun starts them; a single process without it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


class Workers:
    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        is_cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if is_cuda else torch.device("cpu")
        )
        if is_cuda:
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if is_cuda else "gloo", device_id=self.device if is_cuda else None)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average(self, values: torch.Tensor) -> None:
        """The mean over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count

    def told_by_first(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told)

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()
