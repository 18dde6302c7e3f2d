"""What this machine has: memory for this process or for a worker, and which processor."""

import os
import platform
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


def processor() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: *(.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
