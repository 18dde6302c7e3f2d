"""Tables of the segments of a segmentation, in Parquet files beside its zarr.

SAMPLE.segments/SEGMENTATION/segments/000000/000000000/000000.parquet     one row for each segment, sorted by id
SAMPLE.segments/SEGMENTATION/neighbors/000000/000000000/000000.parquet    one row for each pair that touches, sorted
SAMPLE.segments/SEGMENTATION/record.json                                  of which segmentation they are; written last

The folders are the thousands and the number of a range of ids. In a small volume, one range has all ids. The rows of
all files are sorted if these are read in the order of their names. A file has at most a quarter of a million rows.
Tables of a segmentation that was made anew since are refused: `require_tables`.
"""

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from funlib.persistence import Array
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.layout import segments_folder
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.records import Record, identity
from lsdseg.data_utils.sorted_rows import Columns, Kind, count_rows, read_rows, regrouped, write_rows
from lsdseg.data_utils.volumes import open_array
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, explain_os_errors, read_json, write_whole

SEGMENTS, NEIGHBORS = "segments", "neighbors"
RECORD = "record.json"
ROWS_IN_FILE = 2**18
RANGES_IN_FOLDER = 1000
AXES = "zyx"
MAKE_AGAIN = "make the segmentation again, in blocks by 05 with DATA.DROP_DS_MONGOTABLE True"

# What a part of a volume knows of its segments. Places are in voxels from the first one of the volume: `begin` and
# `end`, which is exclusive, of a bounding box, and the sum of the places of all voxels.
PARTS = {
    SEGMENTS: Kind(
        ("id",),
        {
            "voxels": (np.int64, np.add),
            **{f"begin_{axis}": (np.int64, np.minimum) for axis in AXES},
            **{f"end_{axis}": (np.int64, np.maximum) for axis in AXES},
            **{f"sum_{axis}": (np.int64, np.add) for axis in AXES},
            "fragments": (np.int64, np.add),
        },
    ),
    NEIGHBORS: Kind(("segment_a", "segment_b"), {"faces": (np.int64, np.add), "score": (np.float32, np.fmin)}),
}


class Volume(NamedTuple):
    """Where segments lie.

    Attributes:
        shape: in voxels, z, y, x.
        voxel_size: in nm.
        offset: in nm.
    """

    shape: NDArray[np.int64]
    voxel_size: NDArray[np.float64]
    offset: NDArray[np.float64]

    @classmethod
    def of(cls, array: Array) -> "Volume":
        """The volume of an array, (z, y, x)."""
        return cls(np.array(array.shape), np.array(voxel_size_nm(array), float), np.array(offset_nm(array), float))


def write_tables(
    output: Path, dataset: str, array: Array, step: str, parts: Mapping[str, Iterable[Columns]]
) -> dict[str, int]:
    """Write the tables of a segmentation, in place of those that are there.

    Args:
        output: the zarr.
        dataset: the segmentation.
        array: the same, open; what is written is of this one, whatever its name is now.
        step: what makes them.
        parts: for each of PARTS its rows in batches, sorted, with every key once.

    Returns:
        For each of PARTS how many rows were written.
    """
    remove_tables(output, dataset)
    write_range(output, dataset, array, 0, parts)
    return finish_tables(output, dataset, array, step)


def write_range(output: Path, dataset: str, array: Array, number: int, parts: Mapping[str, Iterable[Columns]]) -> None:
    """Write the rows of a range of ids: of all ids, or of those that come after the ids of lower numbers.

    Args:
        output, dataset, array, parts: as for `write_tables`.
        number: of the range, from 0. Writing it again gives the same files.
    """
    folder, volume = segments_folder(output, dataset), Volume.of(array)
    _write(folder / SEGMENTS, number, _SEGMENTS, (_finished_segments(rows, volume) for rows in parts[SEGMENTS]))
    _write(folder / NEIGHBORS, number, _NEIGHBORS, map(_finished_neighbors, parts[NEIGHBORS]))


def finish_tables(output: Path, dataset: str, array: Array, step: str) -> dict[str, int]:
    """Record that all ranges are written, and of which segmentation they are.

    Args:
        output, dataset, array, step: as for `write_tables`.

    Returns:
        For each of PARTS how many rows there are.
    """
    folder = segments_folder(output, dataset)
    for file in folder.rglob(f"*{PARTIAL}"):  # of writers that were killed
        file.unlink(missing_ok=True)
    rows = {kind: _count(folder / kind) for kind in PARTS}
    record = Record(step, {dataset: identity(array)}, {})
    with write_whole(folder / RECORD) as file:
        file.write_text(json.dumps(record.to_json() | {"rows": rows}), encoding="utf-8")
    return rows


def remove_tables(output: Path, dataset: str) -> None:
    """Remove the tables of a segmentation, if there are any."""
    folder = segments_folder(output, dataset)
    with explain_os_errors(folder):
        (folder / RECORD).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)


