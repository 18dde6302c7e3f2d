"""What a step takes that one process does for the whole volume, or workers do in a tree of blocks."""

import resource
import time

from yacs.config import CfgNode

from lsdseg.engine.blocks.rates import Rate, bytes_written, keep_rate
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep, Summary


class Stopwatch:
    """Adds up the time of this process and that of the workers of all runs, from its creation on.

    Args:
        cfg: the config.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg, self.began, self.written = cfg, time.monotonic(), bytes_written()
        self.runs: list[Summary] = []

    def run(self, step: BlockStep) -> Summary:
        """Do all blocks of a step, see `run_blocks`."""
        self.runs.append(run_blocks(self.cfg, step))
        return self.runs[-1]

    def keep(self, name: str, parts: int, voxels: int) -> None:
        """Keep what it took, unless an earlier run did some of it.

        Args:
            name: see `rates.keep_rate`.
            parts: how many of what is made for the whole volume, such as look-up tables.
            voxels: of the volume.
        """
        if any(run.skipped for run in self.runs):
            return
        waited = sum(run.elapsed for run in self.runs)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000
        rate = Rate(
            blocks=parts,
            computed=parts * voxels,
            written=parts * voxels,
            seconds=max(0.0, time.monotonic() - self.began - waited) + sum(run.seconds for run in self.runs),
            bytes=bytes_written() - self.written + sum(run.bytes for run in self.runs),
            peak=max([own, *(run.peak_memory for run in self.runs)]),
            largest=voxels,
        )
        keep_rate(self.cfg, name, rate)
