"""Export to OME-Zarr 0.4 (zarr format 2) and 0.5 (format 3): a pyramid that napari, Fiji and Neuroglancer read.

tensorstore writes both formats, whichever version of zarr is installed.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from tqdm import tqdm

from lsdseg.data_utils.export import STEP, Export
from lsdseg.data_utils.pyramid import EDGE, Level, plan_levels, voxel_count, write_pyramid
from lsdseg.data_utils.records import ATTRIBUTE
from lsdseg.data_utils.replace import HEADERS
from lsdseg.data_utils.stored import read_json
from lsdseg.errors import UserError

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")
# Of the channels of affinities z, y, x, as view.py shows them.
COLORS = ("FF0000", "00FF00", "0000FF")


def write_ome_04(export: Export, path: Path) -> None:
    """Write version 0.4 into an empty folder."""
    attributes = _write_levels(export, path, version=2)
    multiscales = [{"version": "0.4", **attributes.pop("multiscales")[0]}]
    for key in attributes.keys() & {"image-label", "omero"}:
        attributes[key] = {"version": "0.4", **attributes[key]}
    _write_json(path / ".zgroup", {"zarr_format": 2})
    _write_json(path / ".zattrs", {"multiscales": multiscales, **attributes, **export.record.attributes})


def write_ome_05(export: Export, path: Path) -> None:
    """Write version 0.5 into an empty folder."""
    ome = {"version": "0.5", **_write_levels(export, path, version=3)}
    attributes = {"ome": ome, **export.record.attributes}
    _write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def is_own(path: Path) -> bool:
    """Return whether an export wrote all that is in a folder."""
    try:
        attributes = read_json(path / ".zattrs") or read_json(path / "zarr.json")["attributes"]
        (multiscale,) = attributes.get("ome", attributes)["multiscales"]
        known = HEADERS | {level["path"] for level in multiscale["datasets"]}
        return attributes[ATTRIBUTE]["step"] == STEP and {child.name for child in path.iterdir()} <= known
    except (UserError, KeyError, ValueError, TypeError, AttributeError):
        return False


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_levels(export: Export, path: Path, version: int) -> dict[str, Any]:
    """Write the arrays 0, 1, ... of a pyramid, and return its metadata without the version."""
    dtype = export.stored_type(TYPES, "OME-Zarr")
    levels = plan_levels(export.shape, (0, 0, 0), export.voxel_size)
    stores = [_create(export, path / str(number), level, dtype, version) for number, level in enumerate(levels)]
    total = voxel_count(levels) * math.prod(export.channels)
    with tqdm(total=total, desc=export.dataset, unit="voxel", unit_scale=True) as bar:
        write_pyramid(
            lambda voxels: export.read_as(dtype, voxels),
            levels,
            stores,
            [(2 * EDGE,) * 3] * len(levels),
            labels=export.labels,
            bar=bar,
        )
    channel_axis = [{"name": "c", "type": "channel"}] * len(export.channels)
    multiscale = {
        "name": export.dataset,
        "type": "mode" if export.labels else "mean",
        "axes": channel_axis + [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
        "datasets": [
            {"path": str(number), "coordinateTransformations": _placement(export, level)}
            for number, level in enumerate(levels)
        ],
    }
    kind = {"image-label": {}} if export.labels else {"omero": _omero(export, dtype)}
    return {"multiscales": [multiscale], **kind}


def _placement(export: Export, level: Level) -> list[dict[str, Any]]:
    """Return scale and translation of a level, in nm.

    The translation is where the center of the first voxel is (see "translation" of the specification). The first level
    keeps the offset, as everything in this suite has it. A coarser voxel's center lies further in.
    """
    ones, zeros = [1] * len(export.channels), [0] * len(export.channels)
    further = [(wide - narrow) / 2 for wide, narrow in zip(level.voxel_size, export.voxel_size, strict=True)]
    translation = [o + shift for o, shift in zip(export.offset, further, strict=True)]
    return [
        {"type": "scale", "scale": [*ones, *level.voxel_size]},
        {"type": "translation", "translation": [*zeros, *translation]},
    ]


def _omero(export: Export, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return how to show the channels of an image."""
    count = math.prod(export.channels)
    end = np.iinfo(dtype).max if dtype.kind in "iu" else 1.0
    window = {"min": 0, "start": 0, "max": end, "end": end}
    channels = [
        {
            "label": f"{export.dataset} {number}" if export.channels else export.dataset,
            "color": COLORS[number % 3] if count > 1 else "FFFFFF",
            "active": number < 3,
            "window": window,
        }
        for number in range(count)
    ]
    return {"channels": channels, "rdefs": {"model": "color"}}


def _create(export: Export, path: Path, level: Level, dtype: np.dtype[Any], version: int) -> Any:
    """Create the array of a level, [channel,] z, y, x."""
    shape = [*export.channels, *level.shape]
    chunks = [*[1] * len(export.channels), *(min(EDGE, size) for size in level.shape)]
    if version == 2:
        compressor = {"id": "zstd", "level": 1}
        metadata = {"shape": shape, "chunks": chunks, "dtype": dtype.str, "compressor": compressor, "fill_value": 0}
        metadata["dimension_separator"] = "/"
    else:
        codecs = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 1}},
        ]
        metadata = {"shape": shape, "data_type": dtype.name, "codecs": codecs, "fill_value": 0}
        metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunks}}
        metadata["dimension_names"] = ["c"] * len(export.channels) + ["z", "y", "x"]
    driver = {2: "zarr", 3: "zarr3"}[version]
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}, "metadata": metadata}
    return tensorstore.open(spec, create=True).result()
