"""Where an array lies in the world: its voxel size and offset, as three conventions store them.

The conventions are the attributes `resolution` (CREMI) and `voxel_size` (funlib), each with `offset`, and the scale of
OME-NGFF. Axes are z, y, x. Files, keys, options and messages give nanometers, which may be any numbers. An `Array` and
its ROIs have whole numbers, because `funlib.geometry.Coordinate` holds integers: nanometers where voxel size and offset
are whole ones, else picometers. Arrays on one grid of voxels have one unit, so their ROIs can be compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from funlib.geometry import Coordinate
from funlib.persistence import Array

from lsdseg.data_utils.stored import read_json
from lsdseg.errors import UserError

NANOMETERS = {
    "": 1,
    "nm": 1,
    "nanometer": 1,
    "um": 1000,
    "µm": 1000,
    "micron": 1000,
    "micrometer": 1000,
    "mm": 10**6,
    "millimeter": 10**6,
    "angstrom": 0.1,
}

PICOMETERS = 1000  # in a nanometer
LARGEST = 1e15  # nm; beyond it floats and the integers of other libraries lose digits

# Voxel size and offset in nm.
Placement = tuple[Sequence[float], Sequence[float]]


def read_placement(
    attributes: Mapping[str, Any], where: str, fallback: Placement | None = None, or_set: str = ""
) -> Placement:
    """Return the voxel size and offset that an array's attributes give.

    Args:
        attributes: attributes of the array.
        where: name of the array in messages.
        fallback: voxel size and offset in nm to return if the attributes give no voxel size.
        or_set: key or option that gives a fallback, for the message.

    Returns:
        Voxel size and offset in nm.

    Raises:
        UserError: the voxel size is unknown or not above 0, or its unit is unknown.
    """
    placement = _from_attributes(attributes, where) or fallback
    if placement is None:
        remedy = f", or {or_set}" if or_set else ""
        raise UserError(f"{where} has no voxel size: set its attributes resolution and offset (z, y, x in nm){remedy}")
    voxel_size, offset = checked_placement(*placement, where)
    return voxel_size, offset


def checked_placement(voxel_size: Sequence[float], offset: Sequence[float], where: str) -> Placement:
    """Return voxel size and offset in nm without rounding errors, whole numbers as int.

    Args:
        voxel_size: in nm.
        offset: in nm.
        where: name of the array in messages.

    Raises:
        UserError: they are not one to five numbers, or voxels have no size.
    """
    exact, begin = _numbers(voxel_size, "voxel size", where), _numbers(offset, "offset", where)
    size = tuple(map(_rounded, exact))
    if min(size) <= 0:
        raise UserError(f"{where} has voxel size {size} nm: correct its attribute resolution")
    # an offset of whole voxels stays one: 100 voxels of 8.33333 nm are 100 of 8.333
    voxels = [round(b / v) for b, v in zip(begin, exact, strict=True)]
    on_grid = [math.isclose(b, n * v, abs_tol=1e-6) for b, n, v in zip(begin, voxels, exact, strict=True)]
    return size, tuple(
        _rounded(n * v if whole else b) for b, n, v, whole in zip(begin, voxels, size, on_grid, strict=True)
    )


def _rounded(value: float) -> float:
    """Return a length in nm to the picometer, as an int if it is whole."""
    picometers = round(value * PICOMETERS)
    return picometers / PICOMETERS if picometers % PICOMETERS else picometers // PICOMETERS


def place_array(data: Any, voxel_size: Sequence[float], offset: Sequence[float]) -> Array:
    """Return voxels as an array with a place.

    Args:
        data: anything with shape, dtype, ndim and chunks whose slices are numpy arrays.
        voxel_size: in nm, of the last axes, which are spatial. Axes before them are channels.
        offset: in nm, of the same axes.
    """
    scale = 1 if all(float(value).is_integer() for value in (*voxel_size, *offset)) else PICOMETERS
    size, begin = (Coordinate(round(value * scale) for value in values) for values in (voxel_size, offset))
    return _array(data, size, begin, scale, data.chunks)


def place_like(array: Array, data: Any, begin: Coordinate | None = None) -> Array:
    """Return voxels on the grid of an array, and in its unit.

    Args:
        array: says how large the voxels are.
        data: anything with shape, dtype and ndim whose slices are numpy arrays.
        begin: where they begin, in the array's unit. None: where the array does.
    """
    begin, chunks = array.offset if begin is None else begin, getattr(data, "chunks", array.chunk_shape)
    return _array(data, array.voxel_size, begin, units_per_nanometer(array), chunks)


def _array(data: Any, voxel_size: Coordinate, offset: Coordinate, scale: int, chunks: Any) -> Array:
    """Return an array whose voxel size and offset are in units of 1 / scale nm."""
    dims = voxel_size.dims
    channels = data.ndim - dims
    return Array(
        data,
        offset=offset,
        voxel_size=voxel_size,
        axis_names=["c^"] * channels + ["z", "y", "x"][-dims:],
        units=["nm" if scale == 1 else "pm"] * dims,
        types=["channel"] * channels + ["space"] * dims,
        chunks=chunks,
    )


def units_per_nanometer(array: Array) -> int:
    """Return 1 if the ROI of an array is in nm, 1000 if it is in pm."""
    return 1 if array.units[-1] == "nm" else PICOMETERS


def nanometers(values: Iterable[int], array: Array) -> tuple[float, ...]:
    """Return lengths along the axes of an array, or places on them, in nm: whole numbers as int.

    Args:
        values: in the unit of the array, such as its voxel size, or the begin of a ROI in it.
        array: says which unit that is.
    """
    return to_nanometers(values, units_per_nanometer(array))


def to_nanometers(values: Iterable[int], per_nanometer: int) -> tuple[float, ...]:
    """Return lengths in nm, whole numbers as int, that are given in a unit of which so many are a nanometer."""
    lengths = [divmod(int(value), per_nanometer) for value in values]
    return tuple(whole + part / per_nanometer if part else whole for whole, part in lengths)


def voxel_size_nm(array: Array) -> tuple[float, ...]:
    """Return the voxel size of an array in nm."""
    return nanometers(array.voxel_size, array)


def offset_nm(array: Array) -> tuple[float, ...]:
    """Return where an array begins, in nm."""
    return nanometers(array.offset, array)


def begun_at(array: Array, begin: Coordinate) -> Array:
    """Return an array as if it began elsewhere, in its unit."""
    return place_like(array, array._source_data, begin)


def in_picometers(array: Array) -> Array:
    """Return an array whose ROI is in pm, to be compared with that of another one."""
    scale = PICOMETERS // units_per_nanometer(array)
    return _array(array._source_data, array.voxel_size * scale, array.offset * scale, PICOMETERS, array.chunk_shape)


def _from_attributes(attributes: Mapping[str, Any], where: str) -> Placement | None:
    """Return voxel size and offset in nm from `resolution` or `voxel_size`, None if there is neither."""
    voxel_size = attributes.get("resolution", attributes.get("voxel_size"))
    if voxel_size is None:
        return None
    voxel_size = _numbers(voxel_size, "voxel size", where)
    offset = _numbers(attributes.get("offset", [0] * len(voxel_size)), "offset", where)
    units = attributes.get("units", ["nm"] * len(voxel_size))
    if not isinstance(units, list | tuple) or not units:
        raise UserError(f"{where} has the units {str(units)[:80]!r}: correct its attribute units, e.g. to [nm, nm, nm]")
    scale = [_nanometers(unit, where) for unit in units]
    dims = min(len(scale), len(voxel_size), len(offset))  # units and offset may leave out a channel axis
    return (
        [v * s for v, s in zip(voxel_size[-dims:], scale[-dims:], strict=True)],
        [o * s for o, s in zip(offset[-dims:], scale[-dims:], strict=True)],
    )


def _numbers(values: Any, what: str, where: str) -> list[float]:
    """Return an attribute as a list of numbers, one for each axis, or raise UserError if it is none."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if not 1 <= len(numbers) <= 5 or isinstance(values, str) or not all(abs(n) < LARGEST for n in numbers):
        raise UserError(
            f"{where} has {what} {str(values)[:80]}: correct its attributes resolution and offset to z, y, x in nm"
        )
    return numbers


