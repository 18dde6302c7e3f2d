"""Skeletons of a segmentation, one for each segment, whole across blocks: for Neuroglancer, or as SWC files.

Every connected part of a segment becomes one tree. Blocks are thinned with context around them, so the curves of
neighboring blocks meet, as far as the context holds a neurite in its full width. Thicker ones, such as somata, have
points further apart, joined by straight lines. All points of a segment are then taken together, and twigs left out.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import edt
import fastremap
import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.components import write_components
from lsdseg.data_utils.export import STEP, Export
from lsdseg.data_utils.labels import is_labeled
from lsdseg.data_utils.skeletons import Skeleton, gather, groups, join, prune, smooth, trace
from lsdseg.data_utils.swc import write_swc
from lsdseg.data_utils.thinning import thin
from lsdseg.data_utils.volumes import Slabs, create_array, read
from lsdseg.errors import UserError

BLOCK = 192  # voxels along each axis
CONTEXT = 320  # nm around a block, which is more than the radius of most neurites
CONTEXT_VOXELS = 8, 64  # the least and the most of it
MARGIN = 2  # voxels by which a neurite must be narrower than its context
SWC = ".swc"

# A point of a connected part. It is certain if it lies on the curve or, where the part is too thick for the context,
# deepest in its block. A part without such points is represented by its deepest one.
POINT = np.dtype([("part", "<u8"), ("voxel", "<i8", 3), ("radius", "<f8"), ("certain", "?")])


def write_skeletons(export: Export, path: Path) -> None:
    """Write skeletons of all segments but background and unlabeled voxels as Neuroglancer precomputed, with radii.

    Vertices are x, y, z in nm, and so are radii. https://github.com/google/neuroglancer,
    src/datasource/precomputed/skeleton.rst: "Encoded skeleton file format", unsharded.

    Args:
        export: the segmentation.
        path: folder to create.
    """
    path.mkdir()
    info = {
        "@type": "neuroglancer_skeletons",
        "transform": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        "vertex_attributes": [{"id": "radius", "data_type": "float32", "num_components": 1}],
    }
    (path / "info").write_text(json.dumps(info), encoding="utf-8")
    for segment, skeleton in _skeletons(export, path):
        counts = np.array([len(skeleton.points), len(skeleton.edges)], "<u4")
        vertices, edges = skeleton.points[:, ::-1].astype("<f4"), skeleton.edges.astype("<u4")
        parts = (counts, vertices, edges, np.asarray(skeleton.radii, "<f4"))
        (path / str(segment)).write_bytes(b"".join(part.tobytes() for part in parts))


def write_swc_folder(export: Export, path: Path) -> None:
    """Write ID.swc for each segment but background and unlabeled voxels into an empty folder.

    Raises:
        UserError: the dataset is no segmentation.
    """
    if not export.labels or export.channels:
        raise UserError(f"skeletons are made of a segmentation, which {export.dataset} is not: name another --dataset")
    for segment, skeleton in _skeletons(export, path):
        write_swc(path / f"{segment}{SWC}", skeleton, f"{STEP}: segment {segment} of {export.dataset}")


def is_own_folder(path: Path) -> bool:
    """Return whether an export wrote all that is in a folder."""
    try:
        return all(file.suffix == SWC and _first_line(file).startswith(f"# {STEP}:") for file in path.iterdir())
    except (OSError, UnicodeDecodeError):
        return False


def _first_line(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return lines.readline(1000)


def _skeletons(export: Export, folder: Path) -> Iterator[tuple[int, Skeleton]]:
    """Yield each segment and its skeleton. Memory holds one block or one skeleton, the folder all points meanwhile."""
    with TemporaryDirectory(prefix=".", dir=folder) as scratch:
        points = Path(scratch, "points")
        points.mkdir()
        blocks = Slabs(export.shape, (BLOCK,) * 3)
        parts = create_array(
            Path(scratch, "parts.zarr"),
            "parts",
            export.shape,
            voxel_size=export.voxel_size,
            offset=export.offset,
            dtype=np.uint64,
        )
        write_components(export.array, parts, blocks, connectivity=26)
        for block in blocks.with_progress("skeletons", delay=0):
            found = _points_in(export, parts, block)
            for segment, rows in groups(_segments_of(found["part"], export, parts, block)):
                with Path(points, str(segment)).open("ab") as file:
                    file.write(found[rows].tobytes())
        for file_of_points in tqdm(sorted(points.iterdir()), desc="segments", unit="segment"):
            yield int(file_of_points.name), _whole(np.fromfile(file_of_points, POINT), export)


def _segments_of(
    parts_of_points: NDArray[np.uint64], export: Export, parts: Array, block: tuple[slice, ...]
) -> NDArray[np.uint64]:
    """Return the segments to which connected parts of a block belong."""
    if not len(parts_of_points):
        return parts_of_points
    segments = fastremap.component_map(read(parts, block), export.read_as(np.dtype(np.uint64), block))
    return np.array([segments[part] for part in parts_of_points.tolist()], np.uint64)


def _points_in(export: Export, parts: Array, block: tuple[slice, ...]) -> NDArray[Any]:
    """Return the points of the connected parts in a block, at least one for each, as POINT (n,)."""
    least, most = CONTEXT_VOXELS
    context = [min(most, max(least, math.ceil(CONTEXT / size))) for size in export.voxel_size]
    window = tuple(
        slice(max(0, along.start - more), min(along.stop + more, size))
        for along, more, size in zip(block, context, export.shape, strict=True)
    )
    begin = [along.start for along in window]
    within = tuple(slice(a.start - first, a.stop - first) for a, first in zip(block, begin, strict=True))
    labels = read(parts, window)
    present = fastremap.unique(labels[within])
    present = present[(present != 0) & is_labeled(present)]
    if not len(present):
        return np.empty(0, POINT)
    numbers = _numbered(labels, present)
    distances = edt.edt(numbers, anisotropy=tuple(map(float, export.voxel_size)), black_border=False, parallel=1)
    inside = np.zeros(numbers.shape, bool)
    inside[within] = True
    curves = np.argwhere(thin(numbers) & inside)
    curves = curves[distances[tuple(curves.T)] <= _seen(curves, window, export)]
    bare = np.ones(len(present) + 1, bool)
    bare[0] = bare[numbers[tuple(curves.T)]] = False
    deepest = _deepest(numbers, distances, bare[numbers] & inside)
    voxels = np.concatenate([curves, deepest])
    radii, seen = distances[tuple(voxels.T)], _seen(voxels, window, export)
    found = np.empty(len(voxels), POINT)
    found["part"] = present[numbers[tuple(voxels.T)] - 1]
    found["voxel"] = voxels + begin
    found["radius"] = np.minimum(radii, seen)
    found["certain"] = (np.arange(len(voxels)) < len(curves)) | (radii > seen)
    return found


def _numbered(labels: NDArray[np.uint64], present: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return labels with the numbers 1, 2, 3 ... in the order of `present`, and 0 for all others."""
    table = {0: 0} | {label: number for number, label in enumerate(present.tolist(), 1)}
    kept = fastremap.mask_except(labels, present.tolist())
    return fastremap.remap(kept, table, in_place=True).astype(np.uint32)


