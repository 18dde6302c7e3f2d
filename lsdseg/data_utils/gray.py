"""Gray values of raw: which of them become 0 and 1, the same for the whole volume.

uint8 and floating point have ranges of their own. Of other integers, cameras and converters use any part, so the range
is taken from a sample of the volume, the same one each time.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from funlib.persistence import Array
from numpy.typing import DTypeLike, NDArray

from lsdseg.data_utils.volumes import read

# Lowest and highest gray value, which become 0 and 1.
Window = tuple[float, float]

LARGEST_RAW = 4  # bytes of an integer: those of eight are labels
PERCENTILES = (0.1, 99.9)
BOXES = 64
BOX = (4, 96, 96)  # voxels along z, y, x
GRID = (64, 64, 64)  # that boxes lie in along z, whatever the chunks are: every copy of a volume gives the same sample
# The n-th box lies at the fractional parts of n times these, which fill a cube more evenly than random places do.
SPREAD = (0.8191725134, 0.6710436067, 0.5497004779)


def own_window(dtype: DTypeLike) -> Window | None:
    """The gray values that are 0 and 1 in raw of this type: uint8 and floating point. None for other integers."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return 0.0, 1.0
    return (0.0, 255.0) if kind == np.uint8 else None


@functools.lru_cache(maxsize=64)
def gray_percentiles(raw: Array) -> Window:
    """Return two gray values, between which nearly all are in a sample of a volume. Boxes of one value do not count.

    Args:
        raw: (z, y, x).
    """
    places = {place_box(number, raw.shape[-3:], GRID) for number in range(BOXES)}
    boxes = [read(raw, tuple(slice(b, b + s) for b, s in zip(*place, strict=True))) for place in sorted(places)]
    values = np.concatenate([box.ravel() for box in boxes if box.min() < box.max()] or [box.ravel() for box in boxes])
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(max(high, low + 1))


def to_unit(values: NDArray[Any], window: Window) -> NDArray[np.float32]:
    """Convert gray values to float32, 0 and 1 at the ends of a window; those beyond it are clipped."""
    low, high = window
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(1 / (high - low))
    return np.asarray(scaled if own_window(values.dtype) == window else scaled.clip(0, 1), np.float32)


def place_box(
    number: int, shape: Sequence[int], chunks: Sequence[int], largest: Sequence[int] = BOX
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return begin and shape of a box that needs few chunks: one along an axis where they are long enough."""
    begins, sizes = [], []
    for axis, (size, chunk, wanted, step) in enumerate(zip(shape, chunks, largest, SPREAD, strict=True)):
        # A section may be one chunk of any size.
        box = min(size, wanted, chunk if axis == 0 else 8 * chunk)
        begin = int((0.5 + number * step) % 1 * (size - box + 1))
        end = min(size, (begin // chunk + 1) * chunk)
        begins.append(max(0, min(begin, end - box)) if chunk >= box else begin)
        sizes.append(box)
    return tuple(begins), tuple(sizes)
