"""How much memory this process, or a worker, may take."""

import os
import re
from contextlib import suppress
from pathlib import Path

from yacs.config import CfgNode

# What a worker on another machine has at least.
ELSEWHERE = 4 * 10**9


def available_memory() -> int:
    """Return the bytes that are free on this machine, or in the control group of this process if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file() and (found := re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text(encoding="utf-8"))):
        limits.append(int(found[1]) * 1024)
    with suppress(OSError, ValueError):  # no such group, or no limit: "max"
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(limits))


def worker_memory(cfg: CfgNode) -> int | None:
    """Return the bytes that a worker has if it is alone: what is free here, or what a job asks for. None: unknown."""
    if cfg.CLUSTER.TYPE == "local":
        return available_memory()
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", cfg.CLUSTER.MEMORY.strip().upper())
    return int(found[1]) * 1024 ** (" KMGT".index(found[2] or "M")) if found else None