def read_ome_placement(folder: Path, where: str) -> Placement | None:
    """Return the voxel size and offset of an array from the OME-NGFF metadata (0.4 or 0.5) of its group.

    Args:
        folder: folder of the array.
        where: name of the array in messages.

    Returns:
        Voxel size and offset in nm; None if there is no metadata for this array.

    Raises:
        UserError: a unit is unknown.
    """
    try:
        return _from_multiscales(multiscales_of(folder.parent), folder.name, where)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"the OME-NGFF metadata of {where} in {_attributes_file(folder.parent)} is damaged "
            f"({type(error).__name__}: {str(error)[:100]}): correct or remove its multiscales"
        ) from error


def multiscales_of(group: Path) -> list[dict[str, Any]]:
    """Return the OME-NGFF multiscales in the attributes of a group, none if there are none."""
    attributes = stored_attributes(group)
    found = attributes.get("ome", attributes)
    return found.get("multiscales", []) if isinstance(found, dict) else []


def stored_attributes(folder: Path) -> dict[str, Any]:
    """Return the attributes of a group or an array of zarr format 2 or 3.

    Raises:
        UserError: their file is damaged.
    """
    file = _attributes_file(folder)
    attributes = read_json(file)
    if file.name == "zarr.json":
        attributes = attributes.get("attributes", {})
    return attributes if isinstance(attributes, dict) else {}


def _attributes_file(folder: Path) -> Path:
    """Return the file that holds the attributes of a group or an array of zarr format 2 or 3."""
    return folder / (".zattrs" if (folder / ".zattrs").is_file() else "zarr.json")


def _from_multiscales(multiscales: list[dict[str, Any]], name: str, where: str) -> Placement | None:
    """Return voxel size and offset in nm of a level of OME-NGFF multiscales, None if they have no such level."""
    for multiscale in multiscales:
        for level in multiscale["datasets"]:
            if level["path"] != name or "coordinateTransformations" not in level:
                continue
            axes = multiscale["axes"]
            scale, translation = np.ones(len(axes)), np.zeros(len(axes))
            common = multiscale.get("coordinateTransformations", [])
            for transformation in level["coordinateTransformations"] + common:
                if transformation["type"] == "scale":
                    scale *= transformation["scale"]
                    translation *= transformation["scale"]
                elif transformation["type"] == "translation":
                    translation += transformation["translation"]
            space = [axis for axis, description in enumerate(axes) if description.get("type") == "space"]
            factors = [_nanometers(axes[axis].get("unit", "nanometer"), where) for axis in space]
            return list(scale[space] * factors), list(translation[space] * factors)
    return None


def _nanometers(unit: Any, where: str) -> float:
    """Return the length of a unit in nm."""
    if not isinstance(unit, str) or unit not in NANOMETERS:
        known = ", ".join(filter(None, NANOMETERS))
        raise UserError(f"{where} has its voxel size in {str(unit)[:80]!r}, an unknown unit: use one of {known}")
    return NANOMETERS[unit]
