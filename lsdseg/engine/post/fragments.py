"""Fragments (supervoxels) from affinities: a watershed on the distance to the nearest boundary.

Squared distances in voxels are whole numbers, so buckets take the place of a heap in the watershed. That makes it
linear in the number of voxels, and more than twice as fast as those of scikit-image and mahotas.

On the boundary there is no distance. Its voxels are flooded in the order of their affinity, so that two neurites
meet where the membrane between them is surest, wherever in its width that is. Where boundary fills the whole window of
a seed (resin, a vessel, a membrane that is cut flat), it is no membrane between two neurites. It gets seeds of its own:
otherwise the neurites around it would flood it.
"""

from typing import Any

import edt
import fastremap
import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from lsdseg.engine.post.affinities import float_affinities
from lsdseg.engine.post.agglomerate import agglomerate

BOUNDARY = 0.5  # a voxel whose mean affinity is not above it counts as boundary
AFFINITY_LEVELS = 255  # of boundary voxels, below those of all distances
SEED_DISTANCE = 10  # voxels: edge of the window in which a seed's distance is the largest
EPSILON_MERGE_FUNCTION = "hist_quant_25"


def extract_fragments(
    affinities: ArrayLike,
    *,
    fragments_in_xy: bool = False,
    background_mask: bool = False,
    mask: ArrayLike | None = None,
    filter_fragments: float = 0.0,
    epsilon_agglomerate: float = 0.0,
    placement: ArrayLike | None = None,
) -> NDArray[np.uint64]:
    """Partition a volume into fragments, the pieces that agglomeration puts together.

    Mean affinity above 0.5, distance to the boundary, its local maxima as seeds, watershed: Sheridan et al.,
    Nature Methods 2023, after Funke et al., TPAMI 2019. Distances are in voxels, also for anisotropic data:
    there a section is so much thicker than a pixel that a distance across sections says little, in any unit,
    and ``fragments_in_xy`` is the answer.

    Args:
        affinities: (3, z, y, x), channels z, y, x; uint8 in 0..255 or floating point in 0..1.
        fragments_in_xy: keep every fragment within one section; only the y and x affinities count then.
        background_mask: leave boundary voxels 0; otherwise fragments flood them and touch.
        mask: (z, y, x); fragments are made where it is not 0.
        filter_fragments: drop the fragments whose mean affinity is lower.
        epsilon_agglomerate: merge fragments up to this threshold, with the 25th percentile; 0 does not.
        placement: affinities (as above) of labels that touch, without boundary between them. They say where in the
            boundary two fragments meet. Without, fragments meet where the affinity is lowest.

    Returns:
        uint64 (z, y, x), ids 1..n, 0 is background.

    Raises:
        ValueError: affinities of another type or range.
    """
    floats = float_affinities(affinities)
    mean_affinity = (floats[1:] if fragments_in_xy else floats).mean(axis=0)
    inside = np.ones(mean_affinity.shape, bool) if mask is None else np.asarray(mask) != 0
    foreground = (mean_affinity > BOUNDARY) & inside

    distances = squared_distances(foreground, fragments_in_xy)
    seeds = find_seeds(distances, fragments_in_xy)
    if background_mask or placement is None:
        levels = flood_levels(distances, mean_affinity)
        flooded = flood(seeds, levels, foreground if background_mask else inside, fragments_in_xy)
    else:
        flooded = flood(seeds, distances, (foreground | (seeds > 0)) & inside, fragments_in_xy)
        flooded = flood_between(flooded, float_affinities(placement), inside, fragments_in_xy)
    fragments = flooded.astype(np.uint64)

    drop_weak(fragments, mean_affinity, filter_fragments)
    if epsilon_agglomerate > 0:
        merged = agglomerate(floats, fragments, [epsilon_agglomerate], EPSILON_MERGE_FUNCTION)
        _, fragments = next(merged)
    return renumbered(fragments)


def renumbered(labels: NDArray[Any]) -> NDArray[np.uint64]:
    """Labels with ids 1..n; 0 stays 0. The array that is given may be changed."""
    return np.asarray(fastremap.renumber(labels, preserve_zero=True, in_place=True)[0], np.uint64)


