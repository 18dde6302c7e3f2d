"""Time how long scripts and workers take to start.

    python benchmarks/startup.py

First, `--help` of every script against a Python that does nothing. Then the first block of a prediction: from the call
that starts a worker until its block is written, against a process that imports torch and loads the same network. The
block is small, and how long it takes by itself is printed, too. Seconds, taken in turns.
"""

import argparse
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial

from yacs.config import CfgNode

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.data_utils.layout import data_folder
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep, Summary
from lsdseg.engine.predict import blockwise
from ratios import Rows, add_options, in_turns, wall_seconds

CONFIG = "pretrained/config_fib25.py"
LONGEST_HELP = 0.5  # seconds
EDGE = 32  # voxels of the volume, which is one block
LOAD = """
import sys, torch
from lsdseg.config.loader import load_config
from lsdseg.engine.network import load_network
load_network(load_config(sys.argv[1], sys.argv[2:]))
"""


def main() -> None:
    """Print a row for each script, and one for the worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, repeats=5)
    args = parser.parse_args()
    rows = Rows(args.json)
    time_help(rows, args.repeats)
    time_worker(rows, args.repeats)


def time_help(rows: Rows, repeats: int) -> None:
    """Print a row for each script."""
    for script in sorted([*CHECKOUT.glob("*.py"), *CHECKOUT.glob("data_utils/*.py")]):
        name = script.relative_to(CHECKOUT)
        run(script, "--help")  # compiles to bytecode, and reads from disk
        helps, starts = in_turns(
            repeats, partial(wall_seconds, run, script, "--help"), partial(wall_seconds, run, "-c", "")
        )
        rows.print(f"{name} --help", helps, "start of Python", starts, goal=LONGEST_HELP, goal_in="s")


def time_worker(rows: Rows, repeats: int) -> None:
    """Print a row for the first block of a worker."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        settings = {
            "DATA.HOME": folder,
            "DATA.DROP_DS_MONGOTABLE": True,
            "SYSTEM.NUM_WORKERS": 1,
            "MODEL_ISO.INPUT_SHAPE": (EDGE,) * 3,
            "MODEL_ISO.GROW_INPUT": (0, 0, 0),
        }
        keys = [str(part) for item in settings.items() for part in item]
        cfg = load_config(CONFIG, keys)
        path = data_folder(cfg, "test") / "phantom.zarr"
        write_phantom(path, (EDGE,) * 3, seed=0, voxel_size=cfg.MODEL.VOXEL_SIZE)
        alone: list[float] = []
        loading = partial(wall_seconds, run, "-c", LOAD, CHECKOUT / CONFIG, *keys)
        firsts, loads = in_turns(repeats, partial(first_block, cfg, alone), loading)
    rows.print("first block of a worker", firsts, "import torch and load the network", loads, goal=1.3)
    print(f"the block alone takes {statistics.median(alone):.2f} s")


def first_block(cfg: CfgNode, alone: list[float]) -> float:
    """Predict the volume in blocks.

    Args:
        cfg: the config.
        alone: gets the seconds that the block itself takes.

    Returns:
        Seconds from the call that starts the worker until it has written its block.
    """
    seconds = math.nan

    def timed_run(cfg: CfgNode, step: BlockStep) -> Summary:
        nonlocal seconds
        began = time.time()
        summary = run_blocks(cfg, step)
        log = step.folder / "worker_0.log"  # its last line is that of the block
        seconds = log.stat().st_mtime - began
        alone.append(summary.seconds_per_block)
        return summary

    vars(blockwise)["run_blocks"] = timed_run
    with redirect_stdout(io.StringIO()):
        blockwise.predict_blockwise(cfg)
    return seconds


def run(*words: object) -> None:
    """Run Python with these arguments; only errors are shown."""
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
