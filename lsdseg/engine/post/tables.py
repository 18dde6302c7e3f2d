"""Look-up tables (LUTs) from fragments to segments.

An edge says at which thresholds its two fragments are one segment, and nothing else about it is needed. So each
threshold has a union-find, edges stream through all of them once, in any order, and none is kept.
"""

import json
import os
import shutil
import struct
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsdseg.data_utils.layout import lut_path
from lsdseg.data_utils.records import ATTRIBUTE, Record
from lsdseg.engine.post.block_tree import Position, numbered
from lsdseg.engine.post.graph import Edges
from lsdseg.errors import UserError
from lsdseg.files import read_json, write_whole

KEY = "fragment_segment_lut"
RECORD = "record.json"  # in the folder of a LUT in parts, once all are there
RUN_AGAIN = "run 04_find_segments_full.py again"


def connected_segments(
    node_ids: ArrayLike, edge_batches: Iterable[Edges], thresholds: Sequence[float]
) -> dict[float, NDArray[np.uint64]]:
    """Segments at every threshold: the connected components of the edges with a score up to it.

    Memory is proportional to nodes times thresholds, whatever the number of edges. Scores and thresholds are compared
    as float32.

    Args:
        node_ids: uint64 (n,), all fragments, ascending.
        edge_batches: iterable of (u, v, scores), uint64, uint64 and float32 (m,), in any order; NaN joins nothing.
        thresholds: scores up to which to join.

    Returns:
        {threshold: uint64 (2, n)}: ``node_ids``, and below each the segment, which is the smallest id in it.

    Raises:
        ValueError: ``node_ids`` that do not ascend, or edges between fragments that are not among them.
    """
    ids = np.asarray(node_ids, np.uint64)
    if (ids[1:] <= ids[:-1]).any():
        raise ValueError("node ids must ascend, without duplicates")
    ascending = sorted(thresholds)
    levels = np.asarray(ascending, np.float32)
    nodes = np.arange(len(ids), dtype=np.int32 if len(ids) < 2**31 else np.int64)
    parents = np.tile(nodes, (len(ascending), 1))
    runs = _runs(ids)
    unknown = 0
    for u, v, scores in edge_batches:
        from_node, unknown_u = _translate(u, ids, nodes, runs)
        to_node, unknown_v = _translate(v, ids, nodes, runs)
        unknown += unknown_u + unknown_v
        if not unknown:
            _join(parents, from_node, to_node, np.searchsorted(levels, scores))
    if unknown:
        raise ValueError(f"{unknown} ends of edges are at fragments that are not among the {len(ids)} nodes")
    for parent in parents:
        _point_to_roots(parent)
    return {t: np.stack([ids, ids[roots]]) for t, roots in zip(ascending, parents, strict=True)}


