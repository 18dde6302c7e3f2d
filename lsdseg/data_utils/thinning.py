"""Thinning of labels to curves one voxel wide, all objects of an array at once.

Voxels are taken away from six sides in turn (Lee et al., CVGIP 1994) where all else hangs together as before (Bertrand
and Malandain, Pattern Recognition Letters 1994), and ends are kept. The curves are those of scikit-image's
`skeletonize`. Only voxels at a surface are looked at, so time does not depend on how many objects there are and how
large their bounding boxes.
"""

from itertools import cycle, product
from typing import Any

import fastremap
import numba
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

# The 27 voxels around a voxel in the order of memory: z, y, x. A set of them is an integer with a bit for each.
AROUND = np.array(list(product((-1, 0, 1), repeat=3)))
APART = np.abs(AROUND).sum(axis=1)


def _bits(members: NDArray[np.bool_]) -> int:
    return sum(1 << int(number) for number in np.flatnonzero(members))


SELF, FACES, NEAR = _bits(APART == 0), _bits(APART == 1), _bits((APART == 1) | (APART == 2))
BEFORE_LAST_X, BEFORE_LAST_Y = (_bits(AROUND[:, axis] < 1) for axis in (2, 1))
SIDES = np.array([(0, -1, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1), (1, 0, 0), (-1, 0, 0)])  # in scikit-image's order


def thin(labels: NDArray[Any], bar: tqdm | None = None) -> NDArray[np.bool_]:
    """Return the voxels of the curves of all objects.

    Args:
        labels: integers (z, y, x), 0 is background, and so is all that lies outside.
        bar: counts the voxels that are taken away.

    Returns:
        Bool, the same shape. Each 26-connected part of an object keeps 26-connected voxels, at least one.
    """
    local, _ = fastremap.renumber(np.pad(labels, 1), in_place=True)
    kept = np.ascontiguousarray(local, np.uint32)
    strides = np.array(kept.strides) // kept.itemsize
    voxels, around, sides = kept.ravel(), AROUND @ strides, SIDES @ strides
    listed = np.zeros(len(voxels), bool)
    surface = _surface(voxels, sides, listed)
    unchanged = 0
    for side in cycle(sides):
        surface, removed = _take_away(voxels, side, around, sides, surface, listed)
        if bar is not None:
            bar.update(removed)
        unchanged = 0 if removed else unchanged + 1
        if unchanged == len(sides):
            break
    curves: NDArray[np.bool_] = kept[1:-1, 1:-1, 1:-1] != 0
    return curves


@numba.njit(cache=True)
def _surface(voxels: NDArray[np.uint32], sides: NDArray[np.int64], listed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return which voxels have a face to another object or to background, and mark them.

    Args:
        voxels: (n,), a volume with a margin of zeros.
        sides: (6,), from a voxel to those that share a face with it.
        listed: (n,), what to mark.
    """
    for voxel in range(len(voxels)):
        if voxels[voxel] != 0:
            for side in sides:
                if voxels[voxel + side] != voxels[voxel]:
                    listed[voxel] = True
    return np.flatnonzero(listed)


@numba.njit(cache=True)
def _take_away(
    voxels: NDArray[np.uint32],
    side: int,
    around: NDArray[np.int64],
    sides: NDArray[np.int64],
    surface: NDArray[np.int64],
    listed: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], int]:
    """Set voxels to 0 that have a face on one side and are not needed.

    Args:
        voxels, sides, listed: as for `_surface`.
        side: from a voxel to the one on that side.
        around: (27,), from a voxel to those around it.
        surface: which voxels have a face, in any order.

    Returns:
        The new surface, and how many voxels were taken away.
    """
    chosen = np.empty_like(surface)
    found = 0
    for voxel in surface:
        if voxels[voxel + side] != voxels[voxel]:
            own = _same(voxels, voxel, around)
            if not _is_end(own) and _is_simple(own):
                chosen[found] = voxel
                found += 1
    laid_bare = np.empty(len(sides) * found, np.int64)
    removed = bare = 0
    for voxel in np.sort(chosen[:found]):
        if _is_simple(_same(voxels, voxel, around)):  # those before may have left it as the only link
            for step in sides:
                near = voxel + step
                if voxels[near] == voxels[voxel] and not listed[near]:
                    listed[near] = True
                    laid_bare[bare] = near
                    bare += 1
            voxels[voxel] = 0
            removed += 1
    left = np.concatenate((surface, laid_bare[:bare]))
    return left[voxels[left] != 0], removed


@numba.njit(cache=True)
def _same(voxels: NDArray[np.uint32], voxel: int, around: NDArray[np.int64]) -> int:
    """Return which voxels around a voxel are of its object, itself included."""
    own = 0
    for number in range(27):
        if voxels[voxel + around[number]] == voxels[voxel]:
            own |= 1 << number
    return own


@numba.njit(cache=True)
def _is_end(own: int) -> bool:
    """Return whether a voxel has one neighbor or none; argument as for `_is_simple`."""
    neighbors = own & ~SELF
    return neighbors & (neighbors - 1) == 0


@numba.njit(cache=True)
def _is_simple(own: int) -> bool:
    """Return whether all else hangs together as before without a voxel. One without neighbors is not simple.

    Its neighbors must be one part, and so must the voxels outside at its faces, by way of those at its edges.

    Args:
        own: what `_same` returned.
    """
    outside = ~own & NEAR
    at_faces = outside & FACES
    reached = at_faces & -at_faces
    while reached & at_faces != at_faces:
        spread = (reached & BEFORE_LAST_X) << 1 | reached >> 1 & BEFORE_LAST_X
        spread |= (reached & BEFORE_LAST_Y) << 3 | reached >> 3 & BEFORE_LAST_Y
        spread = (reached | spread | reached << 9 | reached >> 9) & outside
        if spread == reached:
            return False
        reached = spread
    neighbors = own & ~SELF
    reached = neighbors & -neighbors
    while reached != neighbors:
        spread = reached | (reached & BEFORE_LAST_X) << 1 | reached >> 1 & BEFORE_LAST_X
        spread |= (spread & BEFORE_LAST_Y) << 3 | spread >> 3 & BEFORE_LAST_Y
        spread = (spread | spread << 9 | spread >> 9) & neighbors
        if spread == reached:
            return False
        reached = spread
    return at_faces != 0 and neighbors != 0
