"""Where a neuron may be split, without ground truth: contacts across which the network saw no membrane.

A contact is two segments that share faces of voxels. Agglomeration left them apart, and the mean affinity across these
faces says how nearly. If several views were predicted and their disagreement was kept, half of it is taken off: what is
left is about the affinity of the view that saw the most membrane.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from funlib.geometry import Coordinate
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.data_utils.placement import nanometers, voxel_size_nm
from lsdseg.data_utils.volumes import read, require_whole, slabs
from lsdseg.engine.offsets import Offset, is_direct
from lsdseg.engine.sample import AFFINITIES, Sample
from lsdseg.errors import UserError

BLOCK = 2**25  # bytes of a segmentation that are read at a time


@dataclass
class Split:
    """One contact of the list.

    Attributes:
        segment: the smaller id.
        other: the larger one.
        affinity: the mean across the faces that they share, 0..1.
        faces: how many these are.
        z: where the affinity is largest, in nm.
        y: the same.
        x: the same.
        voxels: of the smaller segment, without those at its boundary.
        disagreement: of the views, the mean across these faces, 0..1; None if it was not kept.
    """

    segment: int
    other: int
    affinity: float
    faces: int
    z: float
    y: float
    x: float
    voxels: int
    disagreement: float | None = None


class Touching(NamedTuple):
    """Contacts; one row for each pair of segments, the smaller id first.

    Attributes:
        pairs: uint64 (n, 2), sorted.
        faces: int64 (n,), how many they share.
        sums: float64 (n,), of the affinities across them.
        largest: float32 (n,), the largest of these affinities.
        places: float64 (n, 3), where that is, in nm, z, y, x.
        unsure: float64 (n,), sum of the disagreement of views across them; NaN if it was not kept.
    """

    pairs: NDArray[np.uint64]
    faces: NDArray[np.int64]
    sums: NDArray[np.float64]
    largest: NDArray[np.float32]
    places: NDArray[np.float64]
    unsure: NDArray[np.float64]


NOTHING = Touching(
    np.empty((0, 2), np.uint64),
    np.empty(0, np.int64),
    np.empty(0),
    np.empty(0, np.float32),
    np.empty((0, 3)),
    np.empty(0),
)


def from_stored(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return a prediction in 0..1 as float32: uint8 is stored as 0..255."""
    return values.astype(np.float32) / np.float32(255 if values.dtype == np.uint8 else 1)


def find_touching(
    affinities: NDArray[np.float32],
    segmentation: NDArray[np.unsignedinteger],
    offsets: Sequence[Offset],
    voxel_size: Sequence[float],
    offset: Sequence[float],
    disagreement: NDArray[np.float32] | None = None,
) -> Touching:
    """Find the contacts of a block. A face belongs to the block of the voxel that has its affinity.

    Args:
        affinities: float32 (c, z, y, x) in 0..1.
        segmentation: unsigned (z + 2, y + 2, x + 2), one voxel more on each side; 0 is background, and what lies
            outside of the volume.
        offsets: (z, y, x) of each channel; only direct neighbors count.
        voxel_size: in nm.
        offset: of the block, without the voxels around it, in nm.
        disagreement: of the views in 0..1, the shape of the segmentation; a face has the mean of its two voxels.
    """
    rows = [NOTHING]
    for channel, step in zip(affinities, offsets, strict=True):
        if not is_direct(step):
            continue
        sides = [
            tuple(slice(1 + n, 1 + n + size) for n, size in zip(shift, channel.shape, strict=True))
            for shift in ((0, 0, 0), step)
        ]
        here, there = (segmentation[side] for side in sides)
        at = np.nonzero((here != there) & (here > 0) & (there > 0))
        ends = np.sort(np.stack([here[at], there[at]], axis=1).astype(np.uint64), axis=1)
        middle = (np.stack(at, axis=1) + 0.5 + np.array(step) / 2) * np.array(voxel_size) + np.array(offset)
        unsure = np.full(len(ends), np.nan)
        if disagreement is not None:
            unsure = np.stack([disagreement[side][at] for side in sides]).mean(axis=0, dtype=np.float64)
        faces = np.ones(len(ends), np.int64)
        rows.append(Touching(ends, faces, channel[at].astype(np.float64), channel[at], middle, unsure))
    return joined(rows)


