"""Meshes of a segmentation, in Neuroglancer's legacy format: a piece for each segment and block, and lists of them.

Blocks overlap by one voxel, so the pieces of a segment meet without a gap: marching cubes spans its surface between the
centers of neighboring voxels. Behind the border of the volume lies background, which closes the surface there.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastremap
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from skimage.measure import marching_cubes
from tqdm import tqdm

from lsdseg.data_utils.export import Export
from lsdseg.data_utils.volumes import Slabs

BLOCK = 128  # voxels along each axis


def write_meshes(export: Export, path: Path) -> None:
    """Write meshes of all segments but background, and the lists of their pieces. Memory holds one block and the lists.

    Vertices are x, y, z in nm. https://github.com/google/neuroglancer, src/datasource/precomputed/meshes.md: "Legacy
    single-resolution mesh format".

    Args:
        export: the segmentation.
        path: folder to create.
    """
    path.mkdir()
    (path / "info").write_text(json.dumps({"@type": "neuroglancer_legacy_mesh"}), encoding="utf-8")
    pieces: defaultdict[int, list[str]] = defaultdict(list)
    covered = Slabs(export.shape, (BLOCK,) * 3)
    for number, slab in enumerate(tqdm(covered, desc="meshes", unit="block")):
        for segment, (vertices, faces) in _meshes_in(export, slab).items():
            name = f"{segment}:0:{number}"
            count = np.array([len(vertices)], "<u4")
            (path / name).write_bytes(b"".join(part.tobytes() for part in (count, vertices, faces)))
            pieces[segment].append(name)
    for segment, names in pieces.items():
        (path / f"{segment}:0").write_text(json.dumps({"fragments": names}), encoding="utf-8")


def segment_mesh(
    inside: NDArray[np.bool_], begin: Sequence[float], voxel_size: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.uint32]] | None:
    """Return the surface halfway between the centers of voxels inside and outside, by marching cubes.

    Args:
        inside: (z, y, x). The surface ends at the centers of the outermost voxels.
        begin: where the first voxel begins, z, y, x in nm.
        voxel_size: in nm.

    Returns:
        Vertices (n, 3), x, y, z in nm, and triangles (m, 3) of their numbers. None if there is no surface.
    """
    if min(inside.shape) < 2 or inside.all():
        return None
    vertices, faces, _, _ = marching_cubes(inside.astype(np.float32), 0.5, spacing=tuple(map(float, voxel_size)))
    placed = vertices + np.asarray(begin) + np.asarray(voxel_size) / 2
    return placed[:, ::-1].astype("<f4"), faces.astype("<u4")


def _meshes_in(export: Export, slab: Sequence[slice]) -> dict[int, tuple[NDArray[Any], NDArray[Any]]]:
    """Return segment -> its mesh in the block and up to the center of the next voxel, or of one beyond the volume."""
    start = [along.start for along in slab]
    # One voxel more on both sides at the border, on the far side elsewhere.
    before = [int(first == 0) for first in start]
    after = [int(along.stop == size) for along, size in zip(slab, export.shape, strict=True)]
    wanted = tuple(slice(a.start, min(a.stop + 1, size)) for a, size in zip(slab, export.shape, strict=True))
    ids = np.pad(export.read_as(export.array.dtype, wanted), list(zip(before, after, strict=True)))
    local, names = fastremap.renumber(ids)
    meshes = {}
    boxes = find_objects(local)
    for segment, number in names.items():
        if segment == 0:
            continue
        around = tuple(slice(max(0, b.start - 1), b.stop + 1) for b in boxes[number - 1])
        corner = [s - b + a.start for s, b, a in zip(start, before, around, strict=True)]
        begin = [o + v * c for o, v, c in zip(export.offset, export.voxel_size, corner, strict=True)]
        mesh = segment_mesh(local[around] == number, begin, export.voxel_size)
        if mesh is not None:
            meshes[int(segment)] = mesh
    return meshes
