"""Resampling of volumes to another voxel size: raw by interpolation, labels by the nearest voxel.

Everything keeps its position in the world. A voxel gets its value from what lies around its center, wherever the voxels
of the two volumes begin and end. Only the voxels that a slab needs are read, so memory does not grow with the volume.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from numpy.typing import NDArray
from scipy.sparse import csr_array

from lsdseg.data_utils.gray import LARGEST_RAW
from lsdseg.data_utils.placement import PICOMETERS, in_picometers, nanometers, voxel_size_nm
from lsdseg.data_utils.records import Record, identity
from lsdseg.data_utils.regions import region_text
from lsdseg.data_utils.replace import check_replaceable_zarr, write_zarr
from lsdseg.data_utils.volumes import create_array, has_array, open_array, read, rename_array, slabs
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, room_on_disk

SLAB_BYTES = 2**24
LARGEST_STEP = 1000  # voxels of the source that one new voxel averages over, along each axis


def rescale_zarr(
    source: Path,
    target: Path,
    dataset: str,
    *,
    to: str | None,
    voxel_size: Sequence[float] | None,
    like: Sequence[str] | None,
    labels: bool,
    overwrite: bool,
    add: bool = False,
) -> None:
    """Resample a dataset of a zarr into another zarr, and print what was written.

    Args:
        source: zarr to read.
        target: zarr to write.
        dataset: dataset to read.
        to: dataset to write. None: the same name.
        voxel_size: new voxel size in nm; or None, and `like` is given.
        like: zarr and dataset to take voxel size and ROI from.
        labels: take the nearest voxel.
        overwrite: replace a target that exists, with `add` only its dataset of that name.
        add: keep what is in a target that exists, and add the dataset.

    Raises:
        UserError: an input does not exist, the target or the dataset to add exists, as for `check_replaceable_zarr`, or
            as for `rescale`.
    """
    array = open_array(source, dataset)
    grid = open_array(like[0], like[1]) if like else None
    size = voxel_size_nm(grid) if grid else voxel_size or ()
    record = rescale_record(array, size, grid, labels=labels)
    inputs, name = [source, Path(like[0])] if like else [source], to or dataset
    add = add and target.exists()
    if add and has_array(target, name) and not overwrite:
        raise UserError(f"{target} holds {name} already: write to another dataset (--to)")
    if not add:
        check_replaceable_zarr(target, inputs)
    if target.exists() and not overwrite and not add:
        raise UserError(f"{target} exists: add --overwrite, or write elsewhere")
    rescale(array, target, name, size, grid, labels=labels, add=add, record=record)
    written = open_array(target, name)
    print(f"{target}: {name} {written.dtype} {written.shape}, {voxel_size_nm(written)} nm")


def rescale_record(source: Array, voxel_size: Sequence[float], like: Array | None = None, *, labels: bool) -> Record:
    """Say what a resampled dataset is made from; arguments as for `rescale`."""
    settings = {"the voxel size": list(voxel_size), "labels": labels, "the region": None}
    if like is not None:
        settings["the region"] = [list(nanometers(edge, like)) for edge in (like.roi.begin, like.roi.shape)]
    return Record("data_utils/rescale.py", {"the source": identity(source)}, settings)


def rescale(
    source: Array,
    target: Path | str,
    dataset: str,
    voxel_size: Sequence[float],
    like: Array | None = None,
    *,
    labels: bool = False,
    add: bool = False,
    record: Record | None = None,
) -> None:
    """Resample a volume to another voxel size, as the only dataset of a zarr, which appears whole or not at all.

    Args:
        source: raw (integers of up to 32 bits, or float), or labels of any integer type. `voxel_size` has one number
            for each axis.
        target: the zarr. An existing one is replaced if this suite wrote all of it.
        dataset: name of the dataset in it.
        voxel_size: in nm.
        like: a volume with voxels of that size that lies inside the source: cover the same region. None: begin where
            the source does, and cover all of it.
        labels: take the nearest voxel instead of interpolating. This is also done for raw if the voxels do not change,
            because it is exact.
        add: add the dataset to a zarr that exists, instead.
        record: what `rescale_record` returned, to be kept with the dataset. None: no record.

    Raises:
        UserError: the arguments do not fit each other (nothing is written then), or there is no room on disk.
    """
    source = in_picometers(source)
    roi = in_picometers(like).roi if like else source.roi
    _check(source, target, voxel_size, roi, labels)
    size = Coordinate(round(n * PICOMETERS) for n in voxel_size)
    step = [new / old for new, old in zip(size, source.voxel_size, strict=True)]
    same_voxels = size == source.voxel_size and not any((roi.begin - source.offset) % size)
    name = f"{dataset}{PARTIAL}" if add else dataset
    with room_on_disk(target), nullcontext(target) if add else write_zarr(target) as folder:
        array = create_array(
            folder,
            name,
            [-(-n // new) for n, new in zip(roi.shape, size, strict=True)],
            voxel_size=voxel_size,
            offset=nanometers(roi.begin, source),
            dtype=source.dtype,
            attributes=dict(source.attrs) | (record.attributes if record else {}),
        )
        covered = slabs(array, int(SLAB_BYTES * min(1, 1 / math.prod(step))))
        for slab in covered.with_progress(f"{dataset} at {tuple(voxel_size)} nm", delay=0):
            centers = _centers(slab, source, roi.begin, size)
            if labels or same_voxels:
                array[slab] = _nearest(source, centers)
            else:
                array[slab] = _interpolated(source, centers, step)
        if add:
            rename_array(target, name, dataset)


def interpolation_weights(centers: NDArray[np.floating[Any]], size: int, width: float) -> csr_array:
    """Return the weights that interpolate a row of voxels.

    The weights fall linearly to 0 at a distance of `width` voxels. A width of 1 is linear interpolation. To sample at a
    larger distance, use that as the width: this averages over it, and removes what the new voxels are too coarse to
    show. (Anti-aliased "bilinear" resampling in Pillow and PyTorch uses the same triangle.)

    Args:
        centers: float (n,), where to interpolate, in voxels. The first voxel extends from 0 to 1.
        size: number of voxels in the row.
        width: distance in voxels at which a weight becomes 0, at least 1.

    Returns:
        float32 (n, size), sparse. Rows sum to 1.
    """
    first = np.ceil(centers - 0.5 - width).astype(int)
    voxels = first[:, None] + np.arange(math.ceil(2 * width) + 1)
    weights = np.maximum(0, 1 - np.abs(voxels + 0.5 - centers[:, None]) / width) * ((voxels >= 0) & (voxels < size))
    weights /= weights.sum(axis=1, keepdims=True)
    weighted = weights > 0
    row_ends = np.cumsum(np.append(0, weighted.sum(axis=1)))
    return csr_array((weights[weighted].astype(np.float32), voxels[weighted], row_ends), (len(centers), size))


def _check(source: Array, target: Path | str, voxel_size: Sequence[float], roi: Roi, labels: bool) -> None:
    """Refuse arguments of `rescale` that do not fit each other. The ROIs are in pm."""
    if min(voxel_size) <= 0 or not len(voxel_size) == len(source.voxel_size) == len(source.shape):
        raise UserError(
            f"voxel size {tuple(voxel_size)} nm for {target} from an array of shape {source.shape}: "
            "give one number above 0 for each axis"
        )
    if any(new > LARGEST_STEP * old for new, old in zip(voxel_size, voxel_size_nm(source), strict=True)):
        raise UserError(
            f"voxel size {tuple(voxel_size)} nm for {target} is more than {LARGEST_STEP} times that of the source, "
            f"{voxel_size_nm(source)}: make it smaller"
        )
    if not labels and source.dtype.kind != "f" and source.dtype.itemsize > LARGEST_RAW:
        raise UserError(f"{source.dtype} for {target} is not raw: for labels, set labels (--labels)")
    if not source.roi.contains(roi):
        covered, wanted = region_text(source.roi, source), region_text(roi, source)
        raise UserError(f"the source covers {covered} nm, which is less than {wanted} nm as wanted for {target}")


def _centers(
    slab: Sequence[slice], source: Array, begin: Coordinate, voxel_size: Coordinate
) -> list[NDArray[np.floating[Any]]]:
    """Return the centers of a slab's voxels in voxels of the source, of which the first extends from 0 to 1."""
    along = zip(slab, voxel_size, begin - source.offset, source.voxel_size, strict=True)
    return [((np.arange(span.start, span.stop) + 0.5) * new + shift) / old for span, new, shift, old in along]


