"""What the shape of a segment says about merges: bodies that a thin neck joins, and sudden changes of caliber.

The radius of a segment at a voxel is the distance to the nearest voxel that is not of this segment. Only two things are
kept of it, which do not depend on where blocks end: the largest radius on the axis of each segment in each cube of the
volume, and the largest radius with which each segment passes from one cube to the next. A neck inside a cube therefore
looks wider than it is, by up to half the width of the cube.
"""

from collections.abc import Sequence
from typing import NamedTuple

import edt
import numba
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

SPREAD = 2  # a place counts as part of a thicker one if it lies within so many of its radii
THIN = 0.25  # of the radius of a body: thinner places are mostly unevenness of the surface, and have no caliber


class Grid(NamedTuple):
    """The cubes of a volume. Cubes and voxels are numbered in C order.

    Attributes:
        shape: of the volume in voxels, z, y, x.
        cube: width of a cube in voxels along each axis. The first one begins where the volume does.
    """

    shape: Sequence[int]
    cube: Sequence[int]

    def cubes_at(self, voxels: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Return the numbers (n,) of the cubes that hold voxels: z, y and x, each int64 (n,)."""
        counts = [-(-size // width) for size, width in zip(self.shape, self.cube, strict=True)]
        return np.ravel_multi_index([at // width for at, width in zip(voxels, self.cube, strict=True)], counts)


class Widths(NamedTuple):
    """How wide segments are; one row for each segment in each cube, and one for each side through which it passes.

    Attributes:
        segments: uint64 (n,).
        cubes: int64 (n,), number of the cube.
        others: int64 (n,), number of the cube before it, on the other side; of rows for a cube, its own number.
        radii: float32 (n,), the largest radius in nm.
        voxels: int64 (n,), number of the voxel that has it.
    """

    segments: NDArray[np.uint64]
    cubes: NDArray[np.int64]
    others: NDArray[np.int64]
    radii: NDArray[np.float32]
    voxels: NDArray[np.int64]


class Shape(NamedTuple):
    """The shape of one segment.

    Attributes:
        caliber: by how many times its radius changes suddenly, at most; 1 if nowhere.
        neck: how many times as thick as the neck between them the thinner one of two bodies is; 1 if there is one body.
        place: the voxel z, y, x of that neck; None if there is one body.
    """

    caliber: float = 1.0
    neck: float = 1.0
    place: tuple[int, ...] | None = None


def radii_in(
    segmentation: NDArray[np.unsignedinteger], voxel_size: Sequence[float], largest: float, by_section: bool = False
) -> NDArray[np.float32]:
    """Compute the distance of every voxel to the nearest one that is not of its segment.

    The ends of the array bound no segment. So distances do not depend on where the array ends, `largest` away from it.

    Args:
        segmentation: unsigned (z, y, x); 0 is background.
        voxel_size: in nm.
        largest: larger distances are set to this, in nm.
        by_section: measure within each section.

    Returns:
        float32 (z, y, x), in nm; 0 at background.
    """
    if by_section:
        distances = np.stack([edt.edt(section, anisotropy=tuple(voxel_size[1:])) for section in segmentation])
    else:
        distances = edt.edt(segmentation, anisotropy=tuple(voxel_size))
    return np.minimum(distances, np.float32(largest))


def widths_in(
    segmentation: NDArray[np.unsignedinteger],
    radii: NDArray[np.float32],
    begin: Sequence[int],
    grid: Grid,
    by_section: bool = False,
) -> Widths:
    """Find how wide segments are in the cubes of a block, and where they enter these.

    A voxel lies on the axis of a segment if no direct neighbor of the segment has a larger radius.

    Args:
        segmentation: unsigned (z + 2, y + 2, x + 2), one voxel more on each side than the block; 0 is background.
        radii: of the same shape, see `radii_in`.
        begin: first voxel of the block, z, y, x; the first one of a cube.
        grid: the cubes of the volume.
        by_section: sections have nothing to do with each other.
    """
    inside = (slice(1, -1),) * 3
    here, radius = segmentation[inside], radii[inside]
    on_axis = here > 0
    rows = []
    for direction in (1, 2) if by_section else (0, 1, 2):
        before, after = (
            tuple(slice(1 + step, step - 1 or None) if n == direction else slice(1, -1) for n in range(3))
            for step in (-1, 1)
        )
        for neighbor in (before, after):
            on_axis &= (segmentation[neighbor] != here) | (radii[neighbor] <= radius)
        index = begin[direction] + np.arange(here.shape[direction])
        enters = (index % grid.cube[direction] == 0) & (index > 0)
        enters = enters.reshape([-1 if n == direction else 1 for n in range(3)])
        passes = enters & (here > 0) & (segmentation[before] == here)
        back = [-1 if n == direction else 0 for n in range(3)]
        rows.append(_widest(here, np.minimum(radii[before], radius), passes, begin, grid, back))
    rows.append(_widest(here, radius, on_axis, begin, grid, (0, 0, 0)))
    return Widths(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def _widest(
    segmentation: NDArray[np.unsignedinteger],
    radii: NDArray[np.float32],
    counted: NDArray[np.bool_],
    begin: Sequence[int],
    grid: Grid,
    step: Sequence[int],
) -> Widths:
    """Of the voxels that count, find the one with the largest radius of each segment in each cube, the first if equal.

    `step` leads from a voxel to the other cube.
    """
    at = [index + start for index, start in zip(np.nonzero(counted), begin, strict=True)]
    segments, cubes, widths = segmentation[counted].astype(np.uint64), grid.cubes_at(at), radii[counted]
    order = np.lexsort((-widths, cubes, segments))
    same = (np.diff(cubes[order]) == 0) & (segments[order][1:] == segments[order][:-1])
    rows = order[np.append(True, ~same)[: len(order)]]
    at = [index[rows] for index in at]
    others = grid.cubes_at([index + along for index, along in zip(at, step, strict=True)])
    return Widths(segments[rows], cubes[rows], others, widths[rows], np.ravel_multi_index(at, tuple(grid.shape)))


def shapes_of(widths: Widths, grid: Grid, voxel_size: Sequence[float], least: float) -> dict[int, Shape]:
    """Describe the shape of each segment.

    Bodies: passages are opened from the widest to the narrowest. Each one that joins two parts of a segment is the neck
    between the thickest places of both. This is the elder rule of persistent homology (Edelsbrunner et al., Discrete
    Comput. Geom. 2002).

    Calibers: the thickest place takes all others within SPREAD of its radii, the thickest one that is left goes on, and
    so forth. The radius changes suddenly where two places that are left have a passage between what they took.

    Args:
        widths: of the whole volume, see `widths_in`.
        grid: the cubes of the volume.
        voxel_size: in nm.
        least: radius of what counts as a body, in nm.
    """
    ids, ranks = np.unique(widths.segments, return_inverse=True)
    count = int(widths.cubes.max(initial=0)) + 1  # the other cube has a smaller number
    keys = np.concatenate([ranks * count + cubes for cubes in (widths.cubes, widths.others)])
    nodes, numbers = np.unique(keys, return_inverse=True)
    owners = nodes // count
    own = widths.cubes == widths.others
    radii, voxels = np.zeros(len(nodes), np.float32), np.zeros(len(nodes), np.int64)
    for of_nodes, column in ((radii, widths.radii), (voxels, widths.voxels)):
        of_nodes[numbers[: len(own)][own]] = column[own]

    order = np.lexsort((widths.voxels, -widths.radii))
    order = order[~own[order]]
    ends, passages = numbers.reshape(2, -1)[:, order], widths.radii[order]
    bodies = _thinner_bodies(radii, *ends)
    ratios = np.where(bodies >= least, bodies / passages, 1)
    by_ratio = np.argsort(ratios, kind="stable")
    by_ratio = by_ratio[ratios[by_ratio] > 1]
    necks = dict(zip(owners[ends[0, by_ratio]].tolist(), by_ratio.tolist(), strict=True))  # the largest comes last

    places = np.stack(np.unravel_index(voxels, tuple(grid.shape)), axis=1) * np.array(voxel_size)
    both = radii[_taken_by(places, radii, owners, THIN * least)[ends]]
    both[:, both.min(axis=0) < THIN * least] = 1
    calibers = np.ones(len(ids))
    np.maximum.at(calibers, owners[ends[0]], both.max(axis=0) / both.min(axis=0))
    shapes = {}
    for rank, (segment, caliber) in enumerate(zip(ids.tolist(), calibers.tolist(), strict=True)):
        shapes[segment] = Shape(caliber)
        if (row := necks.get(rank)) is not None:
            place = np.unravel_index(widths.voxels[order[row]], tuple(grid.shape))
            shapes[segment] = Shape(caliber, float(ratios[row]), tuple(map(int, place)))
    return shapes


def _taken_by(
    places: NDArray[np.float64], radii: NDArray[np.float32], owners: NDArray[np.int64], least: float
) -> NDArray[np.int64]:
    """Return which place (n, 3) takes each one: a thicker one of the same owner, or itself. Owners are sorted.

    Places with a radius below `least` take none and are not taken.
    """
    takers = np.arange(len(radii))
    thick = np.flatnonzero(radii >= least)
    for rows in np.split(thick, np.flatnonzero(np.diff(owners[thick])) + 1):
        tree = cKDTree(places[rows])
        free = np.ones(len(rows), bool)
        for row in np.argsort(-radii[rows], kind="stable"):
            if free[row]:
                near = np.array(tree.query_ball_point(places[rows[row]], SPREAD * radii[rows[row]]))
                near = near[free[near]]
                takers[rows[near]] = rows[row]
                free[near] = False
    return takers


@numba.njit(cache=True)
def _thinner_bodies(
    radii: NDArray[np.float32], ends: NDArray[np.int64], others: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Join the ends of each row, in this order. Return the radius of the thinner part that a row joins; 0 if none."""
    parents, thickest = np.arange(len(radii)), radii.copy()
    thinner = np.zeros(len(ends), np.float32)
    for row in range(len(ends)):
        one, other = _root(parents, ends[row]), _root(parents, others[row])
        if one != other:
            thinner[row] = min(thickest[one], thickest[other])
            thickest[one] = max(thickest[one], thickest[other])
            parents[other] = one
    return thinner


@numba.njit(cache=True)
def _root(parents: NDArray[np.int64], node: int) -> int:
    """Root of a node, halving the path to it."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node
