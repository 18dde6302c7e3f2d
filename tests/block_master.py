"""A small task for tests of `lsdseg.engine.blocks`, what they do with it, and a script that runs it.

python tests/block_master.py --folder FOLDER SYSTEM.NUM_WORKERS 2
"""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from funlib.geometry import Coordinate, Roi

from lsdseg.cli import run_script
from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep
from lsdseg.engine.blocks.supervisor import ALIVE

VOLUME = Roi((80, 0, 40), (100, 120, 90))
BLOCK = Coordinate(40, 40, 30)
CONTEXT = Coordinate(10, 10, 0)
BLOCKS = 27


def toy_task(folder, seconds=0.0, **changes):
    """27 blocks, the last along z cut off; `FOLDER/trouble` says what goes wrong, see `tests.block_tasks`."""
    folder = Path(folder)
    for name in ("output", "trouble"):
        (folder / name).mkdir(exist_ok=True)
    block = Roi(VOLUME.begin, BLOCK)
    task = {
        "name": "toy",
        "sample": "sample",
        "total_roi": VOLUME.grow(CONTEXT, CONTEXT),
        "read_roi": block.grow(CONTEXT, CONTEXT),
        "write_roi": block,
        "open_worker": "tests.block_tasks:open_worker",
        "arguments": {"folder": str(folder), "seconds": seconds},
        "markers": folder / "markers",
        "settings": {"INS_SEGMENT.CONTEXT": tuple(CONTEXT), "DATA.FIB": 1},
    }
    return BlockStep(**(task | changes))


def config(workers, *overrides):
    return load_config(overrides=["SYSTEM.NUM_WORKERS", workers, *overrides])


def trouble(folder, name):
    """Make something go wrong until the file is removed, see `tests.block_tasks`."""
    (folder / "trouble").mkdir(exist_ok=True)
    file = folder / "trouble" / name
    file.touch()
    return file


def results(folder):
    """What the workers wrote: {block: report}."""
    return {int(file.name): json.loads(file.read_text()) for file in (folder / "output").glob("*")}


def master_command(folder, *arguments):
    """The command that runs the toy task as a user starts a script."""
    return list(map(str, [sys.executable, __file__, "--folder", folder, *arguments]))


def start_master(folder, *arguments):
    """`master_command` in a process of its own, its output in `master.log`."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    with (folder / "master.log").open("a") as log:
        command = master_command(folder, *arguments)
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def wait_for(condition, seconds=60):
    """Return when the condition holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@contextmanager
def meanwhile(action):
    """Do something in a thread while the body, a run, is at work; it has to succeed."""
    errors = []

    def run():
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not errors, errors


def supervisor(folder):
    """The id of the supervisor's process, once it is known."""
    file = folder / "daisy_logs" / "sample_toy" / ALIVE
    wait_for(lambda: file.is_file() and file.read_text())
    return int(file.read_text())


def _main(cfg, args):
    run_blocks(cfg, toy_task(args.folder, args.seconds))


def _add_arguments(parser):
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)


if __name__ == "__main__":
    run_script(
        _main, description="toy", example="see above", default_config="config/config.py", add_arguments=_add_arguments
    )