def drop_weak(fragments: NDArray[np.uint64], mean_affinity: NDArray[np.float32], least: float) -> None:
    """Set fragments to 0, in place, if their mean of ``mean_affinity`` is below ``least``."""
    if least > 0:
        sizes = np.maximum(np.bincount(fragments.ravel()), 1)
        sums = np.bincount(fragments.ravel(), weights=mean_affinity.ravel())
        fragments[(sums / sizes < least)[fragments]] = 0


def squared_distances(foreground: NDArray[np.bool_], in_xy: bool = False) -> NDArray[np.int32]:
    """Squared distance (int32, voxels) of foreground voxels to the nearest background, 1 if there is none.

    ``in_xy`` measures within each section of the (z, y, x) volume.
    """
    distances = np.stack([edt.edtsq(s) for s in foreground]) if in_xy else edt.edtsq(foreground)
    return np.where(np.isinf(distances), 1, distances).astype(np.int32)


def find_seeds(distances: NDArray[np.int32], in_xy: bool = False) -> NDArray[np.int32]:
    """Label (int32) the connected plateaus on which ``distances`` is the largest of the window around it.

    Plateaus of distance 0 count, but not in a volume (with ``in_xy``, a section) that has no other: it is empty, as
    where nothing was imaged or predicted, and gets no seeds.
    """
    size = (1 if in_xy else SEED_DISTANCE, SEED_DISTANCE, SEED_DISTANCE)
    not_empty = distances.any(axis=(1, 2), keepdims=True) if in_xy else distances.any()
    maxima = (distances == ndimage.maximum_filter(distances, size)) & not_empty
    neighbors = ndimage.generate_binary_structure(3, 1)
    if in_xy:
        neighbors[[0, 2]] = False
    return np.asarray(ndimage.label(maxima, neighbors)[0], np.int32)


def flood_levels(distances: NDArray[np.int32], mean_affinity: NDArray[np.float32]) -> NDArray[np.int32]:
    """Levels (int32) that are flooded from high to low: by squared distance, and then the boundary by affinity."""
    boundary = np.rint(mean_affinity * AFFINITY_LEVELS).astype(np.int32)
    return np.where(distances > 0, distances + np.int32(AFFINITY_LEVELS), boundary)


def flood(
    seeds: NDArray[Any], levels: NDArray[np.int32], inside: NDArray[np.bool_], in_xy: bool = False
) -> NDArray[np.int32]:
    """Grow seeds (ids, 0 elsewhere) from high to low levels (int32, 0 or more), where ``inside`` holds.

    First come, first served on equal levels. The seeded watershed of ``-levels`` by Meyer's algorithm, over 6
    neighbors (4 with ``in_xy``). Returns int32.
    """
    labels = np.pad(np.where(inside, seeds.astype(np.int32), -1), 1, constant_values=-1)
    _, height, width = labels.shape
    offsets = np.array([-height * width, -width, -1, 1, width, height * width])
    _flood(labels.ravel(), np.pad(levels, 1).ravel(), offsets[1:-1] if in_xy else offsets)
    return np.asarray(np.maximum(labels[1:-1, 1:-1, 1:-1], 0), np.int32)


