"""Where a neuron may be split, without ground truth: contacts across which the network saw no membrane.

A contact is two segments that share faces of voxels. Agglomeration left them apart, and the mean affinity across these
faces says how nearly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """

    segment: int
    other: int
    affinity: float
    faces: int
    z: float
    y: float
    x: float
    voxels: int


class Touching(NamedTuple):
    """Contacts; one row for each pair of segments, the smaller id first.

    Attributes:
        pairs: uint64 (n, 2), sorted.
        faces: int64 (n,), how many they share.
        sums: float64 (n,), of the affinities across them.
        largest: float32 (n,), the largest of these affinities.
        places: float64 (n, 3), where that is, in nm, z, y, x.
    """

    pairs: NDArray[np.uint64]
    faces: NDArray[np.int64]
    sums: NDArray[np.float64]
    largest: NDArray[np.float32]
    places: NDArray[np.float64]


NOTHING = Touching(
    np.empty((0, 2), np.uint64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.float32), np.empty((0, 3))
)


def find_touching(
    affinities: NDArray[np.float32],
    segmentation: NDArray[np.unsignedinteger],
    offsets: Sequence[Offset],
    voxel_size: Sequence[float],
    offset: Sequence[float],
) -> Touching:
    """Find the contacts of a block. A face belongs to the block of the voxel that has its affinity.

    Args:
        affinities: float32 (c, z, y, x) in 0..1.
        segmentation: unsigned (z + 2, y + 2, x + 2), one voxel more on each side; 0 is background, and what lies
            outside of the volume.
        offsets: (z, y, x) of each channel; only direct neighbors count.
        voxel_size: in nm.
        offset: of the block, without the voxels around it, in nm.
    """
    rows = [NOTHING]
    for channel, step in zip(affinities, offsets, strict=True):
        if not is_direct(step):
            continue
        here, there = (
            segmentation[tuple(slice(1 + n, 1 + n + size) for n, size in zip(shift, channel.shape, strict=True))]
            for shift in ((0, 0, 0), step)
        )
        at = np.nonzero((here != there) & (here > 0) & (there > 0))
        ends = np.sort(np.stack([here[at], there[at]], axis=1).astype(np.uint64), axis=1)
        middle = (np.stack(at, axis=1) + 0.5 + np.array(step) / 2) * np.array(voxel_size) + np.array(offset)
        rows.append(Touching(ends, np.ones(len(ends), np.int64), channel[at].astype(np.float64), channel[at], middle))
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
    faces, sums = (np.add.reduceat(column[order], first) for column in (together.faces, together.sums))
    return Touching(pairs[first], faces, sums, together.largest[order][last], together.places[order][last])


def rank_splits(touching: Touching, voxels: dict[int, int], least: int) -> list[Split]:
    """Rank contacts by the mean affinity across them.

    Args:
        touching: all contacts, see `joined`.
        voxels: size of each segment.
        least: contacts of smaller segments are left out: they are too many, and matter little.
    """
    sizes = np.array([[voxels.get(end, 0) for end in pair] for pair in touching.pairs.tolist()]).reshape(-1, 2).min(1)
    affinity = touching.sums / np.maximum(touching.faces, 1)
    order = np.lexsort((touching.pairs[:, 1], touching.pairs[:, 0], -affinity))
    return [_split(touching, n, float(affinity[n]), int(sizes[n])) for n in order.tolist() if sizes[n] >= least]


def _split(touching: Touching, row: int, affinity: float, voxels: int) -> Split:
    (segment, other), (z, y, x) = touching.pairs[row].tolist(), touching.places[row].tolist()
    return Split(segment, other, affinity, int(touching.faces[row]), z, y, x, voxels)


def touching_in(sample: Sample, array: Array, name: str) -> Touching:
    """Read a segmentation and the affinities block by block, and find all contacts.

    Args:
        sample: the sample.
        array: the segmentation.
        name: its dataset.

    Raises:
        UserError: the affinities are missing, or do not lie on the same voxels.
    """
    predicted, size = sample.affinities, voxel_size_nm(array)
    require_whole(sample.output, AFFINITIES)
    if (array.roi, array.voxel_size) != (predicted.roi, predicted.voxel_size):
        raise UserError(
            f"{name} in {sample.output} lies on other voxels than {AFFINITIES}: predict and segment with one config"
        )
    channels = [n for n, offset in enumerate(sample.offsets) if is_direct(offset)]
    found = [NOTHING]
    for slab in slabs(array, BLOCK).with_progress(f"contacts in {name}"):
        affinities = np.stack([read(predicted, (channel, *slab)) for channel in channels]).astype(np.float32)
        affinities /= np.float32(255 if predicted.dtype == np.uint8 else 1)
        around = tuple(slice(max(0, s.start - 1), min(n, s.stop + 1)) for s, n in zip(slab, array.shape, strict=True))
        missing = [(1 - s.start + a.start, 1 - a.stop + s.stop) for s, a in zip(slab, around, strict=True)]
        segments = np.pad(read(array, around), missing)
        offset = nanometers(array.offset + Coordinate(s.start for s in slab) * array.voxel_size, array)
        found.append(find_touching(affinities, segments, [sample.offsets[n] for n in channels], size, offset))
    return joined(found)
