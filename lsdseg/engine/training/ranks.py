"""Processes that train one network together: `torchrun --nproc_per_node 4 trainer.py -c ...`.

Each process (rank) has its own patches and its own GPU. It finds its number in the environment, where torchrun puts it.
Without torchrun there is one process, and nothing here has an effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


class Ranks:
    """The place of this process among those that train together.

    Attributes:
        rank: the number of this process.
        size: how many processes there are.
        local_rank: the number of this process on this machine.
        local_size: how many processes this machine has.
        is_first: whether this is the process that prints and writes.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.is_first = self.rank == 0

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Connect the processes. `total`, `largest` and DistributedDataParallel work in this context."""
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The others wait while the first one makes masks or validates, so the timeout is long. If a process dies,
        # torchrun ends the others.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        self.device = device
        try:
            yield
        finally:
            dist.destroy_process_group()

    def total(self, values: list[float]) -> list[float]:
        """Sum each value over all processes. All of them must call this at the same time."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """Return the largest value of all processes. All of them must call this at the same time."""
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def _reduced(self, values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, operation)
        totals: list[float] = reduced.tolist()
        return totals

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()
