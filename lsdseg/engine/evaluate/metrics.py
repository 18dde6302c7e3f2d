"""Scores of a segmentation, computed from its overlaps with the ground truth.

All scores depend on the volumes only through a sparse contingency table: the number of voxels that each pair of a
segment and a ground truth object shares. The tables of parts of a volume add up, so a volume of any size needs only one
part in memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cc3d
import fastremap
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from lsdseg.data_utils.labels import grow_boundary

SLIVER = 0.01  # a smaller part of a neuron is no split and no merger; boundaries differ by a voxel everywhere

# Pairs of a segment and an object that overlap (uint64, n x 2), and how many voxels each pair shares (int64, n).
Table = tuple[NDArray[np.uint64], NDArray[np.int64]]


def count_overlaps(parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Table:
    """Make the sparse contingency table of a segmentation and the ground truth.

    Voxels with ground truth 0 are ignored. Segment 0 counts as a segment like any other: a voxel without a segment is
    an error too if it has ground truth.

    Args:
        parts: pairs (segmentation, ground truth) of unsigned integer arrays of the same shape, the parts of a volume.

    Returns:
        pairs: uint64 (n, 2), rows of a segment and an object that overlap, each pair once, sorted.
        counts: int64 (n,), the voxels that they share.
    """
    pairs, counts = np.empty((0, 2), np.uint64), np.empty(0, np.int64)
    pending: list[Table] = []
    pending_size = 0
    for segmentation, ground_truth in parts:
        pending.append(_count_part(segmentation, ground_truth))
        pending_size += len(pending[-1][1])
        if pending_size > max(len(counts), 2**20):  # sort rarely, in memory proportional to the table
            pairs, counts = _add([(pairs, counts), *pending])
            pending, pending_size = [], 0
    return _add([(pairs, counts), *pending])


def _count_part(segmentation: NDArray[Any], ground_truth: NDArray[Any]) -> Table:
    labeled = ground_truth != 0
    if not labeled.any():
        return np.empty((0, 2), np.uint64), np.empty(0, np.int64)
    segments, segment_ids = _renumber(segmentation[labeled])
    objects, object_ids = _renumber(ground_truth[labeled])
    pairs, counts = fastremap.unique(segments * len(object_ids) + objects, return_counts=True)
    return np.stack([segment_ids[pairs // len(object_ids)], object_ids[pairs % len(object_ids)]], axis=1), counts


def _renumber(labels: NDArray[Any]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the labels as numbers from 1, and the array that maps the numbers back to labels."""
    numbers, mapping = fastremap.renumber(labels.astype(np.uint64), preserve_zero=False)
    ids = np.zeros(len(mapping) + 1, np.uint64)
    ids[np.fromiter(mapping.values(), np.int64)] = np.fromiter(mapping.keys(), np.uint64)
    return numbers.astype(np.uint64), ids


