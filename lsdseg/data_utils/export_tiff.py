"""Export to TIFF: one file for Fiji and most programs for microscopy, or a folder of sections for others, as Seg2Link.

The one file is an OME-TIFF, whose metadata has voxel size and offset. Files of sections have the size of their pixels.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.export import STEP, Export
from lsdseg.errors import UserError

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")  # of OME-XML
LARGEST_TIFF = 2**32 - 2**25  # bytes; a larger one must be a BigTIFF
SLAB_BYTES = 2**28
NM_PER_CM = 10**7
SECTION = re.compile(r"section_[0-9]{5,}\.tif")  # names of files in a folder, in the order of the sections


def write_tiff(export: Export, path: Path) -> None:
    """Write a stack, section by section: z, y, x, or channel, z, y, x.

    Raises:
        UserError: OME-TIFF cannot hold the voxels, such as ids of more than 32 bits.
    """
    dtype = export.stored_type(TYPES, "OME-TIFF")
    shape = (*export.channels, *export.shape)
    axes = "CZYX" if export.channels else "ZYX"
    with (
        tifffile.TiffWriter(path, ome=True, bigtiff=math.prod(shape) * dtype.itemsize > LARGEST_TIFF) as tiff,
        tqdm(total=math.prod(shape), desc=export.dataset, unit="voxel", unit_scale=True) as bar,
    ):
        tiff.write(
            _sections(export, dtype, bar),
            shape=shape,
            dtype=dtype,
            metadata={"axes": axes, "Name": export.dataset, **_placement(export)},
            **_options(export),
        )


def write_sections(export: Export, path: Path) -> None:
    """Write a file for each section into an empty folder: section_00000.tif and so on.

    Raises:
        UserError: there are channels, or TIFF cannot hold the voxels, such as ids of more than 32 bits.
    """
    if export.channels:
        raise UserError(f"{export.dataset} has channels, which a folder of sections cannot hold: export it --to tiff")
    dtype = export.stored_type(TYPES, "TIFF")
    with tqdm(total=math.prod(export.shape), desc=export.dataset, unit="voxel", unit_scale=True) as bar:
        for number, section in enumerate(_sections(export, dtype, bar)):
            tifffile.imwrite(path / f"section_{number:05d}.tif", section, metadata=None, **_options(export))


def is_own(path: Path) -> bool:
    """Return whether an export wrote a file."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return tiff.pages.first.software == STEP
    except Exception:  # tifffile raises what it likes
        return False


def is_own_folder(path: Path) -> bool:
    """Return whether an export wrote all that is in a folder."""
    files = list(path.iterdir())
    return bool(files) and all(SECTION.fullmatch(file.name) and is_own(file) for file in files)


def _options(export: Export) -> dict[str, Any]:
    """Return how to write a file: compressed, with the size of pixels and the name of the program that wrote it."""
    _, height, width = export.voxel_size
    return {
        "photometric": "minisblack",
        "compression": "zlib",
        "compressionargs": {"level": 1},
        "software": STEP,
        "resolution": (NM_PER_CM / width, NM_PER_CM / height),
        "resolutionunit": "CENTIMETER",
    }


def _sections(export: Export, dtype: np.dtype[Any], bar: tqdm) -> Iterator[NDArray[Any]]:
    """Read as many sections at a time as fit into SLAB_BYTES, at least one."""
    depth, *section = export.shape
    step = max(1, SLAB_BYTES // (math.prod(section) * export.array.dtype.itemsize))
    for channel in range(math.prod(export.channels)):
        for start in range(0, depth, step):
            channels = (slice(channel, channel + 1),) * len(export.channels)
            voxels = (*channels, slice(start, min(depth, start + step)), slice(0, section[0]), slice(0, section[1]))
            for data in export.read_as(dtype, voxels).reshape(-1, *section):
                yield data
                bar.update(data.size)


def _placement(export: Export) -> dict[str, Any]:
    """Return the voxel size and the position of every section in OME's terms, in nm."""
    count = math.prod(export.channels)
    (depth, _, _), (thickness, _, _), (z, y, x) = export.shape, export.voxel_size, export.offset
    positions = {"Z": [z + thickness * n for n in range(depth)] * count, "Y": [y] * depth * count}
    positions["X"] = [x] * depth * count
    planes: dict[str, list[Any]] = {}
    for axis, along in positions.items():
        planes |= {f"Position{axis}": along, f"Position{axis}Unit": ["nm"] * len(along)}
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", export.voxel_size, strict=True)}
    units = {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
    return {**sizes, **units, "Plane": planes}
