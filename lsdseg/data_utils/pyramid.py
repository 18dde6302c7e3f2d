"""Pyramids: a volume and coarser levels of it, each made from the one before, block by block.

Labels take the most frequent id, gray values and affinities the mean. Axes along which voxels are already wide are not
made coarser until the others have caught up, so voxels become cubes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.volumes import Slabs

EDGE = 64  # width of a chunk in voxels; the coarsest level is not wider than one chunk


class Level(NamedTuple):
    """One level of a pyramid; everything is z, y, x.

    Attributes:
        factor: how many voxels of the level before one of this covers along each axis. 1 for the first level.
        begin: the first voxel, in voxels of this level.
        shape: in voxels.
        voxel_size: in nm.
    """

    factor: tuple[int, ...]
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    voxel_size: tuple[float, ...]

    def coarser(self) -> "Level":
        """Return the next level: twice as coarse along the axes whose voxels are less than twice the narrowest ones.

        Its voxels are pairs of voxels that begin at an even number, wherever the volume begins, so that levels lie on
        each other exactly. A voxel at the border may cover only one.
        """
        narrow = [size < 2 * min(self.voxel_size) for size in self.voxel_size]
        factor = tuple(2 if is_narrow else 1 for is_narrow in narrow)
        begin = tuple(first // f for first, f in zip(self.begin, factor, strict=True))
        ends = (-(-(b + n) // f) for b, n, f in zip(self.begin, self.shape, factor, strict=True))
        shape = tuple(end - first for end, first in zip(ends, begin, strict=True))
        return Level(factor, begin, shape, tuple(v * f for v, f in zip(self.voxel_size, factor, strict=True)))


def plan_levels(shape: Sequence[int], begin: Sequence[int], voxel_size: Sequence[float]) -> list[Level]:
    """Return the levels of a volume, the finest first, until one is not wider than a chunk.

    Args:
        shape: of the volume in voxels, z, y, x.
        begin: its first voxel, counted from the point at which the voxels of all levels begin.
        voxel_size: in nm.
    """
    levels = [Level((1, 1, 1), tuple(begin), tuple(shape), tuple(voxel_size))]
    while max(levels[-1].shape) > EDGE:
        levels.append(levels[-1].coarser())
    return levels


def write_pyramid(
    read_first: Callable[[tuple[slice, ...]], NDArray[Any]],
    levels: Sequence[Level],
    stores: Sequence[Any],
    blocks: Sequence[Sequence[int]],
    *,
    labels: bool,
    bar: tqdm,
) -> None:
    """Write every level, each from the one before. Memory holds one block, and what it is made from.

    Args:
        read_first: takes slices of the first level and gives its voxels.
        levels: what `plan_levels` returned.
        stores: of tensorstore, one for each level: [channel,] z, y, x, counted from 0.
        blocks: for each level the shape to write at once, z, y, x in voxels.
        labels: take the most frequent value instead of the mean.
        bar: counts the voxels of all levels.
    """
    for number, (level, store, block) in enumerate(zip(levels, stores, blocks, strict=True)):
        channels = (slice(None),) * (store.rank - 3)
        for slab in Slabs(level.shape, block):
            if number == 0:
                data = read_first((*channels, *slab))
            else:
                data = _reduced(slab, level, levels[number - 1], stores[number - 1], mode if labels else mean)
            store[(*channels, *slab)].write(data).result()
            bar.update(data.size)


def _reduced(
    slab: tuple[slice, ...], level: Level, before: Level, store: Any, reduce: Callable[..., NDArray[Any]]
) -> NDArray[Any]:
    """Make a slab of a level from the one before, chunk by chunk: eight times the slab might not fit into memory."""
    shape = tuple(along.stop - along.start for along in slab)
    channels = tuple(store.shape[:-3])
    data = np.empty((*channels, *shape), store.dtype.numpy_dtype)
    for piece in Slabs(shape, (EDGE,) * 3):
        voxels = [slice(a.start + b.start, a.start + b.stop) for a, b in zip(slab, piece, strict=True)]
        fine, missing = _finer(voxels, level, before)
        values = np.asarray(store[(..., *fine)].read().result())
        padded = np.pad(values, [(0, 0)] * len(channels) + missing, mode="edge")
        here: tuple[Any, ...] = (..., *piece)
        data[here] = reduce(padded, level.factor)
    return data


def mode(values: NDArray[Any], factor: Sequence[int]) -> NDArray[Any]:
    """Return the most frequent value of each window, the largest of several: so an id wins over as much background.

    Args:
        values: integers (..., z, y, x), a whole number of windows wide.
        factor: shape of a window, z, y, x.
    """
    windows = _windows(values, factor)
    best = windows[0].copy()
    most = np.zeros(best.shape, np.uint8)
    for candidate in windows:
        count = np.zeros(best.shape, np.uint8)
        for other in windows:
            count += candidate == other
        better = (count > most) | ((count == most) & (candidate > best))
        best[better], most[better] = candidate[better], count[better]
    return best


def mean(values: NDArray[Any], factor: Sequence[int]) -> NDArray[Any]:
    """Return the mean of each window, rounded for integers; arguments as for `mode`, but of any type."""
    windows = _windows(values, factor)
    total = np.zeros(windows[0].shape, np.float64 if values.dtype.itemsize > 2 else np.float32)
    for window in windows:
        total += window
    total /= len(windows)
    return (np.rint(total) if values.dtype.kind in "iu" else total).astype(values.dtype)


def _windows(values: NDArray[Any], factor: Sequence[int]) -> list[NDArray[Any]]:
    """Return one array for each place in a window."""
    every = [[slice(start, None, f) for start in range(f)] for f in factor]
    places: list[tuple[Any, ...]] = [(..., *voxels) for voxels in itertools.product(*every)]
    return [values[place] for place in places]


def _finer(slab: Sequence[slice], level: Level, before: Level) -> tuple[list[slice], list[tuple[int, int]]]:
    """Return which voxels of the level before a slab is made from, and how many are missing around them.

    To repeat the voxels at the border in their place changes neither the mean nor the most frequent value.
    """
    fine, missing = [], []
    for along, f, begin, first, size in zip(slab, level.factor, level.begin, before.begin, before.shape, strict=True):
        start, stop = ((begin + end) * f - first for end in (along.start, along.stop))
        fine.append(slice(max(0, start), min(size, stop)))
        missing.append((max(0, -start), max(0, stop - size)))
    return fine, missing


def voxel_count(levels: Sequence[Level]) -> int:
    """Return the number of voxels of all levels, without channels."""
    return sum(math.prod(level.shape) for level in levels)
