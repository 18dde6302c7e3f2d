"""Affinities are read by their offsets: what a channel says is written with the array, never implied by its place.

A channel with the offset (z, y, x) holds, for every voxel, how likely it and the voxel at that offset are one neurite.
Networks predict the channels in the order of their TRAIN.NEIGHBORHOOD, with long-range ones or, in 2D, without z.
"""

import numpy as np

from lsdseg.data_utils.volumes import open_array, read
from lsdseg.errors import UserError

AFFINITIES = "volumes/pred_affs"
MUTEX = "mutex"  # an INS_SEGMENT.METHOD, and the merge function of the edges that it uses
NEIGHBORS = [(-1, 0, 0), (0, -1, 0), (0, 0, -1)]


def open_affinities(path):
    """The predicted affinities of a zarr, (c, z, y, x).

    Raises:
        UserError: it has none, or they cannot be segmented: not one offset for each channel, or no neighbor in y or x.
    """
    try:
        array = open_array(path, AFFINITIES)
    except UserError as error:
        raise UserError(f"{error}; run predicter.py first") from error
    offsets = offsets_of(array)
    where = f"{AFFINITIES} in {path} has the offsets {[list(offset) for offset in offsets]}"
    if any(len(offset) != 3 for offset in offsets) or len(array.shape) != 4 or len(offsets) != array.shape[0]:
        raise UserError(f"{where} and the shape {array.shape}: its attribute offsets needs z, y, x for every channel")
    if not set(NEIGHBORS[1:]) <= set(offsets):
        raise UserError(f"{where}: predict affinities with the neighbors [0, -1, 0] and [0, 0, -1] among them")
    return array


def offsets_of(array):
    """The offsets (z, y, x) of an array's channels, by its attribute; without it, the direct neighbors."""
    return [tuple(offset) for offset in array.attrs.get("offsets", NEIGHBORS)]


def spans_sections(offsets):
    """Whether any offset leads to another section."""
    return any(z for z, _, _ in offsets)


def read_channels(array, method, voxels=()):
    """The `channels_for` a method from disk, as stored.

    voxels: slices along z, y, x; all voxels without.
    """
    return channels_for(method, read(array, (slice(None), *voxels)), offsets_of(array))


def channels_for(method, affinities, offsets):
    """The channels (c, z, y, x) that a method takes: mutex all, waterz `direct_neighbors`."""
    return affinities if method == MUTEX else direct_neighbors(affinities, offsets)


def direct_neighbors(affinities, offsets):
    """The channels that agglomeration with waterz takes: neighbors in z, y, x, in that order.

    Args:
        affinities: (c, z, y, x).
        offsets: one (z, y, x) for each channel, in any order.

    Returns:
        (3, z, y, x), same type; a neighbor without a channel has affinity 0, which keeps sections apart.
    """
    missing = np.zeros_like(affinities[0])
    return np.stack([affinities[offsets.index(n)] if n in offsets else missing for n in NEIGHBORS])
