"""What TRAIN.MIXED_PRECISION "auto" means: the precision in which this network is fastest on this device.

Which one that is cannot be said from a list of devices: it depends on the processor, the PyTorch release and the widths
of the layers. So a few passes are timed, once for each network and device. The result is kept in a file, for two
reasons: timing takes seconds, and workers that time side by side would disturb each other and could choose differently.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsdseg.engine.device import Precision
from lsdseg.engine.memory import processor

CANDIDATES = ("no", "bf16")
# A pass is run this many times, or until it took this many seconds.
REPEATS, ENOUGH = 4, 3.0
# Reduced precision is chosen only if it changes the outputs, on average, by less than the values on disk can tell.
LARGEST_DIFFERENCE = 1 / 255

# Runs a network in a precision, and returns what comes out, with values in 0..1.
Pass = Callable[[nn.Module, Precision], Sequence[Tensor]]


def find_precision(name: str, device: torch.device, network: nn.Module, run: Pass) -> Precision:
    """Return the precision of TRAIN.MIXED_PRECISION.

    Args:
        name: "no", "bf16", "fp16", or "auto": the fastest of "no" and "bf16", from the file of an earlier call or by
            timing them now.
        device: where the network will run.
        network: the network. It is not changed.
        run: what to time. It must do the same with each precision.

    Raises:
        UserError: fp16 on a CPU.
    """
    if name == "auto":
        with measured(device, network, run) as kept:
            if kept.get("precision") not in CANDIDATES:
                kept["precision"] = time_precisions(device, network, run)
            name = kept["precision"]
    return Precision(name, device)


def time_precisions(device: torch.device, network: nn.Module, run: Pass) -> str:
    """Time a pass in each precision, and return the name of the fastest one."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "no"
    seconds: dict[str, float] = {}
    outputs: dict[str, Sequence[Tensor]] = {}
    for name in CANDIDATES:
        precision = Precision(name, device)
        placed = precision.place(copy.deepcopy(network))
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < ENOUGH:
            began = time.perf_counter()
            outputs[name] = run(placed, precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        seconds[name] = min(times)
    exact, reduced = (outputs[name] for name in CANDIDATES)
    difference = max((a.float() - b.float()).abs().mean().item() for a, b in zip(exact, reduced, strict=True))
    return min(CANDIDATES, key=seconds.__getitem__) if difference < LARGEST_DIFFERENCE else CANDIDATES[0]


def _key(device: torch.device, network: nn.Module, run: Pass) -> str:
    """Return a hash of all that decides which precision is the fastest, and of the weights' shapes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        amx = torch.cpu._is_amx_tile_supported()
        name = f"{processor()} {torch.backends.cpu.get_cpu_capability()} {amx}"
        name += f" {torch.get_num_threads()} threads"
    shapes = [(key, list(values.shape)) for key, values in network.state_dict().items()]
    text = json.dumps([name, torch.__version__, run.__qualname__, shapes])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@contextmanager
def measured(device: torch.device, network: nn.Module, run: Pass) -> Iterator[dict[str, Any]]:
    """Yield what is kept of a network on a device, and keep what the body leaves in it. Others wait meanwhile.

    Without a home folder to write to, nothing is kept.
    """
    key = _key(device, network, run)
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    path = Path(cache) / "lsdseg" / f"network_{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except (OSError, RuntimeError):
        yield {}
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        try:
            kept = dict(json.load(file))
        except (ValueError, TypeError):  # new, or damaged
            kept = {}
        before = dict(kept)
        yield kept
        if kept != before:
            file.truncate(0)
            json.dump(kept, file)
