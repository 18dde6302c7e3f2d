"""Segments that somebody proofread become ground truth to train on.

Only what was marked as right is known. Around it, one voxel is known, too: it belongs to something else, so the face
between the two is a boundary. Without that, a network would learn where neurites go on, but not where they end.
"""

from pathlib import Path

import numpy as np
from funlib.geometry import Coordinate, Roi
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from lsdseg.data_utils.convert import target_paths
from lsdseg.data_utils.corrected import Corrected, write_labels
from lsdseg.data_utils.layout import FRAGMENTS, LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.placement import nanometers, voxel_size_nm
from lsdseg.data_utils.preprocess import write_volume
from lsdseg.data_utils.records import Record, identity
from lsdseg.data_utils.regions import crop
from lsdseg.data_utils.replace import write_zarr
from lsdseg.data_utils.volumes import read, slabs
from lsdseg.engine.sample import Sample
from lsdseg.engine.view.proofread import Proofreading
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk

STEP = "view.py --export-labels"


def export_labels(proofreading: Proofreading, sample: Sample, target: Path, overwrite: bool = False) -> None:
    """Write the segments that were marked as right to a volume to train on, and print what was written.

    It holds raw, labels and their mask in the box of these segments, and so much of raw around it that every label can
    be in the middle of a patch.

    Args:
        proofreading: the segments.
        sample: what they are segments of.
        target: the zarr.
        overwrite: replace a zarr that exists.

    Raises:
        UserError: no segment is marked; there is no raw, or not on the voxels of the fragments; the zarr exists; there
            is no room on disk.
    """
    marked = np.array(proofreading.marked(), np.uint64)
    if not len(marked):
        raise UserError(
            f"no segment is marked as right in {proofreading.log.path}: point at one that is, in view.py --proofread, "
            "and press d"
        )
    (checked,) = target_paths([sample.volume], target, overwrite)
    fragments, raw = proofreading.fragments, sample.raw
    if voxel_size_nm(raw) != voxel_size_nm(fragments):
        raise UserError(
            f"{sample.volume} has voxels of {voxel_size_nm(raw)} nm, but {FRAGMENTS} of "
            f"{voxel_size_nm(fragments)}: name the volume that was predicted with --volume"
        )
    first, last = _box(proofreading, marked)
    size = fragments.voxel_size
    roi = Roi(fragments.offset + Coordinate(first) * size, Coordinate(last - first) * size)

    def labels_in(voxels: tuple[slice, ...]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        placed = [slice(v.start + f, v.stop + f) for v, f in zip(voxels, first.tolist(), strict=True)]
        return _labels(proofreading, marked, placed)

    begin = nanometers(roi.begin, fragments)
    labels = Corrected(str(proofreading.log.path), labels_in, roi.shape / size, voxel_size_nm(fragments), begin)
    half = Coordinate(np.array(sample.cfg.MODEL.RAW_SHAPE[-3:]) // 2) * size
    settings = {"the segments": marked.tolist(), "the threshold": proofreading.threshold}
    record = Record(STEP, {"raw": identity(raw), FRAGMENTS: identity(fragments)}, settings)
    with room_on_disk(checked), write_zarr(checked, [sample.volume, sample.output]) as zarr:
        write_volume(zarr, RAW, crop(raw, roi.grow(half, half).intersect(raw.roi)))
        counted = write_labels(zarr, LABELS, LABELS_MASK, labels, lambda ids: np.ones(ids.shape, bool), record)
    print(f"{checked}: {counted}")


def _box(proofreading: Proofreading, marked: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First voxel of the box of some segments and one voxel around them, and the voxel behind its last one."""
    fragments = proofreading.fragments
    first, last = np.array(fragments.shape), np.zeros(3, np.int64)
    for slab in slabs(fragments).with_progress("looking for the segments"):
        inside = np.isin(proofreading.segments_of(read(fragments, slab)), marked)
        for axis, start in enumerate(part.start for part in slab):
            found = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) + start
            if len(found):
                first[axis], last[axis] = min(first[axis], found[0]), max(last[axis], found[-1] + 1)
    return (first - 1).clip(0), (last + 1).clip(max=fragments.shape)


def _labels(
    proofreading: Proofreading, marked: NDArray[np.uint64], voxels: list[slice]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Labels of some segments in a box, 0 elsewhere, and where they are known."""
    fragments = proofreading.fragments
    around = tuple(slice(max(0, v.start - 1), min(n, v.stop + 1)) for v, n in zip(voxels, fragments.shape, strict=True))
    inner = tuple(slice(v.start - a.start, v.stop - a.start) for v, a in zip(voxels, around, strict=True))
    segments = proofreading.segments_of(read(fragments, around))
    inside = np.isin(segments, marked)
    return np.where(inside, segments, np.uint64(0))[inner], binary_dilation(inside)[inner]
