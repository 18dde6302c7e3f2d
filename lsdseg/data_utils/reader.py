"""A process that reads with tensorstore for a process that was forked.

tensorstore has threads, which a fork does not copy, and ends a forked process that uses it. gunpowder forks the workers
that make training batches. So each of them starts a reader, a fresh process, when it first needs one, and asks it for
boxes. A reader ends with the process that started it, however that ends.
"""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from numpy.typing import NDArray


class Reader:
    """A process that reads."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            end = theirs.fileno()
            # Not multiprocessing's own spawn, which imports the script of the user once more.
            command = [sys.executable, "-c", f"from lsdseg.data_utils.reader import serve; serve({end})"]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            # A session of its own, so that Ctrl-C, which workers ignore, does not end it.
            self.process = subprocess.Popen(command, pass_fds=[end], env=environment, start_new_session=True)

    def read(self, spec: dict[str, Any], where: Any) -> NDArray[Any]:
        """Read what slices choose of an array that a spec of tensorstore describes.

        Raises:
            OSError: it cannot be read, or the process has ended.
        """
        try:
            self.connection.send((json.dumps(spec), where))
            answer: NDArray[Any] | OSError = self.connection.recv()
        except (EOFError, ConnectionError):
            raise OSError("the process that reads has ended") from None
        if isinstance(answer, OSError):
            raise answer
        return answer


def reader() -> Reader:
    """Return the reader of this process; it is started on the first call."""
    return _reader_of(os.getpid())


@functools.cache
def _reader_of(_process: int) -> Reader:
    return Reader()


def serve(end: int) -> None:
    """Answer what `Reader.read` asks, until the other end of the connection is closed.

    Args:
        end: descriptor of this end.
    """
    from lsdseg.data_utils.tensorstores import LazyStore, open_spec

    @functools.cache
    def store(spec: str) -> LazyStore:
        return LazyStore(open_spec(json.loads(spec)))

    with Connection(end) as connection, suppress(EOFError, ConnectionError):
        while True:
            spec, where = connection.recv()
            try:
                answer: Any = store(spec)[where]
            except Exception as error:  # whatever it is, the other process says it in one line
                answer = OSError(str(error))
            connection.send(answer)
