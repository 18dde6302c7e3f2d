"""Masks of labeled voxels. Training looks at no others.

CREMI and its annotation tools mark voxels that nobody has labeled with the three largest ids. Background, 0, counts as
labeled. If 0 means "not labeled" in your ground truth, provide a mask of your own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import dask.array
import fastremap
import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.data_utils.in_place import is_in_place
from lsdseg.data_utils.layout import LABELS, LABELS_MASK
from lsdseg.data_utils.placement import offset_nm, place_like, voxel_size_nm
from lsdseg.data_utils.volumes import SourceDefaults, create_array, has_array, open_array, read, rename_array, slabs
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, room_on_disk

FIRST_UNLABELED = np.uint64(2**64 - 3)


def is_labeled(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where voxels are labeled, background included.

    Args:
        labels: integers of any type and shape.

    Returns:
        Bool, the same shape.
    """
    labeled: NDArray[np.bool_] = labels < FIRST_UNLABELED
    return labeled


def labels_mask(labels: NDArray[Any], unlabeled: int | None = None) -> NDArray[np.uint8]:
    """Return 1 where voxels are labeled, background included, and 0 elsewhere.

    Args:
        labels: integers of any type and shape.
        unlabeled: another id of voxels that nobody has labeled. None: only CREMI's.
    """
    known = is_labeled(labels) if unlabeled is None else is_labeled(labels) & (labels != unlabeled)
    return known.astype(np.uint8)


def as_ids(values: NDArray[Any], where: str) -> NDArray[np.uint64]:
    """Return labels of any type as uint64, if no id changes or falls together with another.

    Args:
        values: integers, booleans or floats of any shape. -1, -2 and -3 become CREMI's ids for unlabeled voxels.
        where: their name, for the message.

    Raises:
        UserError: there are smaller numbers, fractions, NaN, or floats so large that neighboring integers are the same
            float.
    """
    if values.dtype.kind in "bu":
        return values.astype(np.uint64, copy=False)
    bad = values < -3
    if values.dtype.kind == "f":
        inexact = 2 ** (np.finfo(values.dtype).nmant + 1)  # may have been this integer or the next
        bad |= ~np.isfinite(values) | (values != np.rint(values)) | (values >= inexact)
    if bad.any():
        remedy = "store labels as unsigned integers, e.g. uint64"
        raise UserError(f"{where} is {values.dtype} and holds {values[bad][0]}, which is no exact id: {remedy}")
    return values.astype(np.int64).astype(np.uint64)


class ConvertedIds:
    """Labels that become uint64 when they are sliced, see `as_ids`.

    Args:
        source: integers, booleans or floats; anything with shape, dtype and ndim whose slices are numpy arrays.
        chunks: shape of what is stored in one piece.
        where: their name, for messages.
    """

    dtype = np.dtype(np.uint64)

    def __init__(self, source: Any, chunks: Sequence[int], where: str) -> None:
        self.source, self.chunks, self.where = source, tuple(chunks), where
        self.shape, self.ndim = source.shape, source.ndim

    def __getitem__(self, where: Any) -> NDArray[np.uint64]:
        return as_ids(np.asarray(self.source[where]), self.where)


def open_labels(path: Path | str, dataset: str, **defaults: Unpack[SourceDefaults]) -> Array:
    """Open labels to read them as unsigned integers. Those of another type are converted box by box.

    Args:
        path: as for `open_array`.
        dataset: as for `open_array`.
        defaults: as for `open_array`.

    Raises:
        UserError: as for `open_array`. Reading raises it where a number is no exact id, see `as_ids`.
    """
    labels = open_array(path, dataset, **defaults)
    if labels.dtype.kind not in "bif":
        return labels
    converted = ConvertedIds(labels._source_data, labels.chunk_shape, f"{dataset} in {path}")
    return place_like(labels, converted)


def check_ids(labels: Array) -> None:
    """Read labels of `open_labels` once, if they are converted.

    Raises:
        UserError: a number is no exact id, see `as_ids`.
    """
    if isinstance(labels._source_data, ConvertedIds):
        for slab in slabs(labels).with_progress("checking ids"):
            read(labels, slab)


def open_labels_mask(path: Path | str, mask_dataset: str, labels: Array, **defaults: Unpack[SourceDefaults]) -> Array:
    """Open the mask of labels, or make one in memory if there is none: a byte for each voxel.

    Args:
        path: as for `open_array`.
        mask_dataset: dataset of the mask.
        labels: as `open_labels` returns them.
        defaults: as for `open_array`.

    Raises:
        UserError: as for `open_array`.
    """
    if has_array(path, mask_dataset):
        return open_array(path, mask_dataset, **defaults)
    mask = np.empty(labels.shape, np.uint8)
    for slab in slabs(labels).with_progress("labels mask"):
        mask[slab] = labels_mask(read(labels, slab))
    return place_like(labels, mask)


