"""Connected components of labels in a volume of any size, the same ones as in one piece.

Each block is labeled on its own. Then the voxels on both sides of every face between blocks say which components belong
together. Components are numbered by their first voxels, so their ids do not depend on the blocks.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import cc3d
import fastremap
import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lsdseg.data_utils.labels import is_labeled
from lsdseg.data_utils.volumes import Slabs, read

CONNECTIVITIES = {6: 1, 18: 2, 26: 3}  # neighbors of a voxel -> along how many axes they may differ from it


def write_components(labels: Array, target: Array, blocks: Slabs, connectivity: int) -> int:
    """Give every connected component of every label an id of its own: 1, 2, 3 ... in the order of their first voxels.

    Args:
        labels: integers (z, y, x). 0 and ids for unlabeled voxels stay what they are.
        target: uint64, the same shape, open for writing. It is written twice.
        blocks: of the labels.
        connectivity: 6, 18 or 26, the number of neighbors of a voxel.

    Returns:
        The number of components.
    """
    firsts, pairs, count = [np.zeros(1, np.int64)], [], 0
    for block in blocks.with_progress("components"):
        values = read(labels, block)
        found, added = cc3d.connected_components(  # its stubs forget 18
            _known(values),
            connectivity=connectivity,
            return_N=True,  # type: ignore[call-overload]
        )
        ids = np.where(found == 0, np.uint64(0), found.astype(np.uint64) + np.uint64(count))
        target[block] = ids
        firsts.append(_first_voxels(found, block, labels.shape))
        count += added
        pairs += [_touching(labels, target, block, axis, connectivity) for axis in range(3) if block[axis].start]
    table, components = _numbered(np.concatenate(firsts), np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1))
    for block in blocks.with_progress("numbering"):
        values = read(labels, block)
        unlabeled = values.astype(np.uint64) * ~is_labeled(values)
        target[block] = table[read(target, block)] + unlabeled
    return components


def _known(values: NDArray[Any]) -> NDArray[Any]:
    """Return a number for each label, because cc3d fails at some ids of 2**63 and more, and 0 for unlabeled voxels."""
    known = np.where(is_labeled(values), values, np.zeros(1, values.dtype))
    return np.ascontiguousarray(fastremap.renumber(known, in_place=True)[0])


def _first_voxels(found: NDArray[Any], block: tuple[slice, ...], shape: Sequence[int]) -> NDArray[np.int64]:
    """Return the number of the first voxel in the volume of the components 1, 2, 3 ... of a block."""
    ids, places = np.unique(found, return_index=True)
    voxels = np.unravel_index(places[ids != 0], found.shape)
    begins = (along.start for along in block)
    return np.ravel_multi_index([v + b for v, b in zip(voxels, begins, strict=True)], tuple(shape)).astype(np.int64)


def _touching(
    labels: Array, target: Array, block: tuple[slice, ...], axis: int, connectivity: int
) -> NDArray[np.int64]:
    """Return pairs (2, n) of ids that touch across the lower face and, diagonally, the edges of a block.

    All blocks that the face touches but this one must have been written, or compare with it when they are: a voxel of
    the layer before the face that is still 0 in the target belongs to a later block.
    """
    rest = [along for along in range(3) if along != axis]
    wide = [slice(max(0, block[a].start - 1), min(labels.shape[a], block[a].stop + 1)) for a in rest]

    def layer(place: int, others: Sequence[slice]) -> tuple[NDArray[Any], NDArray[Any]]:
        voxels = list(block)
        voxels[axis], voxels[rest[0]], voxels[rest[1]] = slice(place, place + 1), *others
        return tuple(read(array, tuple(voxels)).squeeze(axis) for array in (labels, target))  # type: ignore[return-value]

    here, ids = layer(block[axis].start, [block[a] for a in rest])
    there, other_ids = (
        np.pad(
            values,
            [(w.start - block[a].start + 1, block[a].stop + 1 - w.stop) for a, w in zip(rest, wide, strict=True)],
        )
        for values in layer(block[axis].start - 1, wide)
    )
    found = []
    for shift in product((0, 1, 2), repeat=2):
        if 1 + sum(step != 1 for step in shift) <= CONNECTIVITIES[connectivity]:
            place = tuple(slice(step, step + size) for step, size in zip(shift, here.shape, strict=True))
            same = (here == there[place]) & (ids != 0) & (other_ids[place] != 0)
            found.append(np.unique(np.stack([ids[same], other_ids[place][same]]).astype(np.int64), axis=1))
    return np.concatenate(found, axis=1)


def _numbered(firsts: NDArray[np.int64], pairs: NDArray[np.int64]) -> tuple[NDArray[np.uint64], int]:
    """Return the component of each id of a block, and how many there are; 0 stays 0.

    Args:
        firsts: (n,), first voxel of each id; that of id 0 has no meaning.
        pairs: (2, m), ids that are the same component.
    """
    size = len(firsts)
    graph = coo_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), (size, size))
    groups, group = connected_components(graph, directed=False)
    first = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(first, group[1:], firsts[1:])
    first[group[0]] = -1  # background is a group of its own, and the first
    numbers = np.empty(groups, np.uint64)
    numbers[np.argsort(first)] = np.arange(groups, dtype=np.uint64)
    return numbers[group], groups - 1
