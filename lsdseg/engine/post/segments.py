"""What a segmentation holds: how large its segments are, where they lie, and which touch.

Each block counts what it sees. What all blocks know is put together in a tree of blocks, since a segment may lie in any
number of them, and all segments together may not fit into memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

import fastremap
import numba
import numpy as np
from numpy.typing import NDArray

from lsdseg.data_utils.segment_tables import AXES, NEIGHBORS, PARTS, SEGMENTS
from lsdseg.data_utils.sorted_rows import Columns, merged, read_rows, reduced, write_rows
from lsdseg.engine.post.block_tree import Position, TreeFiles
from lsdseg.engine.post.graph import Edges

SLAB = 2**24  # voxels of a volume in memory that are looked at at a time
REMEDY = "run 05_extract_segmentation_from_lut.py with DATA.DROP_DS_MONGOTABLE True"

Ids = NDArray[np.uint64]


def segments_in(
    labels: Ids, begin: Sequence[int], fragments: Ids | None = None, edges: Edges | None = None
) -> dict[str, Columns]:
    """Count what a box holds of each segment.

    A face between two voxels belongs to the box of the voxel that comes after it.

    Args:
        labels: uint64 (z + 1, y + 1, x + 1), segments; 0 is background. Those with index 0 along an axis lie before the
            box, and are 0 where the volume begins.
        begin: of the box in the volume, in voxels, z, y, x.
        fragments: uint64 (n,), for each fragment in the box its segment. None: fragments are not counted.
        edges: pairs of segments and scores, uint64, uint64 and float32 (m,), in any order.

    Returns:
        For each of `PARTS` its rows, sorted.
    """
    inner = fastremap.unique(labels[1:, 1:, 1:]) if fragments is None else fragments
    ids, counts = np.unique(inner[inner > 0], return_counts=True)
    voxels = np.zeros(len(ids), np.int64)
    first, last, sums = (np.zeros((3, len(ids)), np.int64) for _ in range(3))
    first[:] = np.iinfo(np.int64).max
    pairs, faces = _scan(labels, ids, voxels, first, last, sums)
    found: Columns = {"id": ids, "voxels": voxels, "fragments": counts * (fragments is not None)}
    for axis, low, high, total, start in zip(AXES, first, last, sums, begin, strict=True):
        found |= {f"begin_{axis}": low + start, f"end_{axis}": high + start, f"sum_{axis}": total + start * voxels}
    (a, b), faces = pairs[faces > 0].T, faces[faces > 0]
    touching: Columns = {"segment_a": a, "segment_b": b, "faces": faces, "score": np.full(len(a), np.nan, np.float32)}
    return {SEGMENTS: found, NEIGHBORS: reduced(PARTS[NEIGHBORS], [touching, *_scored(edges)])}


def segments_of_volume(labels: Ids, fragments: Ids | None = None) -> dict[str, list[Columns]]:
    """Count what a volume in memory holds of each segment.

    Args:
        labels: uint64 (z, y, x), segments; 0 is background.
        fragments: uint64 (z, y, x), ids 0..n, each of them within one segment. None: they are not counted.

    Returns:
        For each of `PARTS` its rows in batches, sorted, as `write_tables` takes them.
    """
    depth = max(1, SLAB // max(labels[0].size, 1))
    segment_of = np.zeros(0 if fragments is None else int(fragments.max(initial=0)) + 1, np.uint64)
    parts: list[dict[str, Columns]] = []
    for start in range(0, len(labels), depth):
        box = np.pad(labels[max(0, start - 1) : start + depth], [(int(start == 0), 0), (1, 0), (1, 0)])
        parts.append(segments_in(box, (start, 0, 0)))
        if fragments is not None:
            segment_of[fragments[start : start + depth]] = labels[start : start + depth]
    found = {kind: reduced(PARTS[kind], [part[kind] for part in parts]) for kind in PARTS}
    ids, counts = np.unique(segment_of[1:], return_counts=True)
    segments = found[SEGMENTS]
    segments["fragments"][segments["id"].searchsorted(ids[ids > 0])] = counts[ids > 0]
    return {kind: [rows] for kind, rows in found.items()}


@dataclass(frozen=True)
class SegmentTree(TreeFiles):
    """The files of a tree over a grid of blocks, which puts together what the blocks know of segments.

    A block has one file of each kind, and a node above a folder with one for each range of ids of which it knows any.

    Attributes:
        width: how many ids are in a range.
    """

    width: int
    suffix: ClassVar[str] = ".parquet"

    def write_block(self, position: Position, found: Mapping[str, Columns]) -> None:
        """Keep what a block holds, see `segments_in`."""
        for kind in PARTS:
            write_rows(self.file(0, kind, position), PARTS[kind].schema, [found[kind]])

    def merge_node(self, level: int, position: Position) -> None:
        """Put together what the nodes below a node know. Without any, it has nothing to do.

        Raises:
            UserError: a file is damaged.
        """
        below = list(self.below(level, position))
        for kind in PARTS:
            rows = merged(PARTS[kind], [self._rows(kind, level - 1, place) for place in below])
            pieces = (piece for batch in rows for piece in _in_ranges(batch, PARTS[kind].key[0], self.width))
            for number, of_range in groupby(pieces, itemgetter(0)):
                file = self._file_of_range(level, kind, position, number)
                write_rows(file, PARTS[kind].schema, (batch for _, batch in of_range))

    def ranges(self, level: int) -> list[int]:
        """The numbers of the ranges of which the nodes of a level know any segments; 0 stands for all ids in blocks."""
        files = (file for place in self.all_nodes(level) for file in self._files(SEGMENTS, level, place))
        return sorted({int(file.stem) if level else 0 for file in files})

    def merge_range(self, level: int, number: int) -> dict[str, Iterator[Columns]]:
        """Put together what all nodes of a level know of a range.

        Returns:
            For each of `PARTS` its rows in batches, sorted, as `write_tables` takes them.

        Raises:
            UserError: while they are read, if a file is damaged.
        """
        places, found = self.all_nodes(level), dict[str, Iterator[Columns]]()
        for kind in PARTS:
            files = [self._file_of_range(level, kind, place, number) for place in places]
            found[kind] = merged(PARTS[kind], [read_rows(file, REMEDY) for file in files if file.is_file()])
        return found

    def has(self, level: int, position: Position) -> bool:
        """Return whether a node has anything."""
        return bool(self._files(SEGMENTS, level, position))

    def _file_of_range(self, level: int, kind: str, position: Position, number: int) -> Path:
        file = self.file(level, kind, position)
        return file.with_suffix("") / f"{number}{self.suffix}" if level else file

    def _files(self, kind: str, level: int, position: Position) -> list[Path]:
        """The files of a node, in the order of their ids."""
        file = self.file(level, kind, position)
        if level:
            return sorted(file.with_suffix("").glob(f"*{self.suffix}"), key=lambda found: int(found.stem))
        return [file] if file.is_file() else []

    def _rows(self, kind: str, level: int, position: Position) -> Iterator[Columns]:
        return (batch for file in self._files(kind, level, position) for batch in read_rows(file, REMEDY))


def _in_ranges(batch: Columns, key: str, width: int) -> Iterator[tuple[int, Columns]]:
    """Divide a sorted batch into ranges of ids: the number of each, and its rows. A block's first id is 1."""
    numbers = (batch[key] - np.uint64(1)) // np.uint64(width)
    starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])).tolist()
    for start, end in pairwise([*starts, len(numbers)]):
        yield int(numbers[start]), {name: column[start:end] for name, column in batch.items()}


