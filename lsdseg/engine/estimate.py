"""What segmenting a volume will cost, before it is begun: blocks, disk, memory and time of each step.

The time of prediction is measured, on one tile. The times of the other steps are those of earlier blocks of this
volume, if there are any, and otherwise what they took in `benchmarks/blockwise.py` on one machine.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from lsdseg.data_utils.volumes import open_array
from lsdseg.engine.block_size import LIBRARIES, block_bytes, choose_block
from lsdseg.engine.blocks.markers import record_files, records_in
from lsdseg.engine.blocks.status import duration
from lsdseg.engine.chain import Chain
from lsdseg.engine.memory import worker_memory
from lsdseg.engine.post.steps.edges import edges_name
from lsdseg.engine.post.steps.fragments import NAME as FRAGMENTS_STEP
from lsdseg.engine.predict.predict import prediction_channels
from lsdseg.engine.predict.tile_size import count_tiles, tile_bytes, tile_voxels
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.errors import UserError
from lsdseg.files import byte_count, room_on_disk

# CPU seconds for a million voxels; docs/results.md, "Large volumes".
SECONDS = {"fragments": 0.386, "agglomeration": 0.189, "tables": 0.009, "relabeling": 0.019}
# What a process takes for its libraries with those of the network.
WITH_NETWORK = 5 * 10**8
# Compressed, predictions and labels take about these shares of their size.
PREDICTION_SHARE, LABEL_SHARE = 0.6, 0.03


@dataclass(frozen=True)
class Estimate:
    """What one step will cost.

    Attributes:
        step: its name.
        blocks: how many.
        seconds: of one core, for all blocks; of the device, for prediction.
        disk: bytes, compressed.
        memory: bytes of each worker.
        measured: whether the time was measured on this volume.
    """

    step: str
    blocks: int
    seconds: float
    disk: int
    memory: int
    measured: bool


def estimates(chain: Chain) -> list[Estimate]:
    """Estimate the steps of a chain.

    Raises:
        UserError: the network or its device cannot be used, or there is no room on disk.
    """
    cfg, shape = chain.cfg, _network_shape(chain)
    voxels = math.prod(shape)
    tile = tile_voxels(cfg, shape, max(1, cfg.SYSTEM.NUM_WORKERS) if chain.blockwise else 1)
    tiles, seconds = count_tiles(tile, shape), _time_tile(cfg, tile)
    bytes_per_value = np.dtype(cfg.DATA.AFFS_DTYPE).itemsize
    predictions = voxels * sum(prediction_channels(cfg).values()) * bytes_per_value
    found = [
        Estimate(
            "prediction",
            tiles,
            seconds * tiles,
            int(predictions * PREDICTION_SHARE),
            WITH_NETWORK + tile_bytes(cfg, tile),
            True,
        )
    ]

    block = _block(chain, shape) if chain.blockwise else shape
    blocks = count_tiles(block, shape)
    memory = block_bytes(cfg, block, shape)
    labels, thresholds = int(voxels * 8 * LABEL_SHARE), len(chain.results)
    markers = {"fragments": FRAGMENTS_STEP, "agglomeration": edges_name(chain.merge_function)}
    for step, disk in (("fragments", labels), ("agglomeration", 0)):
        before = _mean_seconds(chain.sample.markers(markers[step])) if chain.blockwise else 0.0
        needed = before * blocks or SECONDS[step] * voxels / 1e6
        found.append(Estimate(step, blocks, needed, disk, memory, bool(before)))
    found.append(Estimate("tables", thresholds, SECONDS["tables"] * voxels / 1e6, 0, LIBRARIES, False))
    relabeling = SECONDS["relabeling"] * voxels / 1e6 * thresholds
    found.append(Estimate("relabeling", blocks * thresholds, relabeling, labels * thresholds, LIBRARIES, False))
    with room_on_disk(chain.out, sum(estimate.disk for estimate in found)):
        return found


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
    roi = open_array(chain.raw, chain.cfg.DATA.RAW).roi
    return [-(-size // voxel) for size, voxel in zip(roi.shape, chain.cfg.MODEL.VOXEL_SIZE, strict=True)]


def _block(chain: Chain, shape: Sequence[int]) -> Sequence[int]:
    """Voxels of a block: INS_SEGMENT.BLOCK_SIZE, or what 02 chose, or would choose now."""
    size: Sequence[int] | None = chain.sample.cfg.INS_SEGMENT.BLOCK_SIZE
    return size or choose_block(chain.cfg, shape)[0]


def show_estimates(chain: Chain) -> None:
    """Print what each step of a chain will cost, and all of them together.

    Raises:
        UserError: as for `estimates`.
    """
    found = estimates(chain)
    workers = max(1, chain.cfg.SYSTEM.NUM_WORKERS) if chain.blockwise else 1
    print(f"{'step':>14} {'blocks':>9} {'CPU time':>12} {'disk':>10} {'memory of a worker':>19}")
    for step in found:
        known = "" if step.measured else "  (typical, not measured here)"
        print(
            f"{step.step:>14} {step.blocks:9} {duration(step.seconds):>12} {byte_count(step.disk):>10} "
            f"{byte_count(step.memory):>19}{known}"
        )
    total = sum(step.seconds for step in found)
    print(
        f"in all {duration(total)} of work, about {duration(total / workers)} with {workers} worker(s), and "
        f"{byte_count(sum(step.disk for step in found))} on disk"
    )


def _time_tile(cfg: CfgNode, tile: tuple[int, ...]) -> float:
    """Return the seconds of one tile."""
    predictor = TilePredictor(cfg)
    shape = predictor.input_shape(tile)
    voxels = np.random.default_rng(0).random(shape, np.float32) * 2 - 1
    began = time.monotonic()
    predictor.predict_voxels(voxels, tile)
    return time.monotonic() - began


def _mean_seconds(markers: Path) -> float:
    """Return the mean seconds of a block in earlier runs, 0 without any."""
    try:
        records = records_in(record_files(markers))
    except (OSError, UserError):
        return 0.0
    return float(records["seconds"].mean()) if len(records) else 0.0
