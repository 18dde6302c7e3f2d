"""Masks of where to work, with any voxel size: segmentation keeps what is inside, prediction skips what is outside."""

import numpy as np
from funlib.geometry import Roi
from funlib.persistence import Array
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.placement import units_per_nanometer
from lsdseg.data_utils.volumes import open_array, read
from lsdseg.errors import UserError


def open_mask(settings: CfgNode) -> Array | None:
    """Return the mask that a section INS_SEGMENT names, or None if it has no MASK_FILE.

    Raises:
        UserError: MASK_DATASET is not set, there is no such dataset, or it is not (z, y, x).
    """
    if not settings.MASK_FILE:
        return None
    if not settings.MASK_DATASET:
        raise UserError(f"INS_SEGMENT.MASK_FILE is {settings.MASK_FILE}: name the dataset in INS_SEGMENT.MASK_DATASET")
    mask = open_array(settings.MASK_FILE, settings.MASK_DATASET)
    if not len(mask.shape) == mask.voxel_size.dims == 3:
        raise UserError(
            f"{settings.MASK_DATASET} in {settings.MASK_FILE} has shape {mask.shape}: store it with the axes z, y, x"
        )
    return mask


def read_mask(mask: Array | None, roi: Roi, array: Array) -> NDArray[np.bool_] | None:
    """Sample a mask on the voxels of a ROI.

    Args:
        mask: the mask (z, y, x) from `open_mask`. Its voxel size and ROI may differ.
        roi: region to read, in the unit of `array`.
        array: says how large the voxels of the result are.

    Returns:
        Bool (z, y, x). Every voxel has the value of the mask at its center, and False outside the mask. None if there
        is no mask.
    """
    if mask is None:
        return None
    indices = []
    scale = units_per_nanometer(mask) / units_per_nanometer(array)
    for axis, count in enumerate(roi.shape / array.voxel_size):
        centers = (roi.begin[axis] + (np.arange(count) + 0.5) * array.voxel_size[axis]) * scale
        indices.append(np.floor((centers - mask.offset[axis]) / mask.voxel_size[axis]).astype(int))
    covered = [(i >= 0) & (i < size) for i, size in zip(indices, mask.shape, strict=True)]
    inside = np.zeros([len(i) for i in indices], bool)
    if all(c.any() for c in covered):
        needed = [i[c] for i, c in zip(indices, covered, strict=True)]
        part = read(mask, tuple(slice(i[0], i[-1] + 1) for i in needed)) != 0
        inside[np.ix_(*covered)] = part[np.ix_(*(i - i[0] for i in needed))]
    return inside
