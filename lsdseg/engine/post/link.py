"""Link segments of neighboring sections into 3D objects, by overlap.

Two segments are linked if each is the other's largest overlap and most of the smaller one is covered. Taking the share
of the smaller one lets a tapering neurite continue, where intersection over union would end it. The choice must be
mutual because a small neurite can lie entirely over a large one: one such link merges the two for the whole stack. The
price is the second branch of a fork, which is one split.
"""

from itertools import pairwise
from typing import Any

import fastremap
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lsdseg.engine.post.fragments import renumbered


def link_sections(segments: ArrayLike, share: float) -> NDArray[np.uint64]:
    """Give one id to the segments of a stack that belong together.

    Args:
        segments: (z, y, x), unsigned ids, 0 is background; each within one section.
        share: 0..1, the least overlap of two segments as a share of the smaller one's area.

    Returns:
        uint64 (z, y, x), ids 1..n.

    Raises:
        ValueError: a segment lies in several sections.
    """
    numbers, _ = fastremap.renumber(np.asarray(segments, np.uint64), preserve_zero=True)
    count = int(numbers.max(initial=0)) + 1
    if sum(np.count_nonzero(fastremap.unique(section)) for section in numbers) != count - 1:
        raise ValueError("segments lie in several sections, and only those within one can be linked")
    areas = np.bincount(numbers.ravel(), minlength=count)
    below, above, overlaps = _overlaps(numbers)
    mutual = _largest(below, above, overlaps) & _largest(above, below, overlaps)
    linked = mutual & (overlaps >= share * np.minimum(areas[below], areas[above]))
    links = coo_array((np.ones(linked.sum()), (below[linked], above[linked])), shape=(count, count))
    _, objects = connected_components(links, directed=False)
    objects = np.append(0, objects[1:] + 1)  # background, which nothing is linked to, stays 0
    return renumbered(objects[numbers].astype(np.uint64))


def _overlaps(numbers: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of segments in neighboring sections that overlap, and by how many voxels (all int64)."""
    count = np.int64(numbers.max(initial=0)) + 1
    keys, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for section, following in pairwise(numbers):
        both = (section > 0) & (following > 0)
        pairs, overlaps = np.unique(section[both].astype(np.int64) * count + following[both], return_counts=True)
        keys.append(pairs)
        sizes.append(overlaps)
    below, above = np.divmod(np.concatenate(keys), count)
    return below, above, np.concatenate(sizes)


def _largest(
    segments: NDArray[np.int64], partners: NDArray[np.int64], overlaps: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether each pair is its segment's largest overlap; of equal ones, that with the smallest partner (bool)."""
    order = np.lexsort((partners, -overlaps, segments))
    _, first = np.unique(segments[order], return_index=True)
    largest = np.zeros(len(segments), bool)
    largest[order[first]] = True
    return largest
