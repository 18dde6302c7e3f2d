"""A step on one sample, block by block: what is to be done, and how it went."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from funlib.geometry import Roi
from numpy.typing import NDArray

from lsdseg.data_utils.layout import log_folder
from lsdseg.data_utils.placement import to_nanometers


class Work(NamedTuple):
    """What doing a block took.

    Attributes:
        computed: voxels, with their context.
        written: voxels of the volume.
    """

    computed: int
    written: int


NOTHING = Work(0, 0)  # the block was empty
RETRIES = 3  # of a block that fails, and of starting over when nothing gets done
# Files in the folder of a run, for its workers and for `status.py`:
STEP = "step.json"  # what is done with which blocks
SKIPPED = "skipped"  # a bit for each block that need not be done; missing if there is none


@dataclass
class BlockStep:
    """What is to be done with every block of a volume. ROIs are z, y, x, in the unit of the volume.

    Attributes:
        name: the step; logs go to daisy_logs/SAMPLE_NAME/.
        sample: name of the sample that it works on.
        total_roi: everything that is read: the volume, grown by the context.
        read_roi: what the first block reads, its context included.
        write_roi: what the first block writes. Blocks at the end are cut off.
        open_worker: "module:function", called once in every worker as function(cfg, arguments); what it returns is
            called with each `daisy.Block`, and returns its `Work`, or None if nobody asks for that. A block may be
            done twice, or be broken off and done again, so doing it must replace what is there. A UserError that is no
            DamagedError ends the whole run.
        arguments: for open_worker; what JSON can hold, paths absolute.
        markers: folder that records which blocks are done; it belongs beside the outputs that it describes.
        settings: {key: value} of all settings on which the result depends; finished blocks are only good for these.
        gpu: workers use a GPU.
        timeout: seconds after which a block counts as stuck and its worker is replaced.
        silence: seconds without a sign of life, beyond the timeout, after which a worker is replaced. A network file
            system may show such a sign a minute late.
        skip: bool array over the grid of blocks, True for those that need not be done. None: do all.
        per_nanometer: how many of the units of the ROIs are a nanometer.
        rate: takes the number of workers, and returns the name under which it is kept what the blocks took, see
            `rates.py`. None: it is not kept.
        may_skip: the result is of use without blocks that fail, if CLUSTER.SKIP_FAILED says to go on.
    """

    name: str
    sample: str
    total_roi: Roi
    read_roi: Roi
    write_roi: Roi
    open_worker: str
    arguments: dict[str, Any]
    markers: Path
    settings: dict[str, Any] = field(default_factory=dict)
    gpu: bool = False
    timeout: float = 3600.0
    silence: float = 90.0
    skip: NDArray[np.bool_] | None = None
    per_nanometer: int = 1
    rate: Callable[[int], str] | None = None
    may_skip: bool = True

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        written = self.total_roi.end - (self.read_roi.end - self.write_roi.end) - self.write_roi.begin
        return tuple(-(-size // block) for size, block in zip(written, self.write_roi.shape, strict=True))

    @property
    def first_block(self) -> tuple[list[float], list[float]]:
        """Begin and shape in nm of what the first block writes."""
        return self.in_nanometers(self.write_roi)

    def in_nanometers(self, roi: Roi) -> tuple[list[float], list[float]]:
        """Begin and shape of a ROI in nm."""
        begin, shape = (list(to_nanometers(edge, self.per_nanometer)) for edge in (roi.begin, roi.shape))
        return begin, shape

    @property
    def folder(self) -> Path:
        """Where config, arguments and logs go: daisy_logs/SAMPLE_NAME below the current directory."""
        return log_folder(self.sample, self.name)

    def __str__(self) -> str:
        return f"{self.name} of {self.sample}"


@dataclass
class Summary:
    """How a run went.

    Attributes:
        blocks: how many there are.
        done: how many this run did.
        skipped: how many were done before, or are masked.
        failed: how many failed for good.
        seconds_per_block: mean time of a block.
        seconds: of all workers, in blocks.
        bytes: that they wrote.
        elapsed: seconds from begin to end.
        peak_memory: of the worker that took most, in bytes.
    """

    blocks: int
    done: int
    skipped: int
    failed: int
    seconds_per_block: float = 0.0
    seconds: float = 0.0
    bytes: int = 0
    elapsed: float = 0.0
    peak_memory: int = 0

    def __str__(self) -> str:
        titles = ("blocks", "done", "skipped", "failed", "s per block", "peak memory of a worker")
        memory = f"{self.peak_memory / 1e9:.2f} GB"
        values = (self.blocks, self.done, self.skipped, self.failed, f"{self.seconds_per_block:.2f}", memory)
        return "\n".join(
            "".join(f"{cell:>{len(title) + 3}}" for cell, title in zip(row, titles, strict=True))
            for row in (titles, values)
        )
