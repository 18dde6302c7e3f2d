"""How a run ends early: by SIGINT or SIGTERM, after the step in progress, and with a checkpoint."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from lsdseg.engine.signals import signal_handlers


class _Stopped(BaseException):
    """Raised where a signal comes while there is no step to end."""


class Stop:
    """What the first signal did. `number` is its number, None before it came."""

    def __init__(self):
        self.number: int | None = None
        self._process = os.getpid()
        self._waiting = False

    @contextmanager
    def while_waiting(self) -> Iterator[None]:
        """Context manager whose body a signal ends at once: the program goes on behind it."""
        self._waiting = True
        try:
            yield
        except _Stopped:
            pass
        finally:
            self._waiting = False

    def __call__(self, number: int, _frame) -> None:
        """Handle a signal. The second one ends the process at once."""
        if os.getpid() != self._process:
            self._in_worker(number)
            return
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint")
        if self._waiting:
            raise _Stopped

    def _in_worker(self, number: int) -> None:
        """Handle a signal in a process that was forked meanwhile; terminals and schedulers send it to all of them.

        Ctrl-C leaves them alone: the first process decides when they end. By SIGTERM gunpowder ends those that make
        batches. The one that looks after these ends them and itself, by an exception, so that it lets go of the locks
        that it shares with the first process, which would wait for them for ever.
        """
        if number == signal.SIGINT or self.number:
            return
        if os.getppid() != self._process:
            os._exit(128 + number)
        self.number = number
        raise _Stopped


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Context manager that gives a `Stop`, which takes SIGINT and SIGTERM until its end."""
    stop = Stop()
    with signal_handlers(stop, signal.SIGINT, signal.SIGTERM):
        yield stop