def grow_boundary(
    labels: NDArray[Any], steps: int, axes: Sequence[int] = (0, 1, 2), known: NDArray[np.bool_] | None = None
) -> NDArray[Any]:
    """Set to 0 the voxels of every label that lie next to another one or to background.

    Args:
        labels: integers of any type, (z, y, x).
        steps: how often; each time takes one voxel off.
        axes: along which voxels are neighbors.
        known: bool, the shape of the labels. Nothing grows from where it is False. None: True everywhere.

    Returns:
        New labels of the same type and shape.
    """
    grown = labels.copy()
    for _ in range(steps):
        boundary = np.zeros(labels.shape, dtype=bool)
        for axis in axes:
            before = (slice(None),) * axis + (slice(None, -1),)
            after = (slice(None),) * axis + (slice(1, None),)
            differs = grown[before] != grown[after]
            if known is not None:
                differs &= known[before] & known[after]
            boundary[before] |= differs
            boundary[after] |= differs
        grown[boundary] = 0
    return grown


def renumber(labels: Array, where: str) -> Array:
    """Return labels with the ids 1, 2, 3 ... in the order of the old ones. 0 stays 0.

    Args:
        labels: unsigned or signed integers, of any shape. They are read once to find the ids.
        where: their name, for the message.

    Returns:
        An array of uint16, or uint32 for many ids, that reads what is sliced. It cannot be written.

    Raises:
        UserError: some voxels are unlabeled, and would get the id of a segment; there are more than 2**32 - 1 ids.
    """
    covered = slabs(labels).with_progress("ids")
    ids = fastremap.unique(np.concatenate([fastremap.unique(read(labels, slab)) for slab in covered]))
    if ids[0] < 0 or not is_labeled(ids[-1:]).all():
        raise UserError(f"{where} holds ids for unlabeled voxels, which cannot be renumbered: leave out --renumber")
    ids = ids[ids != 0]
    dtype = np.dtype(np.uint16 if len(ids) < 2**16 else np.uint32)
    if len(ids) >= 2**32:
        raise UserError(f"{where} holds {len(ids)} ids, more than 32 bits can tell apart: export a smaller --region")

    def numbered(old: NDArray[Any]) -> NDArray[Any]:
        return np.where(old == 0, 0, np.searchsorted(ids, old) + 1).astype(dtype)

    return place_like(labels, dask.array.map_blocks(numbered, labels.data, dtype=dtype))


def create_labels_masks(
    paths: Sequence[Path | str], labels_dataset: str, mask_dataset: str, unlabeled: int | None = None
) -> None:
    """Write the mask of the labels of each zarr that has none, and print what was done; see `create_labels_mask`.

    Raises:
        UserError: as for `create_labels_mask`. If a zarr has no labels, nothing is written.
    """
    for path in paths:
        open_array(path, labels_dataset)
    for path in paths:
        created = create_labels_mask(path, labels_dataset, mask_dataset, unlabeled)
        print(f"{path}: {mask_dataset} {'written' if created else 'exists already'}")


def create_labels_mask(
    path: Path | str,
    labels_dataset: str = LABELS,
    mask_dataset: str = LABELS_MASK,
    unlabeled: int | None = None,
    **defaults: Unpack[SourceDefaults],
) -> bool:
    """Write the mask of a zarr's labels, unless it has one.

    The mask is uint8, 1 where voxels are labeled, with the ROI and voxel size of the labels. The labels need not fit in
    memory. An interrupted run leaves no mask under the final name.

    Args:
        path: the zarr.
        labels_dataset: dataset of the labels.
        mask_dataset: dataset to write.
        unlabeled: another id of voxels that nobody has labeled. None: only CREMI's.
        defaults: as for `open_array`.

    Returns:
        Whether a mask was written.

    Raises:
        UserError: there are no labels, the volume is read in place, or there is no room on disk.
    """
    if has_array(path, mask_dataset):
        return False
    labels = open_labels(path, labels_dataset, **defaults)
    if is_in_place(Path(path)):
        raise UserError(
            f"{path} is only read, and training makes the mask of its labels itself: to store one, convert the volume "
            "to a zarr (data_utils/to_zarr.py)"
        )
    partial = f"{mask_dataset}{PARTIAL}"
    with room_on_disk(path):
        mask = create_array(
            path,
            partial,
            labels.shape,
            voxel_size=voxel_size_nm(labels),
            offset=offset_nm(labels),
            dtype=np.uint8,
            chunk_shape=labels.chunk_shape,
        )
        for slab in slabs(labels).with_progress("labels mask"):
            mask[slab] = labels_mask(read(labels, slab), unlabeled)
        rename_array(path, partial, mask_dataset)
    return True
