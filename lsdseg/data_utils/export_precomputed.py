"""Export to Neuroglancer precomputed: a pyramid that Neuroglancer, cloud-volume and tensorstore read.

The format counts voxels from the origin of the world and stores x, y, z, so an offset must be a whole number of voxels.
Large levels are sharded, one file for 64 chunks, fewer with many channels: file systems do not like millions of files.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from tqdm import tqdm

from lsdseg.data_utils.export import STEP, Export
from lsdseg.data_utils.export_mesh import write_meshes
from lsdseg.data_utils.export_skeletons import write_skeletons
from lsdseg.data_utils.pyramid import EDGE, Level, plan_levels, voxel_count, write_pyramid
from lsdseg.data_utils.segment_tables import SEGMENTS, read_table
from lsdseg.data_utils.sorted_rows import Columns
from lsdseg.data_utils.stored import read_json
from lsdseg.errors import UserError

TITLE = "Neuroglancer precomputed"
IMAGES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32")
IDS = ("uint32", "uint64")  # what compressed_segmentation holds
MANY_CHUNKS = 4096  # a level with more is sharded
SHARD_BITS, SHARD_BYTES = 6, 2**28  # one shard holds 2**6 chunks, fewer if they take more; it is made in memory
PROVENANCE, MESH, SKELETONS, PROPERTIES = "provenance", "mesh", "skeletons", "segment_properties"
MOST_SEGMENTS = 10**6  # a page reads the properties of all of them at once


def write_precomputed(export: Export, path: Path) -> None:
    """Write a pyramid, meshes and skeletons if they are wanted, and the sizes of segments if they are known.

    Args:
        export: the dataset.
        path: an empty folder.

    Raises:
        UserError: the offset is not a whole number of voxels, or the format cannot hold the voxels.
    """
    array = export.array
    if any(array.offset % array.voxel_size):
        raise UserError(
            f"{export.dataset} begins at {export.offset} nm, which is no whole number of voxels of {export.voxel_size} "
            f"nm, as {TITLE} needs: export it --to ome-zarr"
        )
    dtype = export.stored_type(IDS if export.labels else IMAGES, TITLE)
    levels = plan_levels(export.shape, array.offset / array.voxel_size, export.voxel_size)
    stores, blocks = [], []
    for level in levels:
        sharding, block = _sharding(level, math.prod(export.channels) * dtype.itemsize)
        stores.append(_create(export, path, level, dtype.name, sharding))
        blocks.append(block)
    total = voxel_count(levels) * math.prod(export.channels)
    with tqdm(total=total, desc=export.dataset, unit="voxel", unit_scale=True) as bar:
        write_pyramid(
            lambda voxels: export.read_as(dtype, voxels), levels, stores, blocks, labels=export.labels, bar=bar
        )
    along = {MESH: write_meshes} if export.mesh else {}
    along |= {SKELETONS: write_skeletons} if export.skeletons else {}
    for name, write in along.items():
        write(export, path / name)
    more = {name: name for name in along}
    if export.segments is not None and _write_properties(export.segments, path / PROPERTIES):
        more[PROPERTIES] = PROPERTIES
    (path / "info").write_text(json.dumps(read_json(path / "info") | more), encoding="utf-8")
    made = {"by": STEP, "method": export.record.to_json()}
    provenance = {"description": export.dataset, "owners": [], "sources": [], "processing": [made]}
    (path / PROVENANCE).write_text(json.dumps(provenance), encoding="utf-8")


def is_own(path: Path) -> bool:
    """Return whether an export wrote all that is in a folder."""
    try:
        provenance, info = read_json(path / PROVENANCE), read_json(path / "info")
        known = {"info", PROVENANCE, MESH, SKELETONS, PROPERTIES, *(scale["key"] for scale in info["scales"])}
        return provenance["processing"][0]["by"] == STEP and {child.name for child in path.iterdir()} <= known
    except (UserError, KeyError, IndexError, TypeError):
        return False


def _write_properties(segments: Path, path: Path) -> bool:
    """Write the size of every segment, by which Neuroglancer lists and filters them, and a tag of orphans.

    Returns:
        Whether it was written; not for more than MOST_SEGMENTS.
    """
    found: list[Columns] = [{"id": np.empty(0, "u8"), "voxels": np.empty(0, "i8"), "touches_face": np.empty(0, bool)}]
    for batch in read_table(segments, SEGMENTS, list(found[0])):
        found.append(batch)
        if sum(len(rows["id"]) for rows in found) > MOST_SEGMENTS:
            print(f"sizes of segments are left out: there are more than {MOST_SEGMENTS} segments")
            return False
    ids, voxels, outer = (np.concatenate([rows[name] for rows in found]) for name in found[0])
    dtype = "uint32" if voxels.max(initial=0) < 2**32 else "float32"
    size = {"id": "voxels", "type": "number", "data_type": dtype, "values": voxels.tolist()}
    tag: dict[str, Any] = {
        "id": "tags",
        "type": "tags",
        "tags": ["orphan"],
        "tag_descriptions": ["touches no face of the volume"],
    }
    tag["values"] = [[] if touches else [0] for touches in outer.tolist()]
    inline = {"ids": list(map(str, ids.tolist())), "properties": [size, tag]}
    path.mkdir()
    content = {"@type": "neuroglancer_segment_properties", "inline": inline}
    (path / "info").write_text(json.dumps(content), encoding="utf-8")
    return True


def _create(export: Export, path: Path, level: Level, dtype: str, sharding: dict[str, Any]) -> Any:
    """Add a level to the pyramid, and return it with the axes [channel,] z, y, x, counted from 0."""
    scale: dict[str, Any] = {
        "size": level.shape[::-1],
        "resolution": level.voxel_size[::-1],
        "voxel_offset": level.begin[::-1],
        "chunk_size": [EDGE] * 3,
        "encoding": "raw",
        **sharding,
    }
    if export.labels:
        scale |= {"encoding": "compressed_segmentation", "compressed_segmentation_block_size": [8, 8, 8]}
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path.absolute()}/"},
        "multiscale_metadata": {
            "type": "segmentation" if export.labels else "image",
            "data_type": dtype,
            "num_channels": math.prod(export.channels),
        },
        "scale_metadata": scale,
    }
    store = tensorstore.open(spec, create=True).result()
    store = store if export.channels else store[..., 0]
    return store.T[tensorstore.d[:].translate_to[0]]


def _sharding(level: Level, voxel_bytes: int) -> tuple[dict[str, Any], Sequence[int]]:
    """Return what the metadata of a scale says of shards, {} if it has none, and the shape to write at once, z, y, x.

    A shard is written at once. Its chunks have numbers that differ in the lowest bits only. The number of a chunk
    interleaves the bits of its x, y and z, as long as they last ("compressed Morton code" in the specification).
    """
    grid = [-(-size // EDGE) for size in level.shape[::-1]]
    if math.prod(grid) <= MANY_CHUNKS:
        return {}, (2 * EDGE,) * 3
    lengths = [(size - 1).bit_length() for size in grid]
    order = [axis for bit in range(max(lengths)) for axis in range(3) if bit < lengths[axis]]
    chunks_that_fit = SHARD_BYTES // (EDGE**3 * voxel_bytes)
    lowest = order[: min(SHARD_BITS, max(1, chunks_that_fit).bit_length() - 1)]
    shards = {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": "identity",
        "preshift_bits": len(lowest),
        "minishard_bits": 0,
        "shard_bits": len(order) - len(lowest),
        "minishard_index_encoding": "gzip",
        "data_encoding": "gzip",
    }
    return {"sharding": shards}, [EDGE * 2 ** lowest.count(axis) for axis in (2, 1, 0)]
