"""Stop a run early, on SIGINT or SIGTERM: finish the current iteration, then save a checkpoint."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

from lsdseg.engine.signals import signal_handlers


class _Interrupted(BaseException):
    """Raised if a signal arrives while the process only waits."""


class StopRequest:
    """Whether a signal has asked the run to stop. It is the signal handler.

    Attributes:
        signal_number: the number of the first signal, None if none arrived.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._process = os.getpid()
        self._waiting = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end the body of this context at once. The program continues after it."""
        self._waiting = True
        try:
            yield
        except _Interrupted:
            pass
        finally:
            self._waiting = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal. The second one ends the process at once.

        Raises:
            KeyboardInterrupt: this is the second signal.
            _Interrupted: the process is in the context `interruptible`.
        """
        if os.getpid() != self._process:
            self._handle_in_worker(number)
            return
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
        tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint")
        if self._waiting:
            raise _Interrupted

    def _handle_in_worker(self, number: int) -> None:
        """Handle a signal in a process that was forked later. Terminals and schedulers send signals to all processes.

        Workers ignore Ctrl-C: the main process decides when they end. gunpowder ends workers that make batches with
        SIGTERM. The process that watches over these workers ends them, and itself by an exception. It then releases the
        locks that it shares with the main process, which would otherwise wait for them forever.

        Raises:
            _Interrupted: this is the process that watches over the others.
        """
        if number == signal.SIGINT or self.signal_number:
            return
        if os.getppid() != self._process:
            os._exit(128 + number)
        self.signal_number = number
        raise _Interrupted


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM in this context, which provides the `StopRequest`."""
    stop = StopRequest()
    with signal_handlers(stop, signal.SIGINT, signal.SIGTERM):
        yield stop
