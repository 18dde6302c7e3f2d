"""How large the blocks of segmentation are where INS_SEGMENT.BLOCK_SIZE is None.

The context around a block is computed for nothing, so blocks are as large as memory allows, up to a width beyond which
that gains little, and equally large: 300 voxels are two blocks of 160 and 140, not of 256 and 44. Fragments end at the
faces of blocks, so the size is chosen once, when the first step begins, and kept with the fragments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from yacs.config import CfgNode

from lsdseg.engine.memory import ELSEWHERE, worker_memory
from lsdseg.files import byte_count

# Voxels along an axis, as in the published scripts. With a context of 24, blocks half as wide again save a sixth of the
# time.
LARGEST = 256
# Blocks are multiples of this, so that they divide into chunks of a good size.
STEP = 16
# Narrower blocks, in widths of the context, are mostly context.
NARROWEST = 4
# Most memory for a voxel, beside the predictions in it, by INS_SEGMENT.METHOD.
BYTES_PER_VOXEL = {"waterz": 60, "mutex": 600}
# What a process takes for its libraries.
LIBRARIES = 3 * 10**8
# Share of the free memory that the blocks of all workers may take.
SHARE = 0.7

Block = tuple[int, int, int]


def choose_block(cfg: CfgNode, volume_shape: Sequence[int]) -> tuple[Block, str]:
    """Choose how many voxels a block has along z, y, x.

    Args:
        cfg: the config.
        volume_shape: voxels of the volume along z, y, x.

    Returns:
        The size, and a line that says why.
    """
    free = worker_memory(cfg)
    memory = SHARE * (ELSEWHERE if free is None else free)
    workers = max(1, cfg.SYSTEM.NUM_WORKERS) if cfg.CLUSTER.TYPE == "local" else 1
    counts = [-(-size // LARGEST) for size in volume_shape]
    narrowest = [NARROWEST * max(STEP, context) for context in cfg.INS_SEGMENT.CONTEXT]
    block = widest = _equal(cfg, volume_shape, counts)
    while True:
        blocks = math.prod(-(-size // width) for size, width in zip(volume_shape, block, strict=True))
        together = min(workers, blocks)
        needed = together * block_bytes(cfg, block, volume_shape)
        axes = [axis for axis in range(3) if block[axis] > narrowest[axis]]
        if needed <= memory or not axes:
            break
        counts[max(axes, key=block.__getitem__)] += 1
        block = _equal(cfg, volume_shape, counts)
    take = f"{together} of them take" if together > 1 else "one takes"
    take += f" up to {byte_count(needed)}, and {byte_count(int(memory))} may be taken"
    if needed > memory:
        why = f"{take}, but smaller ones are mostly context"
    elif block == widest:
        why = f"up to {LARGEST} wide, and equally large"
    else:
        why = take
    size = " x ".join(map(str, block))
    return block, f"blocks: {blocks} of {size} voxels: {why} (INS_SEGMENT.BLOCK_SIZE is None)"


def block_bytes(cfg: CfgNode, block: Sequence[int], volume_shape: Sequence[int]) -> int:
    """Return how much memory a worker takes, at most, for a block of so many voxels along z, y, x."""
    settings = cfg.INS_SEGMENT
    read = [min(size, b + 2 * c) for size, b, c in zip(volume_shape, block, settings.CONTEXT, strict=True)]
    return int(LIBRARIES + math.prod(read) * (BYTES_PER_VOXEL[settings.METHOD] + 12))


def _equal(cfg: CfgNode, volume_shape: Sequence[int], counts: Sequence[int]) -> Block:
    """Return the size of so many equal blocks along each axis, which are no narrower than their context."""
    least = [max(1, context) for context in cfg.INS_SEGMENT.CONTEXT]
    sizes = [max(-(-size // n), low) for size, n, low in zip(volume_shape, counts, least, strict=True)]
    z, y, x = (-(-size // STEP) * STEP for size in sizes)
    return z, y, x
