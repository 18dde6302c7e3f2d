"""Contrast limited adaptive histogram equalization (CLAHE) that gives the same voxels in blocks as in one piece.

scikit-image's `equalize_adapthist` stretches an image by its darkest and brightest voxel, before and after, so a part
of an image gets other values than the whole. Here tiles lie on a grid that begins at the first voxel of the volume, and
gray values are counted in a fixed window. A voxel therefore depends on the tiles around it only.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lsdseg.data_utils.gray import Window, to_unit

BINS = 256


class _Tiles(NamedTuple):
    """The tiles along one axis that a range of voxels depends on.

    Attributes:
        voxels: which voxels these tiles cover.
        number: (voxels,), tile of each of these voxels, counted from the first tile here.
        pair: two arrays (range,), the tiles whose centers lie before and after each voxel of the range.
        share: float32 (range,), weight of the second one.
        inner: the range, counted from the first of the voxels.
    """

    voxels: slice
    number: NDArray[np.intp]
    pair: tuple[NDArray[np.intp], NDArray[np.intp]]
    share: NDArray[np.float32]
    inner: slice


def clahe(values: NDArray[Any], window: Window, tile: Sequence[int], limit: float) -> NDArray[Any]:
    """Equalize the gray values of a volume around every voxel (Zuiderveld, Graphics Gems IV, 1994).

    In each tile, the histogram of 256 bins is cut off at `limit`, and what was cut off is spread over all bins. A voxel
    gets its share in the cumulative histogram, interpolated between the tiles around it.

    Args:
        values: gray values (z, y, x), integers or floats.
        window: the lowest and the highest gray value; others are clipped.
        tile: width of a tile along z, y, x in voxels. The last one along an axis has half to one and a half of it.
        limit: largest share of a tile's voxels in one bin, above 0. 1 does not limit the contrast.

    Returns:
        New gray values in the window, of the same type and shape.
    """
    whole = tuple(slice(0, size) for size in values.shape)
    return clahe_region(values.__getitem__, values.shape, whole, window, tile, limit)


def clahe_region(
    read_voxels: Callable[[tuple[slice, ...]], NDArray[Any]],
    shape: Sequence[int],
    region: tuple[slice, ...],
    window: Window,
    tile: Sequence[int],
    limit: float,
) -> NDArray[Any]:
    """Return a region of what `clahe` makes of a volume, reading only the tiles that the region depends on.

    Args:
        read_voxels: takes slices of the volume and gives its gray values.
        shape: shape of the volume.
        region: slices z, y, x of it.
        window: as for `clahe`.
        tile: as for `clahe`.
        limit: as for `clahe`.
    """
    axes = [_tiles(along, size, width) for along, size, width in zip(region, shape, tile, strict=True)]
    values = read_voxels(tuple(axis.voxels for axis in axes))
    unit = np.nan_to_num(to_unit(values, window)).clip(0, 1)
    bins = np.rint(unit * np.float32(BINS - 1)).astype(np.uint8)
    tables = _tables(bins, axes, limit)
    inner = bins[tuple(axis.inner for axis in axes)]
    equalized = np.zeros(inner.shape, np.float32)
    for corner in itertools.product((0, 1), repeat=3):
        z, y, x = np.ix_(*(axis.pair[side] for axis, side in zip(axes, corner, strict=True)))
        a, b, c = np.ix_(*(axis.share if side else 1 - axis.share for axis, side in zip(axes, corner, strict=True)))
        if a.any() and b.any() and c.any():
            equalized += a * b * c * tables[z, y, x, inner]
    low, high = window
    new = np.float32(low) + equalized * np.float32(high - low)
    return (np.rint(new) if values.dtype.kind in "iu" else new.clip(low, high)).astype(values.dtype)


def _tiles(along: slice, size: int, width: int) -> _Tiles:
    """Return the tiles that the voxels `along` an axis depend on."""
    count = max(1, (size + width // 2) // width)
    place = np.clip((np.arange(along.start, along.stop) + 0.5) / width - 0.5, 0, count - 1)
    before = np.floor(place).astype(np.intp)
    after = np.minimum(before + 1, count - 1)
    first, last = int(before[0]), int(after[-1])
    begin, end = first * width, size if last == count - 1 else (last + 1) * width
    number = np.minimum(np.arange(begin, end) // width, count - 1) - first
    inner = slice(along.start - begin, along.stop - begin)
    return _Tiles(
        slice(begin, end), number, (before - first, after - first), (place - before).astype(np.float32), inner
    )


def _tables(bins: NDArray[np.uint8], axes: Sequence[_Tiles], limit: float) -> NDArray[np.float32]:
    """Return the limited cumulative histogram of every tile, float32 (z, y, x, 256); the last value is 1."""
    grid = tuple(int(axis.number[-1]) + 1 for axis in axes)
    z, y, x = np.ix_(*(axis.number for axis in axes))
    tile = (z * grid[1] + y) * grid[2] + x
    counts = np.bincount((tile * BINS + bins).ravel(), minlength=BINS * int(np.prod(grid))).reshape(*grid, BINS)
    shares = counts / counts.sum(axis=-1, keepdims=True)
    limited = np.minimum(shares, limit)
    limited += (1 - limited.sum(axis=-1, keepdims=True)) / BINS
    return np.cumsum(limited, axis=-1).astype(np.float32)
