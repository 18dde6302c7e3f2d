"""Volumes on other voxels: raw by interpolation, labels by the nearest voxel.

The place in the world is what stays: a voxel gets its value from what lies around its centre, wherever the voxels of
the two volumes begin and end. Only the voxels that a block needs are read, so memory does not grow with the volume.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from scipy.sparse import csr_array
from tqdm import tqdm

from lsdseg.data_utils.volumes import create_array, read, slabs
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk, write_whole_folder

BLOCK_BYTES = 2**24


def rescale(
    source: Array,
    target: Path | str,
    dataset: str,
    voxel_size: Sequence[int],
    roi: Roi | None = None,
    *,
    labels: bool = False,
) -> None:
    """Write a volume with another voxel size as the one dataset of a zarr, which appears whole or not at all.

    Args:
        source: uint8 or float raw, or labels of any integer type; an axis for each number of voxel_size.
        target, dataset: the zarr, replaced if it exists, and the name in it.
        voxel_size: nm, whole numbers.
        roi: nm, inside that of source and whole voxels wide; None: begins where source does and covers it.
        labels: take the nearest voxel. That is also done, as it is exact, where voxels stay what they are.

    Raises:
        UserError: before anything is written, if the source does not fit; if there is no room on disk.
    """
    voxel_size = Coordinate(voxel_size)
    _check(source, target, voxel_size, roi, labels)
    begin = roi.begin if roi else source.offset
    shape = Coordinate(-(-n // v) for n, v in zip((roi or source.roi).shape, voxel_size, strict=True))
    step = [new / old for new, old in zip(voxel_size, source.voxel_size, strict=True)]
    same_voxels = voxel_size == source.voxel_size and not any((begin - source.offset) % voxel_size)
    with room_on_disk(target), write_whole_folder(target) as partial:
        array = create_array(
            partial,
            dataset,
            shape,
            voxel_size=voxel_size,
            offset=begin,
            dtype=source.dtype,
            attributes=dict(source.attrs),
        )
        covered = slabs(array, int(BLOCK_BYTES * min(1, 1 / math.prod(step))))
        for slab in tqdm(covered, desc=f"{dataset} at {tuple(voxel_size)} nm", unit="slab"):
            # Centres of the block's voxels in voxels of the source, whose first one reaches from 0 to 1.
            centers = [
                ((np.arange(along.start, along.stop) + 0.5) * new + shift) / old
                for along, new, shift, old in zip(
                    slab, voxel_size, begin - source.offset, source.voxel_size, strict=True
                )
            ]
            if labels or same_voxels:
                array[slab] = _nearest(source, centers)
            else:
                array[slab] = _interpolated(source, centers, step)


def interpolation_weights(centers: np.ndarray, size: int, width: float) -> csr_array:
    """What each of `size` voxels in a row contributes to values at `centers`: (centers, size) float32, rows sum to 1.

    The weights fall linearly to 0 at a distance of `width` voxels. 1 is linear interpolation; a sampling distance
    beyond 1 as width averages over it, and so leaves nothing that the new voxels are too coarse to show. (The same
    triangle is Pillow's and PyTorch's anti-aliased "bilinear".)
    """
    first = np.ceil(centers - 0.5 - width).astype(int)
    voxels = first[:, None] + np.arange(math.ceil(2 * width) + 1)
    weights = np.maximum(0, 1 - np.abs(voxels + 0.5 - centers[:, None]) / width) * ((voxels >= 0) & (voxels < size))
    weights /= weights.sum(axis=1, keepdims=True)
    weighted = weights > 0
    row_ends = np.cumsum(np.append(0, weighted.sum(axis=1)))
    return csr_array((weights[weighted].astype(np.float32), voxels[weighted], row_ends), (len(centers), size))


def _check(source: Array, target, voxel_size: Coordinate, roi: Roi | None, labels: bool) -> None:
    if min(voxel_size) <= 0 or not len(voxel_size) == len(source.voxel_size) == len(source.shape):
        raise UserError(
            f"voxel size {tuple(voxel_size)} nm for {target} from an array of shape {source.shape}: "
            "one number above 0 is needed for each axis"
        )
    if not labels and source.dtype != np.uint8 and source.dtype.kind != "f":
        raise UserError(f"{source.dtype} for {target} is no raw, which is uint8 or float: rescale labels as labels")
    if roi and not source.roi.contains(roi):
        raise UserError(f"the source covers {source.roi} nm, less than the {roi} nm wanted for {target}")


def _nearest(source: Array, centers: list[np.ndarray]) -> np.ndarray:
    voxels = [np.minimum(np.floor(c).astype(int), size - 1) for c, size in zip(centers, source.shape, strict=True)]
    values = read(source, tuple(slice(v[0], v[-1] + 1) for v in voxels))
    return values[np.ix_(*(v - v[0] for v in voxels))]


def _interpolated(source: Array, centers: list[np.ndarray], step: list[float]) -> np.ndarray:
    weights = [interpolation_weights(c, n, max(1, s)) for c, n, s in zip(centers, source.shape, step, strict=True)]
    needed = tuple(slice(w.indices.min(), w.indices.max() + 1) for w in weights)
    values = read(source, needed).astype(np.float32)
    least, largest = np.nanmin(values), np.nanmax(values)
    # Axis by axis: the first one is interpolated and becomes the last, until all are back in their places.
    for matrix, voxels in zip(weights, needed, strict=True):
        rest = values.shape[1:]
        values = matrix[:, voxels] @ values.reshape(len(values), -1)
        values = np.moveaxis(values.reshape(-1, *rest), 0, -1)
    if source.dtype == np.uint8:
        return np.rint(values).astype(np.uint8)
    return values.clip(least, largest)  # weights sum to 1 but for rounding, and float raw may not exceed 1
