"""Measure the overhead of a block: local workers process blocks that do nothing.

    python benchmarks/block_overhead.py --blocks 2000 --workers 2

Starting the workers does not count. It is measured in a run with one block per worker, and subtracted.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yacs.config import CfgNode


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[Any], None]:
    """Open a worker that does nothing with its blocks."""
    return lambda block: None


def seconds(blocks: int, workers: int) -> float:
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
            arguments={},
            markers=Path(folder, "markers"),
        )
        cfg = load_config(overrides=["SYSTEM.NUM_WORKERS", str(workers)])
        began = time.monotonic()
        run_blocks(cfg, step)
        return time.monotonic() - began


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2000, help="number of blocks (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of workers (default %(default)s)")
    args = parser.parse_args()
    start = seconds(args.workers, args.workers)
    total = seconds(args.blocks, args.workers)
    each = (total - start) / (args.blocks - args.workers)
    print(
        f"{args.blocks} blocks on {args.workers} workers, {os.cpu_count()} cores: "
        f"{each * 1000:.2f} ms per block, {start:.1f} s to start and end"
    )


if __name__ == "__main__":
    main()
