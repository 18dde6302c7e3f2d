"""Where the network runs, how many threads it may take there, and what to do where it cannot."""

import os
from contextlib import contextmanager

import torch

from lsdseg.errors import DeviceError, UserError


def resolve_device(cfg, busy_cores: int = 0, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The torch device of TRAIN.DEVICE ("auto": the first GPU if there is one, else the CPU); sets the CPU threads.

    TRAIN.THREADS 0 is OMP_NUM_THREADS if that is set, else one thread for each core but `busy_cores`, which other
    processes work on: a thread that shares its core makes all others wait for it, and a training step can take ten
    times as long.

    Raises:
        UserError: it names a GPU that this machine does not have.
    """
    name = cfg.TRAIN.DEVICE
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    elif name in ("multi_gpu", "cuda"):
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"TRAIN.DEVICE is {cfg.TRAIN.DEVICE!r} ({name}), but there are {torch.cuda.device_count()} GPUs here: "
            "set it to 'auto' or 'cpu', or start fewer processes"
        )
    from_environment = int(os.environ.get("OMP_NUM_THREADS") or 0)
    free_cores = max(1, len(os.sched_getaffinity(0)) // local_size - busy_cores)
    torch.set_num_threads(cfg.TRAIN.THREADS or from_environment or free_cores)
    return device


@contextmanager
def explain_device_errors(less_memory: str):
    """Run a network, and say what to do where memory does not suffice for it, or where torch.compile fails.

    Args:
        less_memory: what to do so that it needs less memory.

    Raises:
        DeviceError: in place of PyTorch's errors in these two cases.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise DeviceError(f"there is too little memory for the network: {less_memory}") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).splitlines()[0]
            raise DeviceError(
                f"TRAIN.COMPILE is True, but compiling the network failed ({reason}): see that a C++ compiler is "
                "installed, or set it to False"
            ) from error
        raise


class Precision:
    """TRAIN.MIXED_PRECISION: the autocast context and memory format of the network.

    Reduced precision goes with channels-last memory: that is the layout in which tensor cores, and the matrix units
    of recent CPUs, run convolutions at full speed. On a CPU with AMX the two together are several times as fast as
    float32, each alone is not. "auto" is bf16 where the device has such units, else "no".
    """

    DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}

    def __init__(self, name: str, device: torch.device):
        self.device = device
        if name == "auto":
            if device.type == "cuda":
                fast = torch.cuda.is_bf16_supported(including_emulation=False)
            else:
                fast = torch.cpu._is_amx_tile_supported()
            name = "bf16" if fast else "no"
        self.dtype = self.DTYPES[name]
        if self.dtype == torch.float16 and device.type == "cpu":
            raise UserError("TRAIN.MIXED_PRECISION is 'fp16' on a CPU: set it to 'bf16' or 'no'")

    def autocast(self):
        """Context manager in which the network's forward pass runs."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def place(self, x):
        """Move a module or a batch (4D or 5D) to the device, in the memory format that the precision asks for."""
        if self.dtype is None:
            return x.to(self.device)
        dims = max(p.ndim for p in x.parameters()) if isinstance(x, torch.nn.Module) else x.ndim
        memory_format = torch.channels_last if dims == 4 else torch.channels_last_3d
        return x.to(self.device, memory_format=memory_format)