@numba.njit(cache=True)
def _flood(labels: NDArray[np.int32], levels: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
    """Replace the zeros of ``labels`` in place; -1 stays, and must surround the volume."""
    first = np.full(levels.max() + 1, -1)  # per level a queue of voxels, linked through `following`
    last = np.full(first.size, -1)
    following = np.full(labels.size, -1)
    level = 0
    for voxel in range(labels.size):
        if labels[voxel] > 0:
            level = max(level, _push(voxel, levels[voxel], first, last, following))
    while level >= 0:
        voxel = first[level]
        if voxel < 0:
            level -= 1
            continue
        first[level] = following[voxel]
        for offset in offsets:
            neighbor = voxel + offset
            if labels[neighbor] == 0:
                labels[neighbor] = labels[voxel]
                level = max(level, _push(neighbor, levels[neighbor], first, last, following))


def flood_between(
    labels: NDArray[Any], affinities: NDArray[np.float32], inside: NDArray[np.bool_], in_xy: bool = False
) -> NDArray[np.int32]:
    """Grow labels into the voxels between them, where ``inside`` holds, surest affinity first.

    Two labels meet at the pair of voxels with the lowest affinity on the way between them: a maximum spanning forest,
    by Prim's algorithm. Single voxels could not say that. The voxels on both sides of the face between two neurites
    have a low mean affinity.

    Args:
        labels: (z, y, x) ids, 0 elsewhere.
        affinities: (3, z, y, x) in 0..1, channels z, y, x, of labels that touch.
        inside: (z, y, x).
        in_xy: only the y and x affinities count.

    Returns:
        int32 (z, y, x).
    """
    padded = np.pad(np.where(inside, labels.astype(np.int32), -1), 1, constant_values=-1)
    _, height, width = padded.shape
    levels = np.rint(affinities * AFFINITY_LEVELS).astype(np.uint8)
    levels = np.pad(levels, ((0, 0), (1, 1), (1, 1), (1, 1))).reshape(3, -1)
    _flood_between(padded.ravel(), levels, np.array([height * width, width, 1]), 1 if in_xy else 0)
    return np.asarray(np.maximum(padded[1:-1, 1:-1, 1:-1], 0), np.int32)


@numba.njit(cache=True)
def _flood_between(
    labels: NDArray[np.int32], levels: NDArray[np.uint8], steps: NDArray[np.int64], first_axis: int
) -> None:
    """Replace the zeros of ``labels`` in place; -1 stays, and must surround the volume.

    A labeled voxel waits in the queue of the surest affinity to any neighbor without a label. When its turn comes, that
    neighbor may have one; then the voxel waits again.
    """
    first = np.full(AFFINITY_LEVELS + 1, -1)
    last = np.full(first.size, -1)
    following = np.full(labels.size, -1)
    level = -1
    for voxel in range(labels.size):
        if labels[voxel] > 0:
            surest, _ = _surest_neighbor(voxel, labels, levels, steps, first_axis)
            if surest >= 0:
                level = max(level, _push(voxel, surest, first, last, following))
    while level >= 0:
        voxel = first[level]
        if voxel < 0:
            level -= 1
            continue
        first[level] = following[voxel]
        surest, neighbor = _surest_neighbor(voxel, labels, levels, steps, first_axis)
        if surest == level:
            labels[neighbor] = labels[voxel]
            beyond, _ = _surest_neighbor(neighbor, labels, levels, steps, first_axis)
            if beyond >= 0:
                level = max(level, _push(neighbor, beyond, first, last, following))
        if surest >= 0:
            _push(voxel, surest, first, last, following)


@numba.njit(cache=True)
def _surest_neighbor(
    voxel: int, labels: NDArray[np.int32], levels: NDArray[np.uint8], steps: NDArray[np.int64], first_axis: int
) -> tuple[int, int]:
    """The highest level of an affinity to a neighbor that is 0, and that neighbor; -1 and -1 if there is none."""
    surest: Any = -1
    neighbor: Any = -1
    for axis in range(first_axis, 3):
        before, after = voxel - steps[axis], voxel + steps[axis]
        if labels[before] == 0 and levels[axis, voxel] > surest:
            surest, neighbor = np.int64(levels[axis, voxel]), before
        if labels[after] == 0 and levels[axis, after] > surest:
            surest, neighbor = np.int64(levels[axis, after]), after
    return surest, neighbor


@numba.njit(cache=True)
def _push(
    voxel: int, level: int, first: NDArray[np.int64], last: NDArray[np.int64], following: NDArray[np.int64]
) -> int:
    """Append a voxel to the queue of its level, which is returned."""
    following[voxel] = -1
    if first[level] < 0:
        first[level] = voxel
    else:
        following[last[level]] = voxel
    last[level] = voxel
    return level
