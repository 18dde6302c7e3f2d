"""Scores of a segmentation from its overlaps with the ground truth.

All scores depend on the volumes only through a sparse contingency table: how many voxels each pair of a
segment and a ground truth object shares. It adds up over blocks, so that volumes of any size need only one
block in memory.
"""

import fastremap
import numpy as np


def count_overlaps(blocks):
    """The sparse contingency table of a segmentation and the ground truth.

    Voxels with ground truth 0 are left out. Segment 0 counts as a segment like any other: where there is
    ground truth, leaving a voxel out is an error too.

    Args:
        blocks: pairs (segmentation, ground_truth) of unsigned integer arrays of one shape.

    Returns:
        pairs: uint64 (n, 2), rows of a segment and an object that overlap, each pair once, sorted.
        counts: int64 (n,), voxels that they share.
    """
    pairs, counts = np.empty((0, 2), np.uint64), np.empty(0, np.int64)
    pending, pending_size = [], 0
    for segmentation, ground_truth in blocks:
        pending.append(_count_block(segmentation, ground_truth))
        pending_size += len(pending[-1][1])
        if pending_size > max(len(counts), 2**20):  # sort rarely, in memory proportional to the table
            pairs, counts = _add([(pairs, counts), *pending])
            pending, pending_size = [], 0
    return _add([(pairs, counts), *pending])


def _count_block(segmentation, ground_truth):
    labelled = ground_truth != 0
    if not labelled.any():
        return np.empty((0, 2), np.uint64), np.empty(0, np.int64)
    segments, segment_ids = _number(segmentation[labelled])
    objects, object_ids = _number(ground_truth[labelled])
    pairs, counts = fastremap.unique(segments * len(object_ids) + objects, return_counts=True)
    return np.stack([segment_ids[pairs // len(object_ids)], object_ids[pairs % len(object_ids)]], axis=1), counts


def _number(labels):
    """Labels as numbers from 1 (uint64), and the array that maps the numbers back."""
    numbers, mapping = fastremap.renumber(labels.astype(np.uint64), preserve_zero=False)
    ids = np.zeros(len(mapping) + 1, np.uint64)
    ids[np.fromiter(mapping.values(), np.int64)] = np.fromiter(mapping.keys(), np.uint64)
    return numbers.astype(np.uint64), ids


def _add(tables):
    """Join tables; pairs that occur in several add up."""
    pairs = np.concatenate([pairs for pairs, _ in tables])
    counts = np.concatenate([counts for _, counts in tables]).astype(np.int64)
    order = np.lexsort(pairs.T[::-1])
    pairs, counts = pairs[order], counts[order]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    starts = np.flatnonzero(first)
    return pairs[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def evaluate(segmentation, ground_truth):
    """Score a segmentation that is in memory.

    Args:
        segmentation: unsigned ids, any shape.
        ground_truth: unsigned ids, the same shape; voxels where it is 0 are left out.

    Returns:
        The dict of `scores`.

    Raises:
        ValueError: the ground truth is 0 everywhere.
    """
    return scores(*count_overlaps([(segmentation, ground_truth)]))


def scores(pairs, counts):
    """Variation of information and adapted Rand error of a contingency table, as `count_overlaps` makes it.

    Variation of information (Meila, J. Multivariate Analysis 2007), in bits: `voi_split` is H(segmentation |
    ground truth), what remains unknown of the segment of a voxel when its object is known, 0 if no object is
    split; `voi_merge` is H(ground truth | segmentation), 0 if no segment holds parts of two objects;
    `voi_sum` is their sum. Adapted Rand error (Arganda-Carreras et al., Front. Neuroanat. 2015): 1 - F-score
    of the pairs of voxels that lie in one segment, against those that lie in one object. All equal
    scikit-image's `variation_of_information` and `adapted_rand_error` with `ignore_labels=(0,)`.

    Returns:
        dict of voi_split, voi_merge, voi_sum, adapted_rand_error, segments, objects, voxels.

    Raises:
        ValueError: an empty table.
    """
    if not len(counts):
        raise ValueError("no voxel with ground truth")
    together = counts.astype(np.float64)
    voxels = together.sum()
    segments, segment = np.unique(pairs[:, 0], return_inverse=True)
    objects, object_ = np.unique(pairs[:, 1], return_inverse=True)
    segment_sizes = np.bincount(segment, together)
    object_sizes = np.bincount(object_, together)
    split = together @ np.log2(object_sizes[object_] / together) / voxels
    merge = together @ np.log2(segment_sizes[segment] / together) / voxels
    # ordered pairs of different voxels in one cell of the table, in one segment, in one object
    in_both, in_segment, in_object = (n @ n - voxels for n in (together, segment_sizes, object_sizes))
    f_score = 2 * in_both / (in_segment + in_object) if in_segment + in_object else 1.0
    return {
        "voi_split": split,
        "voi_merge": merge,
        "voi_sum": split + merge,
        "adapted_rand_error": 1 - f_score,
        "segments": len(segments),
        "objects": len(objects),
        "voxels": int(voxels),
    }
