"""The graph as one Parquet file per block and table: workers never wait for each other, and any file system will do.

Files are named SAMPLE.rag/nodes/0/12/12345.parquet and SAMPLE.rag/edges_hist_quant_75/0/12/12345.parquet. The folders
are the millions and the thousands of the block number, so that none holds more than a thousand entries. A file is
written under a temporary name and then renamed: the rows of a block appear all at once or not at all.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from yacs.config import CfgNode

from lsdseg.data_utils.layout import rag_folder
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, explain_os_errors, write_whole
from lsdseg.rag.store import (
    AGGLOMERATED,
    NODES,
    REMEDY,
    Columns,
    Mode,
    RagStore,
    Record,
    columns_of,
    is_table,
    voxels_in_block,
)

# Streamed batches have at least this many rows, except for the last one: the files of single blocks may be small.
BATCH = 1_000_000
Result = TypeVar("Result")


def open_parquet(uri: str, cfg: CfgNode, output: Path, mode: Mode, fragments: str = "") -> "ParquetStore":
    """Open the graph in the folder SAMPLE.rag beside SAMPLE.zarr. The URI is not used."""
    return ParquetStore(rag_folder(output), voxels_in_block(cfg), mode, fragments)


class ParquetStore(RagStore):
    """The graph in a folder SAMPLE.rag.

    A score of NaN is null in the files, so that other tools see a missing value.

    Args:
        folder: SAMPLE.rag.
        voxels_in_block: number of voxels in a block; see `lsdseg.rag.store`.
        mode: see `RagStore`.
        fragments: id of the fragments that the graph is of; the graph of others is refused. Empty: any.

    Raises:
        UserError: the folder cannot be read or written, or as `RagStore`.
    """

    def __init__(self, folder: Path | str, voxels_in_block: int, mode: Mode = "r", fragments: str = "") -> None:
        self._folder = Path(folder)
        super().__init__(mode, voxels_in_block, fragments=fragments)

    def __repr__(self) -> str:
        return str(self._folder)

    def _tidy(self) -> None:
        """Remove the temporary files of writers that were killed."""
        for file in self._folder.rglob(f"*{PARTIAL}"):
            file.unlink(missing_ok=True)

    def _replace(self, table: str, block: int, columns: Columns) -> None:
        path = self._path(table, block)
        rows = len(next(iter(columns.values())))
        if not rows:
            with explain_os_errors(self._folder / table):
                (self._folder / table).mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
            return
        arrays = [pa.array(column, from_pandas=True) for column in columns.values()]
        if table != NODES:
            arrays.append(pa.array(np.ones(rows, bool)))
        schema = _schema(table)
        # Neighboring ids in a file differ little: storing differences takes a quarter of the space and less time.
        encodings = {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_integer(field.type)}
        with write_whole(path) as partial:
            pq.write_table(
                pa.table(arrays, schema=schema),
                partial,
                compression="zstd",
                use_dictionary=False,
                column_encoding=encodings,
                write_page_checksum=True,
            )

    def _read(self, table: str, first_id: int, last_id: int) -> Columns:
        names = list(columns_of(table))
        voxels = self._voxels_in_block
        files = self._files(table, max(first_id - 1, 0) // voxels, max(last_id - 1, 0) // voxels)
        nothing = _schema(table).empty_table().select(names)
        columns = _to_arrays([nothing, *(_read_file(file, table, names) for file in files)])
        keys = columns[names[0]]
        inside = (keys >= first_id) & (keys <= last_id)
        return columns if inside.all() else {name: column[inside] for name, column in columns.items()}

    def _stream(self, table: str, names: list[str]) -> Iterator[Columns]:
        waiting: list[pa.Table] = []
        rows = 0
        for file in self._files(table):
            waiting.append(_read_file(file, table, names))
            rows += len(waiting[-1])
            if rows >= BATCH:
                yield _to_arrays(waiting)
                waiting, rows = [], 0
        if waiting:
            yield _to_arrays(waiting)

    def _count(self, table: str) -> int:
        return sum(_use(file, lambda parquet: int(parquet.metadata.num_rows)) for file in self._files(table))

    def _tables(self) -> list[str]:
        return [folder.name for folder in self._folder.glob("*") if is_table(folder.name) and folder.is_dir()]

    def _drop(self, table: str) -> None:
        with explain_os_errors(self._folder / table):
            if (self._folder / table).exists():
                shutil.rmtree(self._folder / table)

    def _read_record(self, name: str) -> Record | None:
        path = self._folder / f"{name}.json"
        try:
            record: Record = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error!s:.200}): {REMEDY.format('02 and 03')}") from None
        return record

    def _write_record(self, name: str, record: Record | None) -> None:
        path = self._folder / f"{name}.json"
        if record is None:
            with explain_os_errors(path):
                path.unlink(missing_ok=True)
            return
        with write_whole(path) as partial:
            partial.write_text(json.dumps(record))

    def _path(self, table: str, block: int) -> Path:
        return self._folder / table / str(block // 10**6) / str(block // 1000) / f"{block}.parquet"

    def _files(self, table: str, first: int = 0, last: int | None = None) -> Iterator[Path]:
        """Yield the existing files of blocks first to last, both included, in the order of the blocks."""
        if last is not None and last - first < 1000:
            return (path for path in (self._path(table, block) for block in range(first, last + 1)) if path.is_file())
        return (
            file
            for millions in _numbered_entries(self._folder / table)
            for thousands in _numbered_entries(millions)
            for file in _numbered_entries(thousands)
            if first <= int(file.stem) and (last is None or int(file.stem) <= last)
        )


def _numbered_entries(folder: Path) -> list[Path]:
    """List the entries of a folder that are named by a number, in numerical order. An absent folder has none."""
    return sorted((entry for entry in folder.glob("*") if entry.stem.isdecimal()), key=lambda entry: int(entry.stem))


@cache
def _schema(table: str) -> pa.Schema:
    """Return the columns of a file. Edges are marked as agglomerated, as they are in MongoDB."""
    fields = [(name, pa.from_numpy_dtype(dtype)) for name, dtype in columns_of(table).items()]
    return pa.schema(fields if table == NODES else [*fields, (AGGLOMERATED, pa.bool_())])


def _read_file(path: Path, table: str, names: list[str]) -> pa.Table:
    """Read the named columns of a block's file.

    Raises:
        UserError: the file is damaged or has other columns than the table.
    """

    def read(file: pq.ParquetFile) -> pa.Table:
        if not file.schema_arrow.equals(_schema(table)):
            raise UserError(
                f"{path} has other columns than {', '.join(_schema(table).names)}: {REMEDY.format('02 and 03')}"
            )
        return file.read(names, use_threads=False)

    return _use(path, read)


def _use(path: Path, function: Callable[[pq.ParquetFile], Result]) -> Result:
    """Call a function with an open file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return function(file)
    except UserError:
        raise
    except Exception as error:  # pyarrow raises what it likes at a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason:.200}): {REMEDY.format('02 and 03')}") from None


def _to_arrays(parts: list[pa.Table]) -> Columns:
    """Concatenate tables and return their columns as writable arrays. Null becomes NaN."""
    rows = pa.concat_tables(parts)
    return {name: np.require(rows[name].to_numpy(), requirements="W") for name in rows.column_names}
