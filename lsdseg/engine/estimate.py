"""What segmenting a volume will cost, before it is begun: blocks, disk, memory and time of each step.

What a step takes per voxel is what runs have measured that wrote to the same folder (`blocks/rates.py`). Where there is
nothing yet, a small box of the volume goes through prediction, fragments and contacts now, and the other steps are
assumed to be as fast as on the machine of docs/results.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from yacs.config import CfgNode

from lsdseg.config.model_types import affinity_offsets
from lsdseg.data_utils.layout import measured_path
from lsdseg.data_utils.placement import nanometers
from lsdseg.data_utils.volumes import open_array
from lsdseg.engine.block_size import LIBRARIES, block_bytes, choose_block
from lsdseg.engine.blocks.rates import Rate, read_rates
from lsdseg.engine.blocks.status import duration
from lsdseg.engine.chain import Chain
from lsdseg.engine.device import gpus_of
from lsdseg.engine.measure import measure_box
from lsdseg.engine.memory import worker_memory
from lsdseg.engine.post.methods import method_that_scores
from lsdseg.engine.post.steps.edges import edges_rate, scoring_rate
from lsdseg.engine.post.steps.fragments import fragments_rate
from lsdseg.engine.post.steps.relabel import relabel_rate
from lsdseg.engine.post.steps.tables import tables_rate
from lsdseg.engine.predict.predict import prediction_channels
from lsdseg.engine.predict.rate import prediction_rate, threads_of_worker
from lsdseg.engine.predict.tile_size import count_tiles, tile_bytes, tile_voxels, tile_with_context
from lsdseg.errors import UserError
from lsdseg.files import byte_count, room_on_disk

# Seconds of one core for a million voxels; docs/results.md, "Large volumes" and "A tree of blocks". A box is too small
# to measure these steps.
SECONDS = {"scoring": 0.009, "tables": 0.001, "relabeling": 0.019}
# What a process takes for its libraries with those of the network.
WITH_NETWORK = 5 * 10**8
# Compressed, predictions and labels take about these shares of their size.
PREDICTION_SHARE, LABEL_SHARE = 0.6, 0.03
# What was measured on a volume of so many voxels counts as much as SECONDS.
LARGE = 10**9
SHIPPED = "shipped constants"


@dataclass(frozen=True)
class Estimate:
    """What one step will cost.

    Attributes:
        step: its name.
        blocks: how many.
        computed: voxels of all blocks, with their contexts.
        seconds: of workers, for all blocks.
        at_once: how many workers are at it side by side.
        disk: bytes, compressed.
        memory: bytes of each worker.
        source: where the time for a voxel comes from.
    """

    step: str
    blocks: int
    computed: int
    seconds: float
    at_once: int
    disk: int
    memory: int
    source: str

    @property
    def wall(self) -> float:
        """Seconds from begin to end."""
        return self.seconds / self.at_once


def estimates(chain: Chain) -> list[Estimate]:
    """Estimate the steps of a chain.

    Raises:
        UserError: the network or its device cannot be used, or there is no room on disk.
    """
    found = _Estimator(chain).all_steps()
    with room_on_disk(chain.out, sum(estimate.disk for estimate in found)):
        return found


class _Estimator:
    """Estimates the steps of a chain, one by one."""

    def __init__(self, chain: Chain):
        self.chain, self.cfg = chain, chain.cfg
        # Other volumes whose segmentations lie beside that of this one have work folders of their own.
        beside = sorted(chain.out.parent.glob(f"*_work/lsd_outputs/{measured_path(chain.cfg).name}"))
        self.rates = read_rates(dict.fromkeys([measured_path(chain.cfg), *beside]))
        self.shape = _network_shape(chain)
        self.workers = max(1, self.cfg.SYSTEM.NUM_WORKERS) if chain.blockwise else 1
        self.tile = tile_voxels(self.cfg, self.shape, self.workers)
        self.block = list(_block(chain, self.shape)) if chain.blockwise else self.shape

    def all_steps(self) -> list[Estimate]:
        """Estimate every step that is made of blocks, tables or the graph."""
        cfg, settings, voxels = self.cfg, self.cfg.INS_SEGMENT, math.prod(self.shape)
        labels, thresholds = int(voxels * 8 * LABEL_SHARE), len(self.chain.results)
        method = method_that_scores(self.chain.merge_function)
        context = method.reach([tuple(offset) for offset in affinity_offsets(cfg)])
        return [
            self._prediction(),
            self._blocks("fragments", fragments_rate(cfg), settings.CONTEXT, labels),
            self._blocks("agglomeration", edges_rate(cfg, self.chain.merge_function), context, 0),
            self._at_once("scoring", scoring_rate(cfg), 1, 0),
            self._at_once("tables", tables_rate(cfg), thresholds, 0),
            self._blocks("relabeling", relabel_rate(cfg), (0, 0, 0), labels, thresholds),
        ]

    def _prediction(self) -> Estimate:
        tiles = count_tiles(self.tile, self.shape)
        workers = min(self.workers, tiles)
        rate = self.rates.get(prediction_rate(self.cfg, workers if self.chain.blockwise else 0))
        used, source = self._source(rate, "prediction")
        tile = tile_with_context(self.cfg, self.tile)
        values = math.prod(self.shape) * sum(prediction_channels(self.cfg).values())
        disk = int(values * np.dtype(self.cfg.DATA.AFFS_DTYPE).itemsize * PREDICTION_SHARE)
        memory = WITH_NETWORK + tile_bytes(self.cfg, self.tile)
        if rate:
            disk = rate.bytes_for(math.prod(self.shape)) or disk
            memory = rate.peak_for(tile, WITH_NETWORK)
        # A tile that was timed now had a GPU for itself.
        alone = gpus_of(self.cfg) if self.cfg.CLUSTER.TYPE == "local" and not rate else 0
        at_once = min(workers, alone or workers)
        return Estimate(
            "prediction", tiles, tile * tiles, used.seconds_for(tile * tiles), at_once, disk, memory, source
        )

    def _blocks(self, step: str, name: str, context: Sequence[int], disk: int, times: int = 1) -> Estimate:
        """Estimate a step over the blocks of the volume, which is done so many times."""
        rate = self.rates.get(name)
        used, source = self._source(rate, step)
        blocks = count_tiles(self.block, self.shape)
        computed = times * voxels_with_context(self.shape, self.block, context)
        memory = block_bytes(self.cfg, self.block, self.shape) if any(context) else LIBRARIES
        disk *= times
        if rate:
            read = [min(size, b + 2 * c) for size, b, c in zip(self.shape, self.block, context, strict=True)]
            disk, memory = (
                rate.bytes_for(times * math.prod(self.shape)) or disk,
                rate.peak_for(math.prod(read), LIBRARIES),
            )
        at_once = min(self.workers, blocks)
        return Estimate(step, blocks * times, computed, used.seconds_for(computed), at_once, disk, memory, source)

    def _at_once(self, step: str, name: str, parts: int, disk: int) -> Estimate:
        """Estimate a step that one process does for the whole volume."""
        rate, voxels = self.rates.get(name), math.prod(self.shape)
        used, source = self._source(rate, step)
        seconds = parts * seconds_at_once(used, voxels, SECONDS[step] / 1e6)
        memory = rate.peak_for(voxels, LIBRARIES) if rate else LIBRARIES
        disk = rate.bytes_for(parts * voxels) if rate else disk
        return Estimate(step, parts, parts * voxels, seconds, 1, disk, memory, source)

    def _source(self, rate: Rate | None, step: str) -> tuple[Rate, str]:
        """Return what a step takes: as measured before, or now, or elsewhere; and say which."""
        if rate:
            where = "this machine" if self.cfg.CLUSTER.TYPE == "local" else f"{self.cfg.CLUSTER.TYPE} jobs"
            return rate, f"runs on {where}: {rate.blocks} block{'s' * (rate.blocks != 1)}"
        if step in SECONDS:
            return Rate(1, computed=10**6, seconds=SECONDS[step]), SHIPPED
        measured = self.measured_now[step]
        return measured, f"timed now: {measured.blocks} small box{'es' * (measured.blocks != 1)}"

    @cached_property
    def measured_now(self) -> dict[str, Rate]:
        """What a small box takes; measured when it is asked for first."""
        workers = min(self.workers, count_tiles(self.tile, self.shape)) if self.chain.blockwise else 0
        return measure_box(
            self.cfg, open_array(self.chain.raw, self.cfg.DATA.RAW), self.tile, threads_of_worker(self.cfg, workers)
        )


def seconds_at_once(rate: Rate, voxels: int, typical: float) -> float:
    """Return how long one process takes for a volume, if it took as long as measured for others.

    These steps are so fast that a small volume only measures how long it takes to start. What lies beyond the size of
    the volumes that were measured is taken at a pace between a typical one and, the larger they were, their own.

    Args:
        rate: what was measured; its blocks are volumes.
        voxels: of the volume.
        typical: seconds per voxel.
    """
    mean, size = rate.seconds / rate.blocks, rate.computed / rate.blocks
    pace = (mean + typical * LARGE) / (size + LARGE)
    return max(mean * min(1, voxels / size), mean + (voxels - size) * pace)


def voxels_with_context(shape: Sequence[int], block: Sequence[int], context: Sequence[int]) -> int:
    """Return how many voxels all blocks of a volume read together, each with the context that lies in the volume."""
    along = []
    for size, width, margin in zip(shape, block, context, strict=True):
        begins = range(0, size, width)
        along.append(sum(min(size, begin + width + margin) - max(0, begin - margin) for begin in begins))
    return math.prod(along)


def require_memory(chain: Chain) -> None:
    """Check that a block fits into the memory of a worker, and warn if not as many blocks fit as there are workers.

    Raises:
        UserError: one block does not fit; the message names a size that does.
    """
    cfg, shape, limit = chain.cfg, _network_shape(chain), worker_memory(chain.cfg)
    if not chain.blockwise or limit is None:
        return
    block = _block(chain, shape)
    needed, size = block_bytes(cfg, block, shape), list(block)
    if needed <= limit:
        workers = min(cfg.SYSTEM.NUM_WORKERS, count_tiles(size, shape))
        if cfg.CLUSTER.TYPE == "local" and needed * workers > limit:
            print(
                f"warning: {workers} workers take up to {byte_count(needed * workers)}, and {byte_count(limit)} are "
                f"free: use SYSTEM.NUM_WORKERS {limit // needed}, or a smaller INS_SEGMENT.BLOCK_SIZE",
                file=sys.stderr,
            )
        return
    while block_bytes(cfg, size, shape) > limit and (axes := [n for n in range(3) if size[n] // 2 >= _least(cfg)[n]]):
        size[max(axes, key=lambda axis: size[axis])] //= 2
    fits = block_bytes(cfg, size, shape) <= limit
    remedy = f"use INS_SEGMENT.BLOCK_SIZE {tuple(size)}" if fits else "use a machine or a job with more"
    raise UserError(
        f"a block of INS_SEGMENT.BLOCK_SIZE {tuple(block)} takes about {byte_count(needed)}, and a "
        f"worker has {byte_count(limit)}: {remedy}"
    )


def _least(cfg: CfgNode) -> Sequence[int]:
    """Voxels that a block has at least: its context must not be wider."""
    return [max(1, context) for context in cfg.INS_SEGMENT.CONTEXT]


def _network_shape(chain: Chain) -> list[int]:
    """Voxels of the volume, of the size that the network takes."""
    raw = open_array(chain.raw, chain.cfg.DATA.RAW)
    sides = zip(nanometers(raw.roi.shape, raw), chain.cfg.MODEL.VOXEL_SIZE, strict=True)
    return [math.ceil(round(side / voxel, 6)) for side, voxel in sides]


def _block(chain: Chain, shape: Sequence[int]) -> Sequence[int]:
    """Voxels of a block: INS_SEGMENT.BLOCK_SIZE, or what 02 chose, or would choose now."""
    size: Sequence[int] | None = chain.sample.cfg.INS_SEGMENT.BLOCK_SIZE
    return size or choose_block(chain.cfg, shape)[0]


def show_estimates(chain: Chain) -> None:
    """Print what each step of a chain will cost, and all of them together.

    Raises:
        UserError: as for `estimates`.
    """
    if chain.blockwise and chain.sample.cfg.INS_SEGMENT.BLOCK_SIZE is None:
        print(choose_block(chain.cfg, _network_shape(chain))[1])
    found = estimates(chain)
    row = "{:>14} {:>9} {:>9} {:>12} {:>12} {:>10} {:>10}  {}"
    print(row.format("step", "blocks", "Mvoxels", "worker time", "wall time", "disk", "memory", "from"))
    for step in found:
        times = duration(step.seconds), duration(step.wall)
        sizes = byte_count(step.disk), byte_count(step.memory)
        print(row.format(step.step, step.blocks, f"{step.computed / 1e6:.1f}", *times, *sizes, step.source))
    work, wall = sum(step.seconds for step in found), sum(step.wall for step in found)
    workers = max(1, chain.cfg.SYSTEM.NUM_WORKERS) if chain.blockwise else 1
    print(
        f"in all {duration(work)} of work, about {duration(wall)} with {workers} worker(s), and "
        f"{byte_count(sum(step.disk for step in found))} on disk; voxels with context, memory of a worker"
    )
