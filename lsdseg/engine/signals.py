"""Handlers for signals, installed for as long as a block of code runs."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def signal_handlers(handler: Callable, *numbers: signal.Signals) -> Iterator[None]:
    """Let `handler(number, frame)` take the signals in the body; afterwards the handlers of before do again."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
