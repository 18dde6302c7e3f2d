"""Regions of volumes: given in nm, so that the same one can be cut out of raw, of a segmentation and of labels."""

import re
from collections.abc import Sequence

from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array

from lsdseg.data_utils.placement import nanometers, offset_nm, place_like, units_per_nanometer, voxel_size_nm
from lsdseg.data_utils.volumes import voxels_of
from lsdseg.errors import UserError

FORM = "Z0:Z1,Y0:Y1,X0:X1"


def parse_region(text: str, array: Array, where: str) -> Roi:
    """Return a region that was given as Z0:Z1,Y0:Y1,X0:X1: begin and end along each axis, in nm.

    Args:
        text: the region.
        array: of which it is a region, ([channel,] z, y, x).
        where: its name, for the message.

    Returns:
        The region in the unit of the array.

    Raises:
        UserError: the text is not of that form, an end is not after its begin, or one is inside a voxel.
    """
    bound = r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,9})?)\s*"
    match = re.fullmatch(",".join([f"{bound}:{bound}"] * 3), text)
    if not match:
        raise UserError(f"region {text[:80]!r} is not of the form {FORM} in nm, as in 400:2000,0:800,0:800")
    numbers = [float(number) for number in match.groups()]
    begin, end = numbers[::2], numbers[1::2]
    if any(b >= e for b, e in zip(begin, end, strict=True)):
        raise UserError(f"region {text}: every end must be larger than its begin ({FORM} in nm)")
    return region_between(begin, end, array, where)


def region_between(begin: Sequence[float], end: Sequence[float], array: Array, where: str) -> Roi:
    """Return the region between two corners in nm, in the unit of an array that is called `where`.

    Raises:
        UserError: a corner is inside a voxel.
    """
    scale = units_per_nanometer(array)
    first, last = (Coordinate(round(value * scale) for value in corner) for corner in (begin, end))
    roi = Roi(first, last - first)
    if any(abs(value * scale - whole) > 1e-6 for value, whole in zip((*begin, *end), (*first, *last), strict=True)):
        text = ",".join(f"{b:g}:{e:g}" for b, e in zip(begin, end, strict=True))
        raise _cuts_voxels(text, array, where)
    return roi


def region_text(roi: Roi, array: Array) -> str:
    """Write a region of an array as `parse_region` takes it."""
    corners = zip(nanometers(roi.begin, array), nanometers(roi.end, array), strict=True)
    return ",".join(f"{begin}:{end}" for begin, end in corners)


def check_region(roi: Roi, array: Array, where: str) -> None:
    """Check that a region consists of voxels of an array.

    Args:
        roi: the region, in the unit of the array.
        array: ([channel,] z, y, x).
        where: its name, for the message.

    Raises:
        UserError: part of the region lies outside, or it begins or ends inside a voxel.
    """
    text = region_text(roi, array)
    if not array.roi.contains(roi):
        whole = region_text(array.roi, array)
        raise UserError(f"region {text} is not inside {where}, which covers {whole} nm: choose a part of that")
    if any((roi.begin - array.offset) % array.voxel_size) or any(roi.shape % array.voxel_size):
        raise _cuts_voxels(text, array, where)


def _cuts_voxels(region: str, array: Array, where: str) -> UserError:
    return UserError(
        f"region {region} cuts voxels of {where}, which are {voxel_size_nm(array)} nm wide and begin at "
        f"{offset_nm(array)}: move its begin and end to whole voxels"
    )


def crop(array: Array, roi: Roi) -> Array:
    """Return a region of an array as an array that reads what is sliced. It cannot be written.

    Args:
        array: ([channel,] z, y, x).
        roi: a region that `check_region` accepts.
    """
    channels = len(array.shape) - array.voxel_size.dims
    return place_like(array, array.data[(slice(None),) * channels + voxels_of(array, roi)], roi.begin)
