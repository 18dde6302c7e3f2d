"""Measure the overhead of a block: local workers process blocks that do nothing.

    python benchmarks/block_overhead.py --blocks 100000 --workers 2
    python benchmarks/block_overhead.py --blocks 640 --workers 64 --sleep 1

Starting the workers does not count. It is measured in a run with one block per worker, and subtracted. The same is done
with daisy alone, whose workers leave no record of what is done. Both take turns, --repeats times; medians are printed.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from yacs.config import CfgNode


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[Any], None]:
    """Open a worker that does nothing with its blocks, for some time."""
    return lambda block: time.sleep(arguments["seconds"])


def seconds(blocks: int, workers: int, sleep: float) -> float:
    """Return the wall time of a run in an empty folder."""
    from funlib.geometry import Roi

    from lsdseg.config.loader import load_config
    from lsdseg.engine.blocks.run import run_blocks
    from lsdseg.engine.blocks.step import BlockStep

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        block = Roi((0, 0, 0), (8, 8, 8))
        step = BlockStep(
            name="nothing",
            sample="benchmark",
            total_roi=Roi((0, 0, 0), (8, 8, 8 * blocks)),
            read_roi=block,
            write_roi=block,
            open_worker="benchmarks.block_overhead:open_worker",
            arguments={"seconds": sleep},
            markers=Path(folder, "markers"),
        )
        cfg = load_config(overrides=["SYSTEM.NUM_WORKERS", str(workers)])
        began = time.monotonic()
        run_blocks(cfg, step)
        return time.monotonic() - began


def seconds_of_daisy(blocks: int, workers: int, sleep: float) -> float:
    """Return the wall time of the same with daisy alone."""
    import daisy
    from funlib.geometry import Roi

    def work() -> None:
        client = daisy.Client()
        while True:
            with client.acquire_block() as block:
                if block is None:
                    return
                time.sleep(sleep)

    block = Roi((0, 0, 0), (8, 8, 8))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        total = Roi((0, 0, 0), (8, 8, 8 * blocks))
        task = daisy.Task("nothing", total, block, block, work, read_write_conflict=False, max_workers=workers)
        began = time.monotonic()
        daisy.Server().run_blockwise(task, progress=False, summary=False, block_tracking=False)
        return time.monotonic() - began


def main() -> None:
    """Measure and print a line for each."""
    import ratios

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2000, help="number of blocks (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of workers (default %(default)s)")
    parser.add_argument("--sleep", type=float, default=0.0, help="seconds that a block takes (default %(default)s)")
    ratios.add_options(parser, repeats=1)
    args = parser.parse_args()
    if args.blocks <= args.workers:
        parser.error(f"--blocks {args.blocks}: there must be more blocks than workers ({args.workers})")
    rows = ratios.Rows(args.json)
    names = {"this suite": seconds, "daisy alone": seconds_of_daisy}
    starts: dict[str, list[float]] = {name: [] for name in names}

    def each(name: str) -> float:
        start = names[name](args.workers, args.workers, args.sleep)
        starts[name].append(start)
        return (names[name](args.blocks, args.workers, args.sleep) - start) / (args.blocks - args.workers)

    measured = ratios.in_turns(args.repeats, *(partial(each, name) for name in names))
    for name, costs in zip(names, measured, strict=True):
        print(
            f"{name}: {args.blocks} blocks on {args.workers} workers, {os.cpu_count()} cores: "
            f"{median(costs) * 1000:.3f} ms per block, {median(starts[name]):.1f} s to start and end"
        )
    ours, theirs = ([cost * 1000 for cost in costs] for costs in measured)
    if min(ours + theirs) <= 0:
        print(f"{args.blocks} blocks take no longer than starting the workers: take more --blocks for a ratio")
        return
    about = f"{args.blocks} blocks of {args.sleep:g} s, {args.workers} workers"
    rows.add(f"a block that does nothing: {about}", ours, "daisy alone", theirs, unit="ms", goal=1.2)


if __name__ == "__main__":
    main()