def _nearest(source: Array, centers: Sequence[NDArray[np.floating[Any]]]) -> NDArray[Any]:
    """Return the values of the voxels that contain the centers (in voxels, one array for each axis)."""
    voxels = [np.minimum(np.floor(c).astype(int), size - 1) for c, size in zip(centers, source.shape, strict=True)]
    values = read(source, tuple(slice(v[0], v[-1] + 1) for v in voxels))
    return np.asarray(values[np.ix_(*(v - v[0] for v in voxels))])


def _interpolated(source: Array, centers: Sequence[NDArray[np.floating[Any]]], step: Sequence[float]) -> NDArray[Any]:
    """Return interpolated values at the centers, which are `step` voxels of the source apart along each axis."""
    weights = [interpolation_weights(c, n, max(1, s)) for c, n, s in zip(centers, source.shape, step, strict=True)]
    needed = tuple(slice(w.indices.min(), w.indices.max() + 1) for w in weights)
    values = read(source, needed).astype(np.float32)
    least, largest = np.nanmin(values), np.nanmax(values)
    # Axis by axis: the first axis is interpolated and becomes the last, until all are back in place.
    for matrix, voxels in zip(weights, needed, strict=True):
        rest = values.shape[1:]
        values = matrix[:, voxels] @ values.reshape(len(values), -1)
        values = np.moveaxis(values.reshape(-1, *rest), 0, -1)
    if source.dtype.kind in "ui":
        return np.rint(values.clip(least, largest)).astype(source.dtype)
    return values.clip(least, largest)  # weights sum to 1 except for rounding, and float raw must not exceed 1
