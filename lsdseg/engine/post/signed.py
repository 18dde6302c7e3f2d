"""What attracts and what repels the fragments of mutex watershed, for the graph of a whole volume.

In a volume, mutex watershed hears the surest of all affinities first. Among fragments it does the same with pairs: the
affinities between two fragments become two weights, the mean of those of direct neighbors and the mean of those of long
range, each with its bias. From the largest weight to the smallest, each joins two regions or keeps them apart for good
(`contacts.settle`). Of two weights of one pair, or of a pair of regions that merge, only the larger one is ever heard:
the other comes too late. So a weight per pair is all that a block has to say.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsdseg.engine.offsets import Offset, is_direct
from lsdseg.engine.post.affinities import float_affinities, voxel_pairs
from lsdseg.engine.post.contacts import UNIT, Contacts, mark_sides, open_and_sized
from lsdseg.engine.post.graph import number_fragments


def find_signed_contacts(
    affinities: ArrayLike,
    fragments: ArrayLike,
    offsets: Sequence[Offset],
    biases: Sequence[float],
    first_id: int,
    last_id: int,
) -> Contacts:
    """Find the pairs of fragments that attract or repel each other, those whose smaller id lies in first_id..last_id.

    Args:
        affinities: (c, z, y, x), uint8 in 0..255 or floating point in 0..1.
        fragments: (z, y, x), any unsigned ids, 0 is background. As many voxels around those with these ids are enough
            as the offsets reach.
        offsets: (z, y, x) of each channel.
        biases: added to the affinities of each channel: what is above 0 then attracts.
        first_id: the first id.
        last_id: the last one.

    Returns:
        `sums` are the weights in 1 / UNIT, at most 1: below 0 the pair repels. `counts` are the faces that the two
        share. Those that share none only repel: a segment hangs together.

    Raises:
        ValueError: affinities of another type or range, or of another shape than the fragments.
    """
    floats = float_affinities(affinities, channels=len(offsets))
    unsigned, ids = number_fragments(fragments)
    if floats.shape[1:] != unsigned.shape:
        raise ValueError(f"affinities of shape {floats.shape} and fragments of shape {unsigned.shape} do not fit")
    numbers, count = unsigned.astype(np.int64), len(ids)
    own = (ids >= first_id) & (ids <= last_id)
    largest = max(max(abs(bias), abs(1 + bias)) for bias in biases)
    found: dict[bool, list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = {True: [], False: []}
    sides = np.zeros(count, np.uint8)
    for channel, offset, bias in zip(floats, offsets, biases, strict=True):
        here, there = voxel_pairs(numbers.shape, offset)
        first, second = numbers[here], numbers[there]
        mark_sides(sides, own, first, second, offset)
        smaller, larger = np.minimum(first, second), np.maximum(first, second)
        apart = (smaller != larger) & (smaller > 0) & own[smaller]
        weights = (channel[here][apart] + np.float64(bias)) / largest
        found[is_direct(offset)].append((smaller[apart] * count + larger[apart], weights))
    pairs, faces, heard = _surest(_means(found[True]), _means(found[False]))
    u, v = np.divmod(pairs, max(count, 1))
    return Contacts(
        ids[u],
        ids[v],
        np.rint(heard * UNIT).astype(np.int64),
        np.arange(len(u) + 1),
        np.zeros(len(u), np.uint8),
        faces,
        ids[u],
        ids[v],
        *open_and_sized(ids, sides, own, numbers),
    )


# Pairs, ascending, and of each how many affinities it has, and their mean weight.
Weighted = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def _surest(direct: Weighted, far: Weighted) -> Weighted:
    """Take the larger weight of each pair, and leave out pairs that share no face and attract; counts are of faces."""
    pairs = np.union1d(direct[0], far[0])
    weights, faces = np.zeros(len(pairs)), np.zeros(len(pairs), np.int64)
    at = np.searchsorted(pairs, direct[0])
    weights[at], faces[at] = direct[2], direct[1]
    at = np.searchsorted(pairs, far[0])
    weights[at] = np.where(np.abs(far[2]) > np.abs(weights[at]), far[2], weights[at])
    kept = (faces > 0) | (weights < 0)
    return pairs[kept], faces[kept], weights[kept]


def _means(found: list[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> Weighted:
    """Put keys of pairs and weights together."""
    keys = np.concatenate([np.empty(0, np.int64), *(keys for keys, _ in found)])
    weights = np.concatenate([np.empty(0), *(weights for _, weights in found)])
    pairs, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return pairs, counts, np.bincount(inverse, weights, len(pairs)) / np.maximum(counts, 1)