def _add(tables: list[Table]) -> Table:
    """Join tables, adding up the counts of pairs that occur in several of them."""
    pairs = np.concatenate([pairs for pairs, _ in tables])
    counts = np.concatenate([counts for _, counts in tables]).astype(np.int64)
    order = np.lexsort(pairs.T[::-1])
    pairs, counts = pairs[order], counts[order]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    starts = np.flatnonzero(first)
    return pairs[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def evaluate(segmentation: NDArray[Any], ground_truth: NDArray[Any]) -> dict[str, float]:
    """Score a segmentation in memory.

    Args:
        segmentation: unsigned ids, any shape.
        ground_truth: unsigned ids, the same shape; voxels where it is 0 are ignored.

    Returns:
        What `scores` returns.

    Raises:
        ValueError: the ground truth is 0 everywhere.
    """
    return scores(*count_overlaps([(segmentation, ground_truth)]))


def scores(pairs: NDArray[np.uint64], counts: NDArray[np.int64]) -> dict[str, float]:
    """Compute the variation of information and the adapted Rand error of a contingency table.

    Variation of information (Meila, J. Multivariate Analysis 2007), in bits: `voi_split` is H(segmentation | ground
    truth), the uncertainty about the segment of a voxel whose object is known. It is 0 if no object is split.
    `voi_merge` is H(ground truth | segmentation), and 0 if no segment contains parts of two objects. `voi_sum` is their
    sum.

    Adapted Rand error (Arganda-Carreras et al., Front. Neuroanat. 2015): 1 - F-score of the pairs of voxels that lie in
    one segment, compared with those that lie in one object.

    All scores equal those of scikit-image's `variation_of_information` and `adapted_rand_error` with
    `ignore_labels=(0,)`.

    Args:
        pairs: segments and objects, as `count_overlaps` returns them.
        counts: the voxels that they share.

    Returns:
        voi_split, voi_merge, voi_sum, adapted_rand_error, segments, objects and voxels; the last three are integers.

    Raises:
        ValueError: the table is empty.
    """
    if not len(counts):
        raise ValueError("no voxel with ground truth")
    together = counts.astype(np.float64)
    voxels = together.sum()
    *bits, (segment, object_) = _contributions(pairs, counts)
    split, merge = (float(values.sum()) for values in bits)
    segment_sizes, object_sizes = (np.bincount(rank, together) for rank in (segment, object_))
    # The numbers of ordered pairs of different voxels in one cell of the table, in one segment, and in one object.
    in_both, in_segment, in_object = (n @ n - voxels for n in (together, segment_sizes, object_sizes))
    f_score = 2 * in_both / (in_segment + in_object) if in_segment + in_object else 1.0
    return {
        "voi_split": split,
        "voi_merge": merge,
        "voi_sum": split + merge,
        "adapted_rand_error": 1 - f_score,
        "segments": len(segment_sizes),
        "objects": len(object_sizes),
        "voxels": int(voxels),
    }


def without_boundary(ground_truth: NDArray[Any], by_section: bool = False) -> NDArray[Any]:
    """Set to 0 the voxels that touch another object, one voxel to either side. Background takes nothing away.

    Args:
        ground_truth: unsigned ids (z, y, x), 0 is background.
        by_section: look for neighbors only within a section.

    Returns:
        New labels of the same type and shape.
    """
    return grow_boundary(ground_truth, 1, (1, 2) if by_section else (0, 1, 2), ground_truth != 0)


def connected_parts(ground_truth: NDArray[Any], by_section: bool = False) -> NDArray[np.uint64]:
    """Give each part of an object that hangs together in the array (26 neighbors) an id of its own.

    A neuron that leaves a crop and comes back lies in it in several parts, and nothing inside the crop tells that they
    belong together.

    Args:
        ground_truth: unsigned ids (z, y, x), 0 is background.
        by_section: parts hang together only within a section (8 neighbors).

    Returns:
        uint64 (z, y, x), ids from 1; 0 stays 0.
    """
    labels, _ = fastremap.renumber(ground_truth)
    if not by_section:
        return cc3d.connected_components(labels, connectivity=26).astype(np.uint64)
    parts = np.zeros(labels.shape, np.uint64)
    total = 0
    for section, part in zip(labels, parts, strict=True):
        found, count = cc3d.connected_components(section, connectivity=8, return_N=True)
        part[:] = np.where(found > 0, found.astype(np.uint64) + np.uint64(total), 0)
        total += count
    return parts


# The name of each variant of the ground truth that is scored beside the whole, and how it is made.
VARIANTS = {"without_boundary": without_boundary, "connected": connected_parts}


@dataclass(frozen=True)
class Mistake:
    """The voxels that a segment shares with a neuron, and that one of the two should not have.

    Attributes:
        kind: "split" if they are not in the neuron's main segment, "merge" if not in the segment's main neuron;
            the one that costs more, if both.
        segment: its id.
        neuron: its id.
        voxels: how many.
        bits: the VOI that these voxels contribute.
    """

    kind: str
    segment: int
    neuron: int
    voxels: int
    bits: float


def list_mistakes(pairs: NDArray[np.uint64], counts: NDArray[np.int64], most: int) -> list[Mistake]:
    """List the mistakes of a contingency table (`count_overlaps`) that contribute most to the VOI, the worst first."""
    split, merge, cells = _contributions(pairs, counts)
    order = np.lexsort((counts,))  # the last of equal keys wins: the largest part
    largest = [np.full(cells[axis].max() + 1, -1) for axis in (0, 1)]
    for axis in (0, 1):
        largest[axis][cells[axis][order]] = order
    index = np.arange(len(counts))
    # The main part of a neuron or segment is not what is wrong with it.
    split = np.where(largest[1][cells[1]] == index, 0, split)
    merge = np.where(largest[0][cells[0]] == index, 0, merge)
    bits = np.maximum(split, merge)
    worst = np.argsort(-bits, kind="stable")[:most]
    return [
        Mistake(
            "split" if split[i] >= merge[i] else "merge",
            int(pairs[i, 0]),
            int(pairs[i, 1]),
            int(counts[i]),
            float(bits[i]),
        )
        for i in worst
        if bits[i] > 0
    ]


def list_neurons(pairs: NDArray[np.uint64], counts: NDArray[np.int64], most_named: int = 10) -> list[dict[str, Any]]:
    """List what happened to each neuron of a contingency table (`count_overlaps`), by its share of the VOI.

    Args:
        pairs: segments and neurons.
        counts: the voxels that they share.
        most_named: of the neurons that one is merged with.

    Returns:
        Per neuron, the worst first: neuron, voxels, segments (how many it lies in), merged (how many neurons share a
        segment with it), merged_with (ids of the first ones), split_share, merge_share and share (what part of VOI
        split, VOI merge and their sum is its own). Segments and mergers count neither background nor slivers: less than
        SLIVER of the neuron.
    """
    split, merge, (_, neuron) = _contributions(pairs, counts)
    ids = np.unique(pairs[:, 1])
    splits, merges, voxels = (np.bincount(neuron, weights, len(ids)) for weights in (split, merge, counts))
    counted = (pairs[:, 0] != 0) & (counts >= SLIVER * voxels[neuron])
    segments = np.bincount(neuron, counted, len(ids)).astype(int)
    sharing: dict[int, set[int]] = {}
    members = pairs[counted].tolist()
    for segment, one in members:
        sharing.setdefault(segment, set()).add(one)
    others: dict[int, set[int]] = {int(one): set() for one in ids}
    for segment, one in members:
        if len(sharing[segment]) > 1:
            others[one] |= sharing[segment] - {one}
    total = [max(float(values.sum()), 1e-300) for values in (splits, merges, splits + merges)]
    return [
        {
            "neuron": int(ids[i]),
            "voxels": int(voxels[i]),
            "segments": int(segments[i]),
            "merged": len(others[int(ids[i])]),
            "merged_with": sorted(others[int(ids[i])])[:most_named],
            "split_share": float(splits[i] / total[0]),
            "merge_share": float(merges[i] / total[1]),
            "share": float((splits[i] + merges[i]) / total[2]),
        }
        for i in np.argsort(-(splits + merges), kind="stable")
    ]


def place_of(mistake: Mistake, labels: NDArray[Any], ground_truth: NDArray[Any]) -> tuple[int, int, int]:
    """Return the voxel to look at: one of the mistake that touches what it is cut off from, or hangs on.

    Args:
        mistake: one that has voxels in the arrays.
        labels: the segmentation (z, y, x).
        ground_truth: the same shape.

    Returns:
        The index z, y, x of the contact nearest to the median of all contacts. Without contact, a voxel in the middle.
    """
    both = (labels == mistake.segment) & (ground_truth == mistake.neuron)
    box = tuple(slice(max(int(i.min()) - 1, 0), int(i.max()) + 2) for i in np.nonzero(both))
    inner, segments, neurons = both[box], labels[box], ground_truth[box]
    if mistake.kind == "split":
        rest = (neurons == mistake.neuron) & ~inner
    else:
        rest = (segments == mistake.segment) & (neurons != 0) & ~inner
    touching = inner & binary_dilation(rest)
    found = np.argwhere(touching if touching.any() else inner)
    nearest = found[np.abs(found - np.median(found, axis=0)).sum(axis=1).argmin()]
    z, y, x = (int(i) + side.start for i, side in zip(nearest, box, strict=True))
    return z, y, x


def _contributions(
    pairs: NDArray[np.uint64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[NDArray[np.intp]]]:
    """Return what each pair adds to VOI split and VOI merge, in bits, and the rank of its segment and its object."""
    together = counts.astype(np.float64)
    ranks = [np.unique(pairs[:, axis], return_inverse=True)[1] for axis in (0, 1)]
    segment_sizes, object_sizes = (np.bincount(rank, together)[rank] for rank in ranks)
    split, merge = (together * np.log2(sizes / together) / together.sum() for sizes in (object_sizes, segment_sizes))
    return split, merge, ranks
