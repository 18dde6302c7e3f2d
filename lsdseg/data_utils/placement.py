"""Where an array lies in the world: voxel size and offset by the three conventions that are in use.

They are the attributes `resolution` (CREMI) and `voxel_size` (funlib), each with `offset`, and the scale of OME-NGFF.
Axes are z, y, x; voxel sizes and offsets are whole nanometers, because `funlib.geometry.Coordinate` holds integers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from funlib.geometry import Coordinate

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


def voxel_grid(
    attributes: Mapping[str, Any], where: str, fallback: tuple[Sequence, Sequence] | None = None
) -> tuple[Coordinate, Coordinate]:
    """Voxel size and offset (nm) by an array's attributes, or the fallback if they give no voxel size.

    where: name of the array in messages. Raises UserError as `open_array`.
    """
    placement = _placement(attributes, where) or fallback
    if placement is None:
        raise UserError(
            f"{where} has no voxel size: set its attributes resolution and offset (z, y, x in nm) "
            "or PREPROCESS.SOURCE_DATA_RESOLUTION"
        )
    voxel_size = whole_nanometers(placement[0], "voxel size", where)
    offset = whole_nanometers(placement[1], "offset", where)
    if min(voxel_size) <= 0:
        raise UserError(f"{where} has voxel size {tuple(voxel_size)} nm: correct its attribute resolution")
    return voxel_size, offset


def _placement(attributes: Mapping[str, Any], where: str) -> tuple[list, list] | None:
    """Voxel size and offset (nm) of an array by its own attributes."""
    voxel_size = attributes.get("resolution", attributes.get("voxel_size"))
    if voxel_size is None:
        return None
    scale = [_nanometers(unit, where) for unit in attributes.get("units", ["nm"] * len(voxel_size))]
    offset = attributes.get("offset", [0] * len(voxel_size))
    dims = min(len(scale), len(voxel_size), len(offset))  # units and offset may leave out a channel axis
    return (
        [v * s for v, s in zip(voxel_size[-dims:], scale[-dims:], strict=True)],
        [o * s for o, s in zip(offset[-dims:], scale[-dims:], strict=True)],
    )


def ome_placement(folder: Path, where: str) -> tuple[list, list] | None:
    """Voxel size and offset (nm) of an array by the OME-NGFF metadata (0.4 or 0.5) of its group."""
    attributes: dict = {}
    if (folder.parent / ".zattrs").is_file():
        attributes = json.loads((folder.parent / ".zattrs").read_text())
    elif (folder.parent / "zarr.json").is_file():
        attributes = json.loads((folder.parent / "zarr.json").read_text()).get("attributes", {})
    for multiscale in attributes.get("ome", attributes).get("multiscales", []):
        for level in multiscale["datasets"]:
            if level["path"] != folder.name or "coordinateTransformations" not in level:
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


def _nanometers(unit: str, where: str) -> float:
    if unit not in NANOMETERS:
        known = ", ".join(filter(None, NANOMETERS))
        raise UserError(f"{where} has its voxel size in {unit!r}, an unknown unit: use one of {known}")
    return NANOMETERS[unit]


def whole_nanometers(values: Sequence[float], what: str, where: str) -> Coordinate:
    """Values in nm as a Coordinate, but for rounding errors; UserError if `what` of `where` has fractions of nm."""
    rounded = [round(float(value)) for value in values]
    if not np.allclose(values, rounded, rtol=0, atol=1e-6):
        given = tuple(round(float(value), 6) for value in values)
        raise UserError(
            f"{where} has {what} {given} nm, and only whole nanometers are supported: "
            "round its attributes resolution and offset"
        )
    return Coordinate(rounded)