def _scored(edges: Edges | None) -> Iterator[Columns]:
    """Rows of neighbors that say the scores of edges between segments, but count no faces."""
    if edges is not None:
        u, v, scores = edges
        between = (u != v) & ~np.isnan(scores)
        a, b = np.minimum(u, v)[between], np.maximum(u, v)[between]
        yield {"segment_a": a, "segment_b": b, "faces": np.zeros(len(a), np.int64), "score": scores[between]}


@numba.njit(cache=True)
def _scan(
    labels: Ids,
    ids: Ids,
    voxels: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    sums: NDArray[np.int64],
) -> tuple[Ids, NDArray[np.int64]]:
    """Go through the runs of equal labels along x, and count them in the arrays that are passed, (n,) and (3, n).

    Returns a hash table: pairs of ids that touch, (m, 2), and across how many faces, 0 where it is empty.
    """
    pairs, faces, count = np.empty((2**12, 2), np.uint64), np.zeros(2**12, np.int64), 0
    depth, height, width = labels.shape
    for z in range(1, depth):
        for y in range(1, height):
            row, before = labels[z, y], (labels[z - 1, y], labels[z, y - 1])
            x = 1
            while x < width:
                label, end = row[x], x + 1
                while end < width and row[end] == label:
                    end += 1
                if label == 0:
                    x = end
                    continue
                n = np.searchsorted(ids, label)
                length = end - x
                voxels[n] += length
                sums[0, n] += (z - 1) * length
                sums[1, n] += (y - 1) * length
                sums[2, n] += (x + end - 3) * length // 2
                first[0, n], last[0, n] = min(first[0, n], z - 1), max(last[0, n], z)
                first[1, n], last[1, n] = min(first[1, n], y - 1), max(last[1, n], y)
                first[2, n], last[2, n] = min(first[2, n], x - 1), max(last[2, n], end - 1)
                if len(faces) < 2 * (count + 2 * length + 1):
                    pairs, faces = _with_room(pairs, faces, 2 * (count + 2 * length + 1))
                count += _touch(pairs, faces, label, row[x - 1], 1)
                for other in before:
                    at = x
                    while at < end:
                        until = at + 1
                        while until < end and other[until] == other[at]:
                            until += 1
                        count += _touch(pairs, faces, label, other[at], until - at)
                        at = until
                x = end
    return pairs, faces


@numba.njit(cache=True)
def _touch(pairs: Ids, faces: NDArray[np.int64], label: np.uint64, other: np.uint64, count: int) -> int:
    """Add faces between two labels to a hash table, whose size is a power of 2; returns how many pairs are new."""
    if other == 0 or other == label:
        return 0
    a, b = min(label, other), max(label, other)
    mixed = ((a * np.uint64(0x9E3779B97F4A7C15)) ^ b) * np.uint64(0xBF58476D1CE4E5B9)
    last = np.uint64(len(faces) - 1)
    at = (mixed >> np.uint64(32)) & last
    while faces[at] and (pairs[at, 0] != a or pairs[at, 1] != b):
        at = (at + np.uint64(1)) & last
    new = int(faces[at] == 0)
    pairs[at, 0], pairs[at, 1] = a, b
    faces[at] += count
    return new


@numba.njit(cache=True)
def _with_room(pairs: Ids, faces: NDArray[np.int64], least: int) -> tuple[Ids, NDArray[np.int64]]:
    """Copy a hash table to a larger one."""
    size = len(faces)
    while size < least:
        size *= 2
    more_pairs, more_faces = np.empty((size, 2), np.uint64), np.zeros(size, np.int64)
    for n in np.flatnonzero(faces):
        _touch(more_pairs, more_faces, pairs[n, 0], pairs[n, 1], faces[n])
    return more_pairs, more_faces
