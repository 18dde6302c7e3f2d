"""Affinities as arrays: their range, their channels, and the pairs of voxels that a channel is about."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsdseg.engine.offsets import DIRECT_NEIGHBORS, Offset


def float_affinities(affinities: ArrayLike, channels: int = 3) -> NDArray[np.float32]:
    """Bring affinities to 0..1.

    Args:
        affinities: (channels, z, y, x), uint8 in 0..255 or floating point in 0..1.
        channels: how many there must be.

    Returns:
        The same shape, float32, C-contiguous.

    Raises:
        ValueError: the shape or the type is another one, or there are NaN or values outside 0..1.
    """
    array = np.asarray(affinities)
    if array.ndim != 4 or array.shape[0] != channels:
        raise ValueError(f"affinities must have the shape ({channels}, z, y, x), not {array.shape}")
    if array.dtype == np.uint8:
        return np.asarray(array * np.float32(1 / 255), np.float32)
    if array.dtype.kind != "f":
        raise ValueError(f"affinities must be uint8 or floating point, not {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError("floating point affinities must lie in 0..1, without NaN")
    return np.ascontiguousarray(array, dtype=np.float32)


def direct_neighbors(affinities: NDArray[Any], offsets: Sequence[Offset]) -> NDArray[Any]:
    """The channels that agglomeration with waterz takes: neighbors in z, y, x, in that order.

    Args:
        affinities: (c, z, y, x).
        offsets: one (z, y, x) for each channel, in any order.

    Returns:
        (3, z, y, x), same type; a neighbor without a channel has affinity 0, which keeps sections apart.
    """
    missing = np.zeros_like(affinities[0])
    return np.stack([affinities[offsets.index(n)] if n in offsets else missing for n in DIRECT_NEIGHBORS])


def voxel_pairs(shape: Sequence[int], offset: Offset) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the voxels that have a partner at an offset inside the volume, and slices of the partners."""
    first = [max(0, -step) for step in offset]
    last = [max(begin, size - max(0, step)) for begin, size, step in zip(first, shape, offset, strict=True)]
    here = tuple(slice(begin, end) for begin, end in zip(first, last, strict=True))
    there = tuple(slice(s.start + step, s.stop + step) for s, step in zip(here, offset, strict=True))
    return here, there
