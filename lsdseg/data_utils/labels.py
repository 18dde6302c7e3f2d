"""Masks of what is labelled: training looks at these voxels only.

CREMI and its annotation tools mark voxels that nobody has labelled with the three largest ids; background, 0,
counts as labelled. If 0 means "not labelled" in your ground truth, bring your own mask.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from lsdseg.data_utils.layout import LABELS, LABELS_MASK
from lsdseg.data_utils.volumes import create_array, has_array, open_array, read, rename_array, slabs
from lsdseg.files import room_on_disk

FIRST_UNLABELED = np.uint64(2**64 - 3)


def is_labeled(labels: np.ndarray) -> np.ndarray:
    """Bool, shape of labels (any integers): whether a voxel has been labelled, background included."""
    return labels < FIRST_UNLABELED


def create_labels_mask(
    path: Path | str, labels_dataset: str = LABELS, mask_dataset: str = LABELS_MASK, **defaults
) -> bool:
    """Write the labels mask (uint8, 1: labelled; ROI and voxel size of the labels) of a zarr that has none.

    Memory is bounded, and a mask that was ended half-way is not taken for one. defaults: as for `open_array`.
    Returns whether one was made. Raises UserError if there are no labels or no room on disk.
    """
    if has_array(path, mask_dataset):
        return False
    labels = open_array(path, labels_dataset, **defaults)
    with room_on_disk(path):
        mask = create_array(
            path,
            f"{mask_dataset}.partial",
            labels.shape,
            voxel_size=labels.voxel_size,
            offset=labels.offset,
            dtype=np.uint8,
            chunk_shape=labels.chunk_shape,
        )
        for slab in tqdm(slabs(labels), desc="labels mask", unit="slab", delay=2):
            mask[slab] = is_labeled(read(labels, slab)).astype(np.uint8)
        rename_array(path, f"{mask_dataset}.partial", mask_dataset)
    return True
