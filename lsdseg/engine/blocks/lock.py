"""Locks that keep two runs from writing the same thing, or one from replacing what another reads.

Locks are taken before a run looks at what is there, and held until it is done with it: a run that is held up in between
would otherwise go on with what another has changed. The operating system gives a lock back when its holder ends,
however it ends, so none is ever left behind; the empty files stay.
"""

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lsdseg.data_utils.layout import block_markers
from lsdseg.errors import UserError
from lsdseg.files import explain_os_errors, room_on_disk

SECONDS_TO_WAIT = 20

_held: set[Path] = set()  # locks that this process holds alone


@contextmanager
def working_on(output: Path, *steps: str, reads: Sequence[str] = ()) -> Iterator[None]:
    """Keep other runs from what steps write to an output, and from replacing what they read there.

    Args:
        output: the output zarr of a sample.
        steps: what is written; only one run at a time writes the results of a step.
        reads: steps whose results are read; many runs may read them, and none may write them meanwhile.

    Raises:
        UserError: there is no output to read; another run is at work on it; the disk becomes full.
    """
    if reads and not output.is_dir():
        raise UserError(f"{output} does not exist: run predicter.py first")
    with ExitStack() as locks:
        for step in (*steps, *reads):
            locks.enter_context(step_lock(block_markers(output, step), alone=step in steps))
        locks.enter_context(room_on_disk(output))
        yield


@contextmanager
def step_lock(markers: Path, alone: bool = True) -> Iterator[None]:
    """Keep other runs from the results of one step, which this folder of markers describes; as `run_lock`."""
    with run_lock(markers.with_name(f"{markers.name}.lock"), f"in {markers}", alone):
        if alone:
            with workers_lock(markers, alone=True):
                pass  # workers of a run that was killed have ended
        yield


@contextmanager
def workers_lock(markers: Path, alone: bool = False) -> Iterator[None]:
    """Hold what tells other runs that workers may still write the results of a step; as `run_lock`."""
    with run_lock(markers.with_name(f"{markers.name}.workers.lock"), f"in {markers}", alone):
        yield


def is_locked(file: Path) -> bool:
    """Return whether a run holds a lock."""
    try:
        with open(file) as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:  # nobody ever took it
        return False


@contextmanager
def run_lock(file: Path, where: str, alone: bool = True) -> Iterator[None]:
    """Keep other runs out. A process that holds a lock alone may take it again.

    What is left of a run that was killed ends within seconds, so a lock that is held is waited for.

    Args:
        file: the lock; it is created if it is missing.
        where: "in FOLDER", for the message.
        alone: False shares it with others that share it.

    Raises:
        UserError: another run holds the lock.
    """
    if file in _held:
        yield
        return
    with explain_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = open(file, "a+")  # noqa: SIM115 -- closed below; errors of the body are not those of this file
    with opened:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                fcntl.flock(opened, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another run works {where}: wait for it to end, or start this one in another folder, "
                        "with another DATA.OUTFILE if it is the same volume and checkpoint"
                    ) from None
                time.sleep(0.2)
        if alone:
            _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