def relabel(fragments: ArrayLike, lut: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Segments of fragments; 0 stays 0.

    Only the rows of the LUT from the smallest to the largest id are read, so it may be larger than memory. Fast where
    ids are consecutive, as those of a block are.

    Args:
        fragments: array of unsigned ids, of any shape.
        lut: uint64 (2, n), fragments, ascending, and their segments; `load_lut` maps one from disk.

    Returns:
        uint64, the shape of ``fragments``.

    Raises:
        ValueError: ids that are not in the LUT, so it was made from other fragments.
    """
    voxels = np.asarray(fragments, np.uint64)
    last = voxels.max(initial=0)
    first = voxels.min(initial=last, where=voxels > 0)
    rows = lut[:, bisect_left(lut[0], first) : bisect_right(lut[0], last)]
    ids, segments = np.insert(rows, 0, 0, axis=1)
    result, unknown = _translate(voxels.ravel(), ids, segments, _runs(ids))
    if unknown:
        raise ValueError(f"{unknown} voxels are of fragments that are not in the LUT: it was made from other fragments")
    return result.reshape(voxels.shape)


def look_up(fragments: ArrayLike, lut: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Segments of a few fragments that may be anywhere in a large LUT; as `relabel`, but 0 is not in a LUT.

    Args:
        fragments: unsigned ids, (n,).
        lut: uint64 (2, n).

    Raises:
        ValueError: ids that are not in the LUT.
    """
    ids = np.asarray(fragments, np.uint64)
    rows = np.searchsorted(lut[0], ids)
    inside = rows < lut.shape[1]
    known = np.zeros(len(ids), bool)
    known[inside] = lut[0, rows[inside]] == ids[inside]
    if not known.all():
        raise ValueError(f"{np.count_nonzero(~known)} ends of edges are at fragments that are not in the LUT")
    return np.asarray(lut[1, rows])


def save_lut(path: Path | str, lut: NDArray[np.uint64], record: Record | None = None) -> None:
    """Write a LUT, uint64 (2, n), as an .npz file; it has its name only when it is complete.

    Not compressed, so that `load_lut` can map it. What it was made from is kept beside it, as text.
    """
    arrays: dict[str, Any] = {KEY: lut}
    if record is not None:
        arrays[ATTRIBUTE] = np.array(json.dumps(record.to_json()))
    with write_whole(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def load_lut(path: Path | str) -> NDArray[np.uint64]:
    """A LUT, uint64 (2, n), from an .npz file: mapped, not read, unless it was compressed by someone else.

    Its values are not looked at; `check_lut` does that.

    Raises:
        UserError: there is no such file, or it is not a LUT.
    """
    try:
        return _map_lut(path)
    except FileNotFoundError as error:
        raise UserError(f"no look-up table {path}; run 04_find_segments_full.py first") from error
    except Exception as error:  # zipfile and numpy raise what they like at a damaged file
        raise _no_lut(path) from error


def _map_lut(path: Path | str) -> NDArray[np.uint64]:
    with open(path, "rb") as file:
        entry = zipfile.ZipFile(file).getinfo(f"{KEY}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            lut = np.asarray(np.load(path, allow_pickle=False)[KEY])
            _require_lut(lut.shape, lut.dtype)
            return lut
        file.seek(entry.header_offset + 26)  # there, a header of 30 bytes ends with the lengths of two more fields
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        begin = file.tell()
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        _require_lut(shape, dtype)
        if file.tell() - begin + 2 * shape[1] * dtype.itemsize != entry.file_size:
            raise ValueError("another size than the header says")
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")


def _require_lut(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Check before any value is read: of objects, the values would be addresses in memory."""
    if dtype != np.uint64 or len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"{dtype} {shape} instead of uint64 (2, n)")


def _no_lut(path: Path | str) -> UserError:
    return UserError(f"{path} is not a look-up table; {RUN_AGAIN}")


def check_lut(path: Path | str, lut: NDArray[np.uint64]) -> None:
    """Check the values of a LUT, and the checksum of its file.

    Args:
        path: its file.
        lut: uint64 (2, n), see `load_lut`.

    Raises:
        UserError: the file is damaged, fragments do not ascend, or a segment does not have the id of one of its own.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:
        raise _no_lut(path) from error
    if damaged:
        raise UserError(f"{path} is damaged: its checksum is wrong; {RUN_AGAIN}")
    check_fragments(path, lut)
    ids, segments = np.asarray(lut)
    own, unknown = _translate(segments, ids, segments, _runs(ids))
    if unknown or (own != segments).any():
        raise UserError(f"{path} is damaged: segments in it do not have the id of one of their fragments; {RUN_AGAIN}")


def check_fragments(path: Path | str, lut: NDArray[np.uint64]) -> None:
    """Check that the fragments of a LUT ascend; raise UserError if not."""
    ids = np.asarray(lut[0])
    if (ids[:1] == 0).any() or (ids[1:] <= ids[:-1]).any():
        raise UserError(f"the fragments in {path} do not ascend: {RUN_AGAIN}")


def existing_lut(output: Path, merge_function: str, threshold: float) -> Path:
    """Find the LUT of an output for a threshold.

    The published scripts cut hundredths off instead of rounding them: 0.29 is stored a little below 29 hundredths, and
    its table is named 28. Such a table is taken if there is none of the right name.

    Args:
        output: the output zarr.
        merge_function: its name.
        threshold: as 04 was given it.

    Raises:
        UserError: there is none; the message says which there are.
    """
    path = lut_path(output, merge_function, threshold)
    if path.is_file():
        return path
    if lut_record(in_blocks(path)) is not None:
        return in_blocks(path)
    of_published_scripts = lut_path(output, merge_function, int(threshold * 100) / 100)
    if of_published_scripts.is_file() and lut_record(of_published_scripts) is None:
        return of_published_scripts
    start = lut_path(output, merge_function, 0).name.removesuffix("0.npz")
    found = sorted(file.stem.removeprefix(start) for file in path.parent.glob(f"{start}*.npz"))
    there_are = f"there are tables at {', '.join(found)} hundredths" if found else "there are none yet"
    raise UserError(
        f"no look-up table {path}; run 04_find_segments_full.py first, with -mf {merge_function} -th {threshold:g} "
        f"(of {merge_function}, {there_are})"
    )


def in_blocks(path: Path) -> Path:
    """Return the folder that holds a LUT in parts, one for each block, instead of the file `path`."""
    return path.with_suffix("")


def save_part(folder: Path, position: Position, grid: Position, lut: NDArray[np.uint64]) -> None:
    """Write the part of a LUT for the fragments of a block at a position in the grid of blocks."""
    save_lut(folder / numbered(position, grid), lut)


def load_part(folder: Path, position: Position, grid: Position) -> NDArray[np.uint64]:
    """Read the part of a LUT for the fragments of a block; one that has none has no part.

    Raises:
        UserError: it is damaged.
    """
    file = folder / numbered(position, grid)
    if not file.is_file():
        return np.empty((2, 0), np.uint64)
    lut = load_lut(file)
    check_fragments(file, lut)
    return lut


class Lut:
    """A LUT on disk, a file or a folder with parts. What is not asked for is not read.

    Args:
        path: the file or the folder.
        grid: number of blocks along z, y, x.

    Raises:
        UserError: it is missing or damaged.
    """

    def __init__(self, path: Path, grid: Position):
        self._path, self._grid = path, grid
        self._whole = None if path.is_dir() else load_lut(path)

    def of_blocks(self, *positions: Position) -> NDArray[np.uint64]:
        """Return uint64 (2, n), with all fragments of some blocks, and perhaps more.

        Raises:
            UserError: a part is damaged.
        """
        if self._whole is not None:
            return self._whole
        parts = np.concatenate([load_part(self._path, place, self._grid) for place in positions], axis=1)
        ordered: NDArray[np.uint64] = parts[:, np.argsort(parts[0], kind="stable")]
        return ordered


def finish_parts(folder: Path, record: Record) -> None:
    """Record that the LUT in a folder is complete, and what it was made from."""
    with write_whole(folder / RECORD) as partial:
        partial.write_text(json.dumps(record.to_json()), encoding="utf-8")


def remove_lut(path: Path) -> None:
    """Remove the file or the folder of a LUT, if there is one."""
    if path.is_dir():
        (path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def lut_record(path: Path) -> Record | None:
    """Return what a LUT, a file or a folder, was made from, None if it does not say: others made it."""
    if path.is_dir():
        file = path / RECORD
        return Record.from_json(read_json(file, RUN_AGAIN)) if file.is_file() else None
    try:
        with np.load(path) as arrays:
            return Record.from_json(json.loads(str(arrays[ATTRIBUTE])))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _runs(ids: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows (int64) at which runs of consecutive ids start; few of them make looking up fast."""
    return np.flatnonzero(np.append(True, ids[1:] != ids[:-1] + np.uint64(1))[: len(ids)])


def _translate(
    values: NDArray[np.uint64], ids: NDArray[np.uint64], targets: NDArray[Any], runs: NDArray[np.int64]
) -> tuple[NDArray[Any], int]:
    """Targets of values that are looked up in ascending ids, and how many values are not there (their target is 0)."""
    result = np.zeros(len(values), targets.dtype)  # numpy's memory comes in huge pages, twice as fast here as numba's
    values = np.ascontiguousarray(values, np.uint64)
    return result, _fill(result, values, ids, targets, runs, ids[runs])


@numba.njit(cache=True)
def _fill(
    result: NDArray[Any],
    values: NDArray[np.uint64],
    ids: NDArray[np.uint64],
    targets: NDArray[Any],
    starts: NDArray[np.int64],
    start_ids: NDArray[np.uint64],
) -> int:
    """The loop of `_translate`, given the row and the id with which each run starts; returns the count."""
    unknown = 0
    start, first, length = 0, np.uint64(0), np.uint64(0)  # the run of the value before, often that of the next
    for i, value in enumerate(values):
        if value - first >= length:  # also if it is smaller: unsigned numbers wrap around
            run = np.searchsorted(start_ids, value, side="right") - 1
            if run < 0:
                unknown += 1
                continue
            start, first = starts[run], start_ids[run]
            end = starts[run + 1] if run + 1 < starts.size else ids.size
            length = np.uint64(end - start)
            if value - first >= length:
                unknown += 1
                continue
        result[i] = targets[start + np.int64(value - first)]
    return unknown


@numba.njit(cache=True)
def _join(parents: NDArray[Any], u: NDArray[Any], v: NDArray[Any], levels: NDArray[np.int64]) -> None:
    """Join u[i] and v[i] in the forests ``parents[levels[i]:]``; every root is the smallest node of its tree.

    What a forest has joined, all later ones have too, so the first that knows the pair ends the work on an edge.
    """
    for i in range(u.size):
        for level in range(levels[i], len(parents)):
            parent = parents[level]
            x, y = _root(parent, u[i]), _root(parent, v[i])
            if x == y:
                break
            parent[max(x, y)] = min(x, y)


@numba.njit(cache=True)
def _root(parent: NDArray[Any], node: int) -> int:
    """Root of a node, halving the path to it."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@numba.njit(cache=True)
def _point_to_roots(parent: NDArray[Any]) -> None:
    """Let every node point to its root, which is smaller and so already does."""
    for node in range(parent.size):
        parent[node] = parent[parent[node]]
