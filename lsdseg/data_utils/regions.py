"""Regions of volumes: given in nm, so that the same one can be cut out of raw, of a segmentation and of labels."""

import re

from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array

from lsdseg.data_utils.placement import place_array
from lsdseg.data_utils.volumes import voxels_of
from lsdseg.errors import UserError

FORM = "Z0:Z1,Y0:Y1,X0:X1"


def parse_region(text: str) -> Roi:
    """Return a region that was given as Z0:Z1,Y0:Y1,X0:X1: begin and end along each axis, in nm.

    Raises:
        UserError: the text is not of that form, or an end is not after its begin.
    """
    bound = r"\s*(-?[0-9]{1,15})\s*"
    match = re.fullmatch(",".join([f"{bound}:{bound}"] * 3), text)
    if not match:
        raise UserError(f"region {text[:80]!r} is not of the form {FORM} in nm, as in 400:2000,0:800,0:800")
    numbers = [int(number) for number in match.groups()]
    begin, end = Coordinate(numbers[::2]), Coordinate(numbers[1::2])
    if any(b >= e for b, e in zip(begin, end, strict=True)):
        raise UserError(f"region {text}: every end must be larger than its begin ({FORM} in nm)")
    return Roi(begin, end - begin)


def region_text(roi: Roi) -> str:
    """Write a region as `parse_region` takes it."""
    return ",".join(f"{begin}:{end}" for begin, end in zip(roi.begin, roi.end, strict=True))


def check_region(roi: Roi, array: Array, where: str) -> None:
    """Check that a region consists of voxels of an array.

    Args:
        roi: the region in nm.
        array: ([channel,] z, y, x).
        where: its name, for the message.

    Raises:
        UserError: part of the region lies outside, or it begins or ends inside a voxel.
    """
    if not array.roi.contains(roi):
        raise UserError(
            f"region {region_text(roi)} is not inside {where}, which covers {region_text(array.roi)} nm: choose a part "
            "of that"
        )
    if any((roi.begin - array.offset) % array.voxel_size) or any(roi.shape % array.voxel_size):
        raise UserError(
            f"region {region_text(roi)} cuts voxels of {where}, which are {tuple(array.voxel_size)} nm wide and begin "
            f"at {tuple(array.offset)}: move its begin and end to whole voxels"
        )


def crop(array: Array, roi: Roi) -> Array:
    """Return a region of an array as an array that reads what is sliced. It cannot be written.

    Args:
        array: ([channel,] z, y, x).
        roi: in nm, a region that `check_region` accepts.
    """
    channels = len(array.shape) - array.voxel_size.dims
    return place_array(array.data[(slice(None),) * channels + voxels_of(array, roi)], array.voxel_size, roi.begin)
