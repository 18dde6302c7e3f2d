"""Signs of life: a process touches a file for as long as it runs, and whoever waits for it ends it if it falls silent.

A process that is stopped (SIGSTOP), or whose machine is gone, ends no connection and reports no error.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

SECONDS_BETWEEN_SIGNS = 2.0


def show_life(file: Path) -> None:
    """Touch a file that exists every few seconds, from a thread, until this process ends."""

    def touch() -> None:
        while True:
            with suppress(OSError):
                os.utime(file)
            time.sleep(SECONDS_BETWEEN_SIGNS)

    threading.Thread(target=touch, daemon=True).start()


class Listener:
    """Watches for signs of life in a file, by the clock of this machine.

    Args:
        file: what the process touches, or writes to.
    """

    def __init__(self, file: Path):
        self.file = file
        self.last_sign = self._sign()
        self.heard: float | None = None

    def silence(self) -> float:
        """Seconds since the last sign; 0 before the first: a job may wait in its queue for days."""
        sign = self._sign()
        if sign != self.last_sign:
            self.last_sign, self.heard = sign, time.monotonic()
        return 0.0 if self.heard is None else time.monotonic() - self.heard

    def _sign(self) -> tuple[int, int] | None:
        try:
            status = self.file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, even if this one is stopped then."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def is_stopped(process: int) -> bool:
    """Whether a process of this machine has been stopped (SIGSTOP)."""
    try:
        status = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] == b"T"