def joined(parts: Sequence[Touching]) -> Touching:
    """Put together what blocks found of the same pairs."""
    together = Touching(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    # The row with the largest affinity is the last of its pair; of equal ones the place decides, whatever the blocks.
    order = np.lexsort((*together.places.T[::-1], together.largest, together.pairs[:, 1], together.pairs[:, 0]))
    pairs = together.pairs[order]
    first = np.flatnonzero(np.append(True, (pairs[1:] != pairs[:-1]).any(axis=1))[: len(pairs)])
    last = np.append(first[1:], len(pairs)) - 1
    if not len(pairs):
        return together
    columns = (together.faces, together.sums, together.unsure)
    faces, sums, unsure = (np.add.reduceat(column[order], first) for column in columns)
    return Touching(pairs[first], faces, sums, together.largest[order][last], together.places[order][last], unsure)


def rank_splits(touching: Touching, voxels: dict[int, int], least: int) -> list[Split]:
    """Rank contacts by the mean affinity across them, less half of the disagreement of views, if it was kept.

    Args:
        touching: all contacts, see `joined`.
        voxels: size of each segment.
        least: contacts of smaller segments are left out: they are too many, and matter little.
    """
    sizes = np.array([[voxels.get(end, 0) for end in pair] for pair in touching.pairs.tolist()]).reshape(-1, 2).min(1)
    affinity, unsure = (column / np.maximum(touching.faces, 1) for column in (touching.sums, touching.unsure))
    order = np.lexsort((touching.pairs[:, 1], touching.pairs[:, 0], np.nan_to_num(unsure) / 2 - affinity))
    splits = []
    for row in order[sizes[order] >= least].tolist():
        (segment, other), (z, y, x) = touching.pairs[row].tolist(), touching.places[row].tolist()
        split = Split(segment, other, float(affinity[row]), int(touching.faces[row]), z, y, x, int(sizes[row]))
        split.disagreement = known(unsure[row])
        splits.append(split)
    return splits


def known(value: float) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


def touching_in(sample: Sample, array: Array, name: str) -> Touching:
    """Read a segmentation and the affinities block by block, and find all contacts.

    Args:
        sample: the sample.
        array: the segmentation.
        name: its dataset.

    Raises:
        UserError: the affinities are missing, or do not lie on the same voxels.
    """
    predicted, disagreement, size = sample.affinities, sample.disagreement, voxel_size_nm(array)
    require_whole(sample.output, AFFINITIES)
    if (array.roi, array.voxel_size) != (predicted.roi, predicted.voxel_size):
        raise UserError(
            f"{name} in {sample.output} lies on other voxels than {AFFINITIES}: predict and segment with one config"
        )
    channels = [n for n, offset in enumerate(sample.offsets) if is_direct(offset)]
    found = [NOTHING]
    for slab in slabs(array, BLOCK).with_progress(f"contacts in {name}"):
        affinities = np.stack([from_stored(read(predicted, (channel, *slab))) for channel in channels])
        around = tuple(slice(max(0, s.start - 1), min(n, s.stop + 1)) for s, n in zip(slab, array.shape, strict=True))
        missing = [(1 - s.start + a.start, 1 - a.stop + s.stop) for s, a in zip(slab, around, strict=True)]
        segments = np.pad(read(array, around), missing)
        unsure = None if disagreement is None else np.pad(from_stored(read(disagreement, (0, *around))), missing)
        offset = nanometers(array.offset + Coordinate(s.start for s in slab) * array.voxel_size, array)
        found.append(find_touching(affinities, segments, [sample.offsets[n] for n in channels], size, offset, unsure))
    return joined(found)
