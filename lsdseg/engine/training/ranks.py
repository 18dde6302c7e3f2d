"""Processes that train one network together: `torchrun --nproc_per_node 4 trainer.py -c ...`.

Each has its own patches and its own GPU; what torchrun puts into the environment says which one this is. Without
torchrun there is one process, and everything here does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


class Ranks:
    """This process among those that train together.

    Attributes:
        rank, size: number of this process, and how many there are.
        local_rank, local_size: the same on this machine.
        first: whether this is the process that talks and writes.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.first = self.rank == 0

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Context manager in which `total` and DistributedDataParallel work."""
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The others wait while the first one makes masks or validates. torchrun ends all if one dies, not a timeout.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        self.device = device
        try:
            yield
        finally:
            dist.destroy_process_group()

    def total(self, values: list[float]) -> list[float]:
        """Sums of values over all processes; every process has to ask at the same time."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest of a value over all processes; every process has to ask at the same time."""
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def _reduced(self, values: list[float], operation) -> list[float]:
        if self.size == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, operation)
        return reduced.tolist()

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            dist.barrier()