def require_tables(output: Path, dataset: str) -> Path:
    """Check that the tables of a segmentation are there, whole, and of the segmentation that is there now.

    Returns:
        Their folder, for `read_table`.

    Raises:
        UserError: they are not.
    """
    folder = segments_folder(output, dataset)
    if not (folder / RECORD).is_file():
        raise UserError(f"there are no tables of the segments of {dataset} in {folder}: {MAKE_AGAIN}")
    content = read_json(folder / RECORD, MAKE_AGAIN)
    record, rows = Record.from_json(content), content.get("rows")
    if record is None or record.inputs != {dataset: identity(open_array(output, dataset))}:
        raise UserError(f"{folder} is of another {dataset} than the one in {output}: {MAKE_AGAIN}")
    for kind in PARTS:
        found = _count(folder / kind)
        if not isinstance(rows, dict) or found != rows.get(kind):
            raise UserError(f"{folder / kind} has {found} rows, and others were written: {MAKE_AGAIN}")
    return folder


def has_tables(output: Path, dataset: str) -> bool:
    """Return whether the tables of a segmentation can be used; see `require_tables`."""
    try:
        return bool(require_tables(output, dataset))
    except UserError:
        return False


def find_tables(output: Path, dataset: str) -> Path | None:
    """Return the folder of the tables of a segmentation, None without any that can be used. Say why others cannot."""
    if not segments_folder(output, dataset).is_dir():
        return None
    try:
        return require_tables(output, dataset)
    except UserError as error:
        print(f"sizes of segments are left out: {error}")
        return None


def find_segment(folder: Path, segment: int) -> dict[str, Any] | None:
    """Find the row of a segment, without reading more than one file; None if there is no such segment.

    Args:
        folder: see `require_tables`.
        segment: its id.

    Raises:
        UserError: a file is damaged.
    """
    files = _files(folder / SEGMENTS)
    number = bisect_right(files, segment, key=_first_id) - 1
    for batch in read_rows(files[number], MAKE_AGAIN) if number >= 0 else ():
        row = int(np.searchsorted(batch["id"], np.uint64(segment)))
        if row < len(batch["id"]):
            return {name: column[row].item() for name, column in batch.items()} if batch["id"][row] == segment else None
    return None


def _first_id(file: Path) -> int:
    return next((int(batch["id"][0]) for batch in read_rows(file, MAKE_AGAIN, ["id"])), 0)


def read_table(folder: Path, kind: str, names: Sequence[str] | None = None) -> Iterator[Columns]:
    """Read a table in batches, sorted.

    Args:
        folder: see `require_tables`.
        kind: SEGMENTS or NEIGHBORS.
        names: columns to read. None: all.

    Raises:
        UserError: a file is damaged.
    """
    return (batch for file in _files(folder / kind) for batch in read_rows(file, MAKE_AGAIN, names))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.parquet"))


def _count(folder: Path) -> int:
    return sum(count_rows(file, MAKE_AGAIN) for file in _files(folder))


def _write(folder: Path, number: int, schema: pa.Schema, batches: Iterable[Columns]) -> None:
    """Write the rows of a range to as many files as they need; if there are none, its columns."""
    rows, files = 0, folder / f"{number // RANGES_IN_FOLDER:06}" / f"{number:09}"
    with tqdm(desc=folder.name, unit="row", unit_scale=True, delay=2) as bar:
        for file, batch in enumerate(regrouped(batches, ROWS_IN_FILE)):
            rows += write_rows(files / f"{file:06}.parquet", schema, [batch])
            bar.update(rows - bar.n)
    if not rows:
        write_rows(files / f"{0:06}.parquet", schema, [])


def _finished_segments(rows: Columns, volume: Volume) -> Columns:
    """Turn what all parts know of segments into rows of the table."""
    columns: Columns = {"id": rows["id"], "voxels": rows["voxels"]}
    outer = np.zeros(len(rows["id"]), bool)
    placed = list(zip(AXES, *volume, strict=True))
    for end in ("begin", "end"):
        columns |= {f"{end}_{axis}": offset + rows[f"{end}_{axis}"] * size for axis, _, size, offset in placed}
    for axis, length, size, offset in placed:
        columns[f"center_{axis}"] = offset + (rows[f"sum_{axis}"] / rows["voxels"] + 0.5) * size
        outer |= (rows[f"begin_{axis}"] == 0) | (rows[f"end_{axis}"] == length)
    fragments = np.where(rows["fragments"] > 0, rows["fragments"].astype(np.float64), np.nan)
    return columns | {"fragments": fragments, "touches_face": outer}


def _finished_neighbors(rows: Columns) -> Columns:
    """Leave out pairs that the graph joins but that share no face."""
    return {name: column[rows["faces"] > 0] for name, column in rows.items()}


def _schema(**types: Any) -> pa.Schema:
    nullable = ("fragments", "score")
    return pa.schema([pa.field(name, dtype, nullable=name in nullable) for name, dtype in types.items()])


_NANOMETERS = {f"{what}_{axis}": pa.float64() for what in ("begin", "end", "center") for axis in AXES}
_SEGMENTS = _schema(id=pa.uint64(), voxels=pa.int64(), **_NANOMETERS, fragments=pa.int64(), touches_face=pa.bool_())
_NEIGHBORS = _schema(segment_a=pa.uint64(), segment_b=pa.uint64(), faces=pa.int64(), score=pa.float32())
