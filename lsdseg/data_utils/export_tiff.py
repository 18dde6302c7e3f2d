"""Export to one OME-TIFF, which Fiji and most programs for microscopy read. Its metadata has voxel size and offset."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.export import STEP, Export

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")  # of OME-XML
LARGEST_TIFF = 2**32 - 2**25  # bytes; a larger one must be a BigTIFF
SLAB_BYTES = 2**28
NM_PER_CM = 10**7


def write_tiff(export: Export, path: Path) -> None:
    """Write a stack, section by section: z, y, x, or channel, z, y, x.

    Raises:
        UserError: OME-TIFF cannot hold the voxels, such as ids of more than 32 bits.
    """
    dtype = export.stored_type(TYPES, "OME-TIFF")
    shape = (*export.channels, *export.shape)
    axes = "CZYX" if export.channels else "ZYX"
    _, height, width = export.voxel_size
    with (
        tifffile.TiffWriter(path, ome=True, bigtiff=math.prod(shape) * dtype.itemsize > LARGEST_TIFF) as tiff,
        tqdm(total=math.prod(shape), desc=export.dataset, unit="voxel", unit_scale=True) as bar,
    ):
        tiff.write(
            _sections(export, dtype, bar),
            shape=shape,
            dtype=dtype,
            photometric="minisblack",
            compression="zlib",
            compressionargs={"level": 1},
            software=STEP,
            resolution=(NM_PER_CM / width, NM_PER_CM / height),
            resolutionunit="CENTIMETER",
            metadata={"axes": axes, "Name": export.dataset, **_placement(export)},
        )


def is_own(path: Path) -> bool:
    """Return whether an export wrote a file."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return tiff.pages.first.software == STEP
    except Exception:  # tifffile raises what it likes
        return False


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
