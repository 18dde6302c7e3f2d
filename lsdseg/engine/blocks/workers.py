"""Workers of a run, whatever starts them: one subclass of `Workers` for each CLUSTER.TYPE.

`config.implementations.SCHEDULERS` lists them. A new scheduler (LSF, Kubernetes ...) is a subclass in a file of its
own, as `slurm.py` is, and an entry there.
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from lsdseg.config.implementations import SCHEDULERS, resolve
from lsdseg.engine.blocks.life import is_stopped


class Workers(ABC):
    """Starts, watches and ends the workers of one run.

    Args:
        cfg: the config.
        folder: of the run; its name is a name for jobs and queues.
        gpu: workers use a GPU.
        count: how many there are at a time.
        environment: environment variables of the workers.
    """

    # Whether the kernel may end the supervisor with the master, because the workers end with the supervisor.
    all_on_this_machine = False

    def __init__(self, cfg: CfgNode, folder: Path, gpu: bool, count: int, environment: Mapping[str, str]):
        self.cfg, self.folder, self.gpu, self.count = cfg, folder, gpu, count
        threads = str(self.threads(cfg, count))
        # Threads that share a core with another worker wait for each other.
        self.environment = {**environment, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}

    @classmethod  # noqa: B027 -- there is nothing to check unless a subclass says so
    def check_installed(cls) -> None:
        """Raise UserError if such workers cannot be started from this machine."""

    @classmethod
    def host(cls, cfg: CfgNode) -> str | None:
        """Address that the workers connect to; None lets daisy find one under which others reach this machine."""
        return cfg.CLUSTER.HOST or None

    @classmethod
    @abstractmethod
    def threads(cls, cfg: CfgNode, count: int) -> int:
        """How many threads one of so many workers may use."""

    @abstractmethod
    def start(self, number: int, command: Sequence[str], log: Path) -> Any:
        """Start a worker.

        Args:
            number: 0 ... count - 1; one that takes the place of another has its number.
            command: what to run.
            log: file that its output is appended to.

        Returns:
            The worker, for `end_of`.

        Raises:
            UserError: the scheduler refuses it.
        """

    @abstractmethod
    def end_of(self, worker: Any) -> str | None:
        """How a worker ended: None if it waits or runs, "" if it ended well, else a description."""

    def is_stopped(self, worker: Any) -> bool:
        """Whether a worker is known to be stopped (SIGSTOP), so that it will do nothing more."""
        return False

    @abstractmethod
    def kill(self, worker: Any) -> None:
        """End a worker at once, even if it is stopped; `end_of` tells when it has ended."""

    @abstractmethod
    def stop(self) -> None:
        """End all workers that were ever started, at once: a block may be broken off anywhere."""


def workers_class(cfg: CfgNode) -> type[Workers]:
    """The workers that CLUSTER.TYPE chooses."""
    chosen: type[Workers] = resolve(SCHEDULERS[cfg.CLUSTER.TYPE])
    return chosen


class LocalWorkers(Workers):
    """Processes on this machine; they share out the GPUs if TRAIN.DEVICE is multi_gpu."""

    all_on_this_machine = True

    def __init__(self, cfg: CfgNode, folder: Path, gpu: bool, count: int, environment: Mapping[str, str]):
        super().__init__(cfg, folder, gpu, count, environment)
        self.devices = _shared_devices(cfg) if gpu else []
        self.processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def host(cls, cfg: CfgNode) -> str | None:
        return "127.0.0.1"

    @classmethod
    def threads(cls, cfg: CfgNode, count: int) -> int:
        return max(1, len(os.sched_getaffinity(0)) // count)

    def start(self, number: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        device = {"CUDA_VISIBLE_DEVICES": self.devices[number % len(self.devices)]} if self.devices else {}
        with open(log, "ab") as out:
            # In a session of its own, for Ctrl-C to reach the master alone.
            process = subprocess.Popen(
                command, env=self.environment | device, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        return process

    def end_of(self, worker: subprocess.Popen[bytes]) -> str | None:
        status = worker.poll()
        if status is None:
            return None
        return f"process {worker.pid} ended with status {status}" if status else ""

    def is_stopped(self, worker: subprocess.Popen[bytes]) -> bool:
        return is_stopped(worker.pid)

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        worker.kill()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _shared_devices(cfg: CfgNode) -> list[str]:
    """CUDA numbers of the GPUs that workers here share out; none unless TRAIN.DEVICE is multi_gpu."""
    if cfg.TRAIN.DEVICE != "multi_gpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    return [device for device in visible.split(",") if device][: cfg.SYSTEM.NUM_GPUS]
