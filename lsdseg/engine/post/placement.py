"""Placement on disk: predicted affinities of labels that touch, which say on which voxel two fragments meet."""

from typing import Any

from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.data_utils.layout import prediction_name
from lsdseg.data_utils.volumes import has_array, open_array, read
from lsdseg.engine.offsets import offsets_of
from lsdseg.engine.post.affinities import direct_neighbors
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.sample import AFFINITIES, Sample
from lsdseg.errors import UserError

PLACEMENT = prediction_name("placement")


def open_placement(sample: Sample) -> Array | None:
    """Open the placement of a sample, (c, z, y, x).

    Returns:
        None if none was predicted, INS_SEGMENT.PLACEMENT is off, or the method does not take it.

    Raises:
        UserError: it covers other voxels than the affinities, or has not one offset for each channel.
    """
    settings, output = sample.cfg.INS_SEGMENT, sample.output
    if not settings.PLACEMENT or not method_of(settings).takes_placement or not has_array(output, PLACEMENT):
        return None
    array, affinities = open_array(output, PLACEMENT), sample.affinities
    remedy = "run predicter.py again, or set INS_SEGMENT.PLACEMENT to False"
    if array.roi != affinities.roi or array.voxel_size != affinities.voxel_size:
        raise UserError(f"{PLACEMENT} in {output} covers other voxels than {AFFINITIES}: {remedy}")
    if len(offsets_of(array)) != array.shape[0]:
        raise UserError(f"{PLACEMENT} in {output} has {array.shape[0]} channels, but other offsets: {remedy}")
    return array


def read_placement(placement: Array | None, voxels: tuple[slice, ...] = ()) -> NDArray[Any] | None:
    """Read what `extract_fragments` takes as placement.

    Args:
        placement: what `open_placement` returned.
        voxels: slices along z, y, x. Default: all voxels.

    Returns:
        (3, z, y, x), the affinities to the direct neighbors in z, y, x. None if there is no placement.
    """
    if placement is None:
        return None
    return direct_neighbors(read(placement, (slice(None), *voxels)), offsets_of(placement))
