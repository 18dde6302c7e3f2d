"""The device that a network runs on, its threads and its precision, and what to do when the device fails."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from lsdseg.errors import DeviceError, UserError

Network = TypeVar("Network", bound=nn.Module)


def resolve_device(cfg: CfgNode, busy_cores: int = 0, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Find the device that TRAIN.DEVICE names, and set the number of CPU threads.

    "auto" is the first GPU if there is one, otherwise the CPU. So are "cuda" and "cuda:0", as published configs have
    them, with a line that says so. TRAIN.THREADS 0 means OMP_NUM_THREADS if that is set,
    otherwise one thread per core that is not busy. A thread that shares its core delays all the others, and a training
    step can then take ten times as long.

    Args:
        cfg: the config.
        busy_cores: number of cores that other processes of this run need.
        local_rank: index of this process among those that train together on this machine.
        local_size: number of processes that train together on this machine.

    Raises:
        DeviceError: this machine does not have the GPU.
    """
    name = cfg.TRAIN.DEVICE
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    elif name in ("cuda", "cuda:0") and not torch.cuda.is_available():
        print(f"TRAIN.DEVICE is {name}, but this machine has no GPU: using the CPU", flush=True)
        name = "cpu"
    elif name in ("multi_gpu", "cuda"):
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"TRAIN.DEVICE is {cfg.TRAIN.DEVICE!r} ({name}), but this machine has {torch.cuda.device_count()} GPUs: "
            "set it to 'auto' or 'cpu', or start fewer processes"
        )
    # All patches and nearly all tiles have one shape, for which cuDNN then finds its fastest algorithm.
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(cpu_threads(cfg, busy_cores, local_size))
    return device


def cpu_threads(cfg: CfgNode, busy_cores: int = 0, local_size: int = 1) -> int:
    """Return how many CPU threads the network gets in this process; see `resolve_device`."""
    from_environment = int(os.environ.get("OMP_NUM_THREADS") or 0)
    free_cores = max(1, len(os.sched_getaffinity(0)) // local_size - busy_cores)
    return int(cfg.TRAIN.THREADS or from_environment or free_cores)


def gpus_of(cfg: CfgNode) -> int:
    """Return how many GPUs of this machine the workers of a prediction share out, 0 if they use the CPU."""
    if cfg.TRAIN.DEVICE == "cpu" or not torch.cuda.is_available():
        return 0
    return max(1, min(cfg.SYSTEM.NUM_GPUS, torch.cuda.device_count())) if cfg.TRAIN.DEVICE == "multi_gpu" else 1


@contextmanager
def explain_device_errors(memory_remedy: str) -> Iterator[None]:
    """Replace two errors of PyTorch by messages that say what to do: out of memory, and a failed torch.compile.

    Args:
        memory_remedy: how the user can make the network need less memory.

    Raises:
        DeviceError: one of the two happened in the context.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise DeviceError(f"not enough memory for the network: {memory_remedy}") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).splitlines()[0]
            raise DeviceError(
                f"TRAIN.COMPILE is True, but compiling the network failed ({reason}): install a C++ compiler, "
                "or set it to False"
            ) from error
        raise


class Precision:
    """The number format and memory layout of the network, as TRAIN.MIXED_PRECISION sets them.

    Reduced precision implies channels-last memory, the layout in which tensor cores and the matrix units of recent
    CPUs run convolutions at full speed. On a CPU with AMX, the two together are several times as fast as float32;
    either one alone is not. On a CPU, channels-last is faster in float32, too; numbers are the same up to rounding.

    Args:
        name: "no", "bf16" or "fp16"; `lsdseg.engine.fastest` finds the one that "auto" stands for.
        device: where the network runs.

    Attributes:
        device: as given.
        dtype: the reduced type, None for plain float32.

    Raises:
        UserError: fp16 on a CPU.
    """

    DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.dtype = self.DTYPES[name]
        if self.dtype == torch.float16 and device.type == "cpu":
            raise UserError("TRAIN.MIXED_PRECISION is 'fp16' on a CPU: set it to 'bf16' or 'no'")

    def autocast(self) -> torch.autocast:
        """Return the context in which the forward pass of the network must run."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @overload
    def place(self, x: Tensor) -> Tensor: ...

    @overload
    def place(self, x: Network) -> Network: ...

    def place(self, x: Any) -> Any:
        """Move a module or a batch (4D or 5D) to the device, in the memory layout that the precision needs."""
        if self.dtype is None and self.device.type != "cpu":
            return x.to(self.device)
        dims = max(p.ndim for p in x.parameters()) if isinstance(x, nn.Module) else x.ndim
        memory_format = torch.channels_last if dims == 4 else torch.channels_last_3d
        return x.to(self.device, memory_format=memory_format)
