"""Operations on one dataset of a zarr, block by block: every one gives what it would give in one piece.

The result is a new zarr, which appears whole or not at all. It also holds all other datasets of the input unchanged, at
their place in nm, so that it can be trained on.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fastremap
import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.data_utils.clahe import clahe_region
from lsdseg.data_utils.components import write_components
from lsdseg.data_utils.gray import LARGEST_RAW, gray_percentiles, own_window
from lsdseg.data_utils.labels import is_labeled
from lsdseg.data_utils.placement import in_picometers, nanometers, offset_nm, voxel_size_nm
from lsdseg.data_utils.preprocess import (
    SLAB_BYTES,
    check_gray_values,
    gray_value_counts,
    matching,
    merged_counts,
    write_volume,
)
from lsdseg.data_utils.records import Record, identity
from lsdseg.data_utils.regions import crop
from lsdseg.data_utils.replace import check_replaceable_zarr, write_zarr
from lsdseg.data_utils.volumes import Slabs, create_array, has_array, list_arrays, open_array, read, slabs
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk


class Job(NamedTuple):
    """What an operation works on.

    Attributes:
        array: (z, y, x), the dataset to change.
        source: the zarr that holds it.
        dataset: its name.
        record: what the result is made from.
    """

    array: Array
    source: Path
    dataset: str
    record: Record

    @property
    def where(self) -> str:
        """Name of the dataset, for messages."""
        return f"{self.dataset} in {self.source}"


# Writes the result to a zarr.
Write = Callable[[Path], None]


def process_zarr(operation: str, source: Path, target: Path, *, dataset: str, overwrite: bool, **options: Any) -> None:
    """Write a zarr with the result of an operation on one dataset and all others as they are; print what was written.

    Args:
        operation: one of the OPERATIONS. "crop" cuts the other datasets, too.
        source: zarr to read.
        target: zarr to write.
        dataset: the dataset to change. For "crop", the labels.
        overwrite: replace a target that exists.
        options: what the operation takes.

    Raises:
        UserError: an input is missing or does not suit the operation, the target exists, or there is no room on disk.
    """
    array = open_array(source, dataset)
    settings = {key: str(value) for key, value in options.items()}
    record = Record(f"data_utils/process.py {operation}", {"the source": identity(array)}, settings)
    job = Job(array, source, dataset, record)
    if not len(array.shape) == array.voxel_size.dims == 3:
        raise UserError(f"{job.where} has shape {array.shape}: name a dataset with the axes z, y, x (--dataset)")
    if dataset not in list_arrays(source):  # other formats, and sections, whose other datasets would be lost
        raise UserError(f"{job.where} is not one array of a zarr: convert it first (data_utils/to_zarr.py)")
    inputs = [source, options["reference"]] if "reference" in options else [source]
    check_replaceable_zarr(target, inputs)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: add --overwrite, or write elsewhere")
    write = OPERATIONS[operation](job, **options)
    with room_on_disk(target), write_zarr(target, inputs) as zarr:
        for name in list_arrays(source) if operation != "crop" else ():
            if name != dataset:
                write_volume(zarr, name, open_array(source, name))
        write(zarr)
    for name in list_arrays(target):
        written = open_array(target, name)
        print(f"{target}: {name} {written.dtype} {written.shape}, {offset_nm(written)} nm")


def equalize(job: Job, tile: Sequence[int], limit: float) -> Write:
    """Equalize gray values around every voxel, see `clahe.clahe`."""
    array = job.array
    if array.dtype.kind != "f" and not (array.dtype.kind in "iu" and array.dtype.itemsize <= LARGEST_RAW):
        raise UserError(f"{job.where} is {array.dtype}, which is not raw: name another dataset (--dataset)")
    window = own_window(array.dtype) or gray_percentiles(array)

    def write(zarr: Path) -> None:
        new = _create(zarr, job, array.shape, array.offset, array.dtype)
        # Squares, not rows through the whole volume: a thin row would be small beside its context.
        side = max(1, math.isqrt(SLAB_BYTES // (math.prod(new.chunk_shape) * new.dtype.itemsize)))
        z, y, x = new.chunk_shape
        for slab in Slabs(new.shape, (z, y * side, x * side)).with_progress("CLAHE", delay=0):
            new[slab] = clahe_region(lambda voxels: read(array, voxels), array.shape, slab, window, tile, limit)

    return write


def match(job: Job, reference: Path, reference_dataset: str) -> Write:
    """Give a volume of integers the histogram of another one, and its type."""
    wanted = open_array(reference, reference_dataset)
    check_gray_values(job.array, job.where)
    check_gray_values(wanted, f"{reference_dataset} in {reference}")
    convert = matching(gray_value_counts(job.array), gray_value_counts(wanted), wanted.dtype)
    return lambda zarr: write_volume(zarr, job.dataset, job.array, convert, **job.record.attributes)


def merge(job: Job, ids: Sequence[int], into: int) -> Write:
    """Give the labels `ids` the id `into`."""
    _check_labels(job)
    largest = np.iinfo(job.array.dtype).max
    if max(*ids, into) > largest:
        raise UserError(f"{job.where} is {job.array.dtype}, which has no id above {largest}: choose other ids")
    table = dict.fromkeys(ids, into)

    def convert(labels: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(fastremap.remap(labels, table, preserve_missing_labels=True))

    return lambda zarr: write_volume(zarr, job.dataset, job.array, convert, **job.record.attributes)


def remove_small(job: Job, voxels: int) -> Write:
    """Set to 0 the labels that have fewer voxels in the whole volume. Unlabeled voxels stay so."""
    _check_labels(job)
    counts = [
        fastremap.unique(read(job.array, slab), return_counts=True)
        for slab in slabs(job.array, SLAB_BYTES).with_progress("sizes")
    ]
    ids, sizes = merged_counts(counts)
    small = ids[(sizes < voxels) & is_labeled(ids) & (ids != 0)]
    print(f"{len(small)} of {np.count_nonzero(is_labeled(ids) & (ids != 0))} labels have fewer than {voxels} voxels")

    def convert(labels: NDArray[Any]) -> NDArray[Any]:
        return np.where(np.isin(labels, small), np.zeros(1, labels.dtype), labels)

    return lambda zarr: write_volume(zarr, job.dataset, job.array, convert, **job.record.attributes)


def split_components(job: Job, connectivity: int) -> Write:
    """Give every connected component of every label an id of its own, see `components.write_components`."""
    _check_labels(job)

    def write(zarr: Path) -> None:
        new = _create(zarr, job, job.array.shape, job.array.offset, np.dtype(np.uint64))
        count = write_components(job.array, new, slabs(new, SLAB_BYTES), connectivity)
        print(f"{count} components")

    return write


def pad(job: Job, by: Sequence[int], mode: str) -> Write:
    """Add voxels on every side, as `numpy.pad` does; the offset moves, so that all stays at its place."""
    array = job.array
    options = {"constant_values": -1} if mode == "constant" else {}
    # For each axis: which voxel of the array a voxel of the result is; -1 for one that becomes 0.
    voxels = [np.pad(np.arange(n), width, mode=mode, **options) for n, width in zip(array.shape, by, strict=True)]  # type: ignore[call-overload]

    def write(zarr: Path) -> None:
        shape = [len(along) for along in voxels]
        new = _create(zarr, job, shape, array.offset - Coordinate(by) * array.voxel_size, array.dtype)
        for slab in slabs(new, SLAB_BYTES).with_progress("padding"):
            wanted = [along[part] for along, part in zip(voxels, slab, strict=True)]
            inside = [along[along >= 0] for along in wanted]
            if all(map(len, inside)):
                values = read(array, tuple(slice(along.min(), along.max() + 1) for along in inside))
                padded = np.zeros([len(along) for along in wanted], array.dtype)
                known = np.ix_(*(along >= 0 for along in wanted))
                padded[known] = values[np.ix_(*(along - along.min() for along in inside))]
                new[slab] = padded

    return write


def crop_to_labels(job: Job, raw: str, mask: str, context: Sequence[int]) -> Write:
    """Cut every dataset to the box that is labeled, and raw to `context` voxels more on each side, where there are any.

    Voxels are labeled where the mask says so; without a mask, where the id is neither 0 nor one for unlabeled voxels.
    """
    _check_labels(job)
    known = open_array(job.source, mask) if has_array(job.source, mask) else job.array
    box = _labeled_box(known)
    if box is None:
        raise UserError(f"{job.source} has no labeled voxel: correct {mask if known is not job.array else job.dataset}")
    parts = {}
    for name in list_arrays(job.source):
        array = in_picometers(open_array(job.source, name))
        if array.voxel_size.dims == 3:
            margin = Coordinate(context) * array.voxel_size if name == raw else Coordinate(0, 0, 0)
            grid = (box.grow(margin, margin) - array.offset).snap_to_grid(array.voxel_size, "grow") + array.offset
            part = grid.intersect(array.roi)
        if array.voxel_size.dims != 3 or part.empty:
            print(f"left out {name}: it is not a volume, or outside what is labeled")
        else:
            parts[name] = crop(array, part), dict(array.attrs)

    def write(zarr: Path) -> None:
        for name, (array, attributes) in parts.items():
            write_volume(zarr, name, array, **attributes | job.record.attributes)

    return write


OPERATIONS: dict[str, Callable[..., Write]] = {
    "clahe": equalize,
    "match": match,
    "merge": merge,
    "remove-small": remove_small,
    "components": split_components,
    "pad": pad,
    "crop": crop_to_labels,
}


def _create(zarr: Path, job: Job, shape: Sequence[int], offset: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Create the array of a result, with the attributes of the source and the record. The offset is in its unit."""
    return create_array(
        zarr,
        job.dataset,
        shape,
        voxel_size=voxel_size_nm(job.array),
        offset=nanometers(offset, job.array),
        dtype=dtype,
        attributes=dict(job.array.attrs) | job.record.attributes,
    )


def _check_labels(job: Job) -> None:
    if job.array.dtype.kind != "u":
        raise UserError(
            f"{job.where} is {job.array.dtype}, but labels are unsigned integers: name another dataset (--dataset), or "
            "store it as uint64"
        )


def _labeled_box(array: Array) -> Roi | None:
    """Return the smallest box in pm with all labeled voxels of labels or of a mask, None if there are none."""
    begin, end = np.array(array.shape), np.zeros(3, int)
    for slab in slabs(array, SLAB_BYTES).with_progress("labeled box"):
        values = read(array, slab)
        labeled = (values != 0) & is_labeled(values)
        if labeled.any():
            for axis, along in enumerate(slab):
                places = np.flatnonzero(labeled.any(axis=tuple({0, 1, 2} - {axis}))) + along.start
                begin[axis], end[axis] = min(begin[axis], places[0]), max(end[axis], places[-1] + 1)
    if not end.any():
        return None
    placed = in_picometers(array)
    first, last = (Coordinate(corner) * placed.voxel_size for corner in (begin, end))
    return Roi(first + placed.offset, last - first)