def _seen(voxels: NDArray[np.int64], window: Sequence[slice], export: Export) -> NDArray[np.float64]:
    """Return up to which distance from voxels (n, 3) of a window all is in it that is in the volume, in nm (n,)."""
    seen = np.full(len(voxels), float(max(np.multiply(export.shape, export.voxel_size))))
    for along, place, size, width in zip(window, voxels.T, export.shape, export.voxel_size, strict=True):
        if along.start > 0:
            seen = np.minimum(seen, (place + 1 - MARGIN) * width)
        if along.stop < size:
            seen = np.minimum(seen, (along.stop - along.start - place - MARGIN) * width)
    return seen


def _deepest(
    numbers: NDArray[np.uint32], distances: NDArray[np.float32], among: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return for each number in some voxels the one that lies deepest, int64 (n, 3)."""
    voxels = np.argwhere(among)
    voxels = voxels[np.argsort(-distances[among], kind="stable")]
    return voxels[np.unique(numbers[tuple(voxels.T)], return_index=True)[1]]


def _whole(points: NDArray[Any], export: Export) -> Skeleton:
    """Return the skeleton of one segment, given all its points as POINT (n,)."""
    trees, diagonal = [], float(np.linalg.norm(export.voxel_size))
    for _, numbers in groups(points["part"]):
        part = points[numbers]
        part = part[part["certain"]] if part["certain"].any() else part[[part["radius"].argmax()]]
        tree = join(trace(part["voxel"], export.voxel_size, export.offset, part["radius"]))
        trees.append(smooth(prune(tree, diagonal), diagonal / 2))
    return gather(trees)
