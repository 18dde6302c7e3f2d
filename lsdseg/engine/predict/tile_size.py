"""How large the tiles of a prediction are.

The context around a tile is computed for nothing, and so is what lies beyond the end of the volume. So tiles are as
large as memory allows, up to a width beyond which that gains little, and equally large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from yacs.config import CfgNode

from lsdseg.config.network_shapes import total_factor
from lsdseg.engine.device import resolve_device
from lsdseg.engine.memory import ELSEWHERE, available_memory
from lsdseg.engine.sections import along_zyx

SECTIONS_PER_TILE = 8
# Voxels along an axis; docs/results.md, "Prediction", says how little wider tiles gain.
LARGEST = 224
# Most memory for each voxel of a tile with its context and each feature map of the finest level, by PAD_CONV.
BYTES = {"same": 10, "valid": 20}
# Share of the free memory that the tiles of all workers may take.
SHARE = 0.5


def tile_voxels(cfg: CfgNode, volume_shape: Sequence[int], workers: int = 1) -> tuple[int, ...]:
    """Return the output voxels of a tile along z, y, x.

    A tile has OUTPUT_SHAPE + GROW_INPUT voxels, or fewer, so that the tiles of the volume are equally large. Without
    GROW_INPUT, memory decides. In 2D, a tile is a few sections that go through the network as one batch.

    Args:
        cfg: the config.
        volume_shape: voxels of the volume along z, y, x.
        workers: processes that predict side by side. Each gets several tiles, if there are as many.
    """
    network = cfg.MODEL
    smallest = along_zyx(network.OUTPUT_SHAPE, SECTIONS_PER_TILE)
    factor = along_zyx(total_factor(network.DOWNSAMPLE_FACTORS), 1)
    if network.GROW_INPUT is None:
        largest = _largest(cfg, smallest, factor, volume_shape, workers)
    else:
        largest = tuple(s + g for s, g in zip(smallest, along_zyx(network.GROW_INPUT, 0), strict=True))
    tile = []
    for size, most, step in zip(volume_shape, largest, factor, strict=True):
        tiles, steps = -(-size // most), -(-size // step)
        tile.append(-(-steps // tiles) * step)
    return tuple(tile)


def tile_bytes(cfg: CfgNode, tile: Sequence[int]) -> int:
    """Return about how much memory it takes to predict a tile, beside the network: its finest level at the peak."""
    return tile_with_context(cfg, tile) * cfg.MODEL.NUM_FMAPS * BYTES[cfg.MODEL.PAD_CONV]


def tile_with_context(cfg: CfgNode, tile: Sequence[int]) -> int:
    """Return how many voxels of raw the prediction of a tile depends on."""
    return math.prod(size + 2 * c for size, c in zip(tile, along_zyx(cfg.MODEL.CONTEXT, 0), strict=True))


def count_tiles(tile: Sequence[int], volume_shape: Sequence[int]) -> int:
    """Return how many tiles a volume has."""
    return math.prod(-(-size // width) for size, width in zip(volume_shape, tile, strict=True))


def tiles_in_words(cfg: CfgNode, tile: Sequence[int], volume_shape: Sequence[int]) -> str:
    """Return how many tiles a volume has and how large they are, and why if they were chosen here."""
    size = " x ".join(map(str, tile))
    chosen = f": as memory, workers and a width of {LARGEST} allow" if cfg.MODEL.GROW_INPUT is None else ""
    return f"tiles: {count_tiles(tile, volume_shape)} of {size} voxels{chosen}"


def _largest(
    cfg: CfgNode, smallest: Sequence[int], factor: Sequence[int], volume_shape: Sequence[int], workers: int
) -> Sequence[int]:
    """Let a tile grow along the axis that has most context for its width, as far as memory and workers allow."""
    context, tile = along_zyx(cfg.MODEL.CONTEXT, 0), list(smallest)
    memory = _memory(cfg, workers)
    most = [min(LARGEST, size) if c else 0 for size, c in zip(volume_shape, context, strict=True)]
    while axes := [axis for axis in range(3) if tile[axis] < most[axis]]:
        axis = max(axes, key=lambda axis: context[axis] / tile[axis])
        grown = [size + factor[axis] * (n == axis) for n, size in enumerate(tile)]
        enough = workers == 1 or count_tiles(grown, volume_shape) >= 2 * workers
        if tile_bytes(cfg, grown) > memory or not enough:
            break
        tile = grown
    return tile


def _memory(cfg: CfgNode, workers: int) -> float:
    """Return the bytes that one of some workers may take for a tile."""
    if cfg.CLUSTER.TYPE != "local":
        return SHARE * ELSEWHERE
    device = resolve_device(cfg)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return SHARE * free
    return SHARE * available_memory() / workers
