"""Mutex watershed: some affinities attract and others repel, and the surest are heard first.

An affinity plus its bias is a weight: above 0 it attracts, below 0 it repels. From the largest weight to the smallest,
each joins its two voxels or keeps them apart for good, unless an earlier one has decided otherwise. So one long-range
affinity that sees two neurites outweighs a gap in the membrane between them, without any threshold. Wolf et al., ECCV
2018.
"""

from collections.abc import Sequence

import fastremap
import mwatershed
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsdseg.engine.offsets import Offset, is_direct, spans_sections
from lsdseg.engine.post.affinities import float_affinities, voxel_pairs
from lsdseg.engine.post.fragments import BOUNDARY, drop_weak, flood, flood_levels, renumbered, squared_distances
from lsdseg.errors import UserError

DEFAULT_BIASES = (-0.4, -0.5)  # direct, long range; of affinities that are equally sure, direct ones go first
SPECK = 10  # voxels: smaller segments are noise, and go to the fragment around them


def edge_biases(offsets: Sequence[Offset], biases: Sequence[float] | None = None) -> list[float]:
    """One bias for each offset.

    Args:
        offsets: (z, y, x) of each channel.
        biases: one for each offset, or two, for direct neighbors and for long range; None for the default.

    Raises:
        UserError: another number of biases, or no long-range offsets, without which nothing would keep neurites apart.
    """
    direct = [is_direct(offset) for offset in offsets]
    if all(direct):
        raise UserError(
            "INS_SEGMENT.METHOD mutex needs long-range affinities, and these are of direct neighbors only: train with "
            "TRAIN.NEIGHBORHOOD set to the offsets of TRAIN.LR_NEIGHBORHOOD, or use INS_SEGMENT.METHOD waterz"
        )
    biases = DEFAULT_BIASES if biases is None else biases
    if len(biases) == 2:
        return [biases[0] if d else biases[1] for d in direct]
    if len(biases) != len(offsets):
        raise UserError(
            f"INS_SEGMENT.MUTEX_BIAS {list(biases)} has {len(biases)} numbers: give one for each of the {len(offsets)} "
            f"offsets {[list(offset) for offset in offsets]}, or two, for direct neighbors and for long range"
        )
    return list(biases)


def mutex_watershed(
    affinities: ArrayLike,
    *,
    offsets: Sequence[Offset],
    biases: Sequence[float] | None = None,
    background_mask: bool = False,
    mask: ArrayLike | None = None,
    filter_fragments: float = 0.0,
) -> NDArray[np.uint64]:
    """Segment a volume by mutex watershed; of a block, the segments are its fragments.

    It runs on the voxels whose mean affinity to their direct neighbors is above 0.5. mwatershed takes about 0.6 kB of
    memory per voxel with nine offsets.

    Args:
        affinities: (c, z, y, x), uint8 in 0..255 or floating point in 0..1.
        offsets: (z, y, x) of each channel, in any order. Without one that leads to another section, segments lie
            within sections.
        biases: added to the affinities (0..1); as for `edge_biases`.
        background_mask: leave boundary voxels and specks 0; otherwise the segments flood them and touch.
        mask: (z, y, x); segments are made where it is not 0.
        filter_fragments: drop the segments whose mean affinity is lower.

    Returns:
        uint64 (z, y, x), ids 1..n, 0 is background.

    Raises:
        UserError: there is another number of biases, or no long-range offset.
        ValueError: affinities of another type or range.
    """
    biases = edge_biases(offsets, biases)
    # Of equal weights, as saturated uint8 gives many, the first channel's goes first: that of the nearest voxels.
    channels = sorted(range(len(offsets)), key=lambda c: (np.abs(offsets[c]).sum(), offsets[c]))
    offsets, biases = [tuple(offsets[c]) for c in channels], [biases[c] for c in channels]
    floats = float_affinities(affinities, channels=len(offsets))[channels]
    mean_affinity = floats[[is_direct(offset) for offset in offsets]].mean(axis=0)
    inside = np.ones(mean_affinity.shape, bool) if mask is None else np.asarray(mask) != 0
    foreground = (mean_affinity > BOUNDARY) & inside

    weights = np.zeros(floats.shape)
    for weight, affinity, offset, bias in zip(weights, floats, offsets, biases, strict=True):
        here, there = voxel_pairs(inside.shape, offset)
        weight[here] = np.where(foreground[here] & foreground[there], affinity[here] + bias, 0)
    segments, _ = fastremap.renumber(mwatershed.agglom(weights, offsets), preserve_zero=True)
    segments[(np.bincount(segments.ravel()) < SPECK)[segments]] = 0

    if not background_mask:
        in_xy = not spans_sections(offsets)
        levels = flood_levels(squared_distances(foreground, in_xy), mean_affinity)
        segments = flood(segments, levels, inside, in_xy).astype(np.uint64)
    drop_weak(segments, mean_affinity, filter_fragments)
    return renumbered(segments)
