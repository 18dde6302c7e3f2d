"""Mutex watershed: affinities that attract and affinities that repel, in one pass from the surest to the least sure.

An affinity plus its bias is a weight: above 0 it attracts, below 0 it repels. Each pair of voxels in turn is joined or
kept apart for ever, unless an earlier one has decided otherwise. So one long-range affinity that sees two neurites
outweighs a gap in the membrane between them, without any threshold. Wolf et al., ECCV 2018.
"""

import fastremap
import mwatershed
import numpy as np

from lsdseg.engine.post.affinities import spans_sections
from lsdseg.engine.post.agglomerate import float_affinities
from lsdseg.engine.post.fragments import BOUNDARY, drop_weak, flood, flood_levels, squared_distances
from lsdseg.errors import UserError

DEFAULT_BIASES = (-0.4, -0.5)  # direct, long range; of affinities that are equally sure, direct ones go first
SPECK = 10  # voxels: what is smaller was cut off by noise, and goes to the fragment around it


def is_direct(offset):
    """Whether an offset leads to a voxel that shares a face."""
    return sum(map(abs, offset)) == 1


def edge_biases(offsets, biases=None):
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


def mutex_watershed(affinities, *, offsets, biases, background_mask=False, mask=None, filter_fragments=0.0):
    """Segment a volume by mutex watershed; of a block, the segments are its fragments.

    It runs on the voxels whose mean affinity to their direct neighbors is above 0.5. mwatershed takes about 0.6 kB of
    memory per voxel with nine offsets.

    Args:
        affinities: (c, z, y, x), uint8 in 0..255 or floating point in 0..1.
        offsets: (z, y, x) of each channel, in any order. Without one that leads to another section, segments lie
            within sections.
        biases: added to the affinities (0..1), one for each channel.
        background_mask: leave boundary voxels and specks 0; otherwise the segments flood them and touch.
        mask: (z, y, x); segments are made where it is not 0.
        filter_fragments: drop the segments whose mean affinity is lower.

    Returns:
        uint64 (z, y, x), ids 1..n, 0 is background.

    Raises:
        ValueError: affinities of another type or range.
    """
    # Of equal weights, as saturated uint8 gives many, the first channel's goes first: that of the nearest voxels.
    channels = sorted(range(len(offsets)), key=lambda c: (np.abs(offsets[c]).sum(), offsets[c]))
    offsets, biases = [tuple(offsets[c]) for c in channels], [biases[c] for c in channels]
    affinities = float_affinities(affinities, channels=len(offsets))[channels]
    mean_affinity = affinities[[is_direct(offset) for offset in offsets]].mean(axis=0)
    inside = np.ones(mean_affinity.shape, bool) if mask is None else np.asarray(mask) != 0
    foreground = (mean_affinity > BOUNDARY) & inside

    weights = np.zeros(affinities.shape)
    for weight, affinity, offset, bias in zip(weights, affinities, offsets, biases, strict=True):
        here, there = voxel_pairs(inside.shape, offset)
        weight[here] = np.where(foreground[here] & foreground[there], affinity[here] + bias, 0)
    segments, _ = fastremap.renumber(mwatershed.agglom(weights, offsets), preserve_zero=True)
    segments[(np.bincount(segments.ravel()) < SPECK)[segments]] = 0

    if not background_mask:
        in_xy = not spans_sections(offsets)
        levels = flood_levels(squared_distances(foreground, in_xy), mean_affinity)
        segments = flood(segments, levels, inside, in_xy).astype(np.uint64)
    drop_weak(segments, mean_affinity, filter_fragments)
    return fastremap.renumber(segments, preserve_zero=True)[0].astype(np.uint64, copy=False)


def voxel_pairs(shape, offset):
    """Slices of the voxels that have a partner at an offset in the volume, and slices of the partners."""
    first = [max(0, -step) for step in offset]
    last = [max(begin, size - max(0, step)) for begin, size, step in zip(first, shape, offset, strict=True)]
    here = tuple(slice(begin, end) for begin, end in zip(first, last, strict=True))
    there = tuple(slice(s.start + step, s.stop + step) for s, step in zip(here, offset, strict=True))
    return here, there
