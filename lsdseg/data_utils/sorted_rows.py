"""Rows that are sorted by a key, in Parquet files of any length, which are read and written group by group.

Parts of a volume each know something of the same key, such as how many voxels of a segment lie in them. `merged` puts
together what they know, in a memory that depends on the number of parts only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lsdseg.errors import UserError
from lsdseg.files import write_whole

GROUP = 2**13  # rows that are read at once

# Name of a column -> its values, (n,).
Columns = dict[str, NDArray[Any]]


class Kind(NamedTuple):
    """What rows hold, and what becomes of those with the same key.

    Attributes:
        key: the columns that rows are sorted by, uint64.
        values: every other column -> its type, and what puts the values of rows with the same key together.
    """

    key: tuple[str, ...]
    values: Mapping[str, tuple[type[np.generic], np.ufunc]]

    @property
    def types(self) -> dict[str, type[np.generic]]:
        """Every column -> its type."""
        return dict.fromkeys(self.key, np.uint64) | {name: dtype for name, (dtype, _) in self.values.items()}

    @property
    def schema(self) -> pa.Schema:
        """The columns of a file."""
        return pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in self.types.items()])


def reduced(kind: Kind, parts: Sequence[Columns]) -> Columns:
    """Put rows in any order together, and sort them; then each key occurs once."""
    rows = {name: np.concatenate([part[name] for part in parts], dtype=dtype) for name, dtype in kind.types.items()}
    order = np.lexsort([rows[name] for name in reversed(kind.key)])
    keys = {name: rows[name][order] for name in kind.key}
    differs = np.ones(len(order), bool)
    differs[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys.values()])
    first = np.flatnonzero(differs)
    result: Columns = {name: key[first] for name, key in keys.items()}
    for name, (_, together) in kind.values.items():
        result[name] = together.reduceat(rows[name][order], first) if len(first) else rows[name]
    return result


def merged(kind: Kind, parts: Iterable[Iterator[Columns]]) -> Iterator[Columns]:
    """Put sorted parts together.

    Args:
        kind: of their rows.
        parts: each gives its rows in batches, sorted, with every key once.

    Yields:
        The rows of all, in batches, sorted, with every key once. One batch of each part is in memory at a time.
    """
    heads = [(batch, part) for part in parts for batch in _next(part)]
    while heads:
        # No part has more rows up to this key than those that are in memory.
        last = min(tuple(batch[name][-1] for name in kind.key) for batch, _ in heads)
        taken, left = [], []
        for batch, part in heads:
            count = _count_up_to([batch[name] for name in kind.key], last)
            taken.append(_slice(batch, 0, count))
            rest = [_slice(batch, count, None)] if count < _length(batch) else _next(part)
            left += [(batch, part) for batch in rest]
        heads = left
        yield reduced(kind, taken)


def regrouped(batches: Iterable[Columns], size: int) -> Iterator[Columns]:
    """Divide the same rows into batches that all have `size` rows, but for the last one."""
    waiting: list[Columns] = []
    for batch in batches:
        waiting.append(batch)
        if (rows := sum(map(_length, waiting))) >= size:
            together = _together(waiting)
            whole = rows - rows % size
            yield from (_slice(together, start, start + size) for start in range(0, whole, size))
            waiting = [_slice(together, whole, None)] if whole < rows else []
    if waiting:
        yield _together(waiting)


def write_rows(path: Path, schema: pa.Schema, batches: Iterable[Columns]) -> int:
    """Write rows to a file, which appears whole or not at all. NaN is null where the schema allows it.

    Returns:
        How many there are.
    """
    encodings = {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_integer(field.type)}
    rows = 0
    with (
        write_whole(path) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding=encodings,
            write_page_checksum=True,
        ) as writer,
    ):
        for group in regrouped(batches, GROUP):
            arrays = [pa.array(group[field.name], field.type, from_pandas=field.nullable) for field in schema]
            writer.write_table(pa.table(arrays, schema=schema))
            rows += _length(group)
    return rows


def read_rows(path: Path, remedy: str, names: Sequence[str] | None = None) -> Iterator[Columns]:
    """Read rows from a file, group by group.

    Args:
        path: the file.
        remedy: what to do if it is damaged.
        names: columns to read. None: all.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number, columns=names, use_threads=False)
                yield {name: group[name].to_numpy() for name in group.column_names}
    except Exception as error:  # pyarrow raises what it likes at a damaged file
        raise _damaged(path, error, remedy) from error


def count_rows(path: Path, remedy: str) -> int:
    """Return how many rows a file has, by its footer.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception as error:
        raise _damaged(path, error, remedy) from error


def _damaged(path: Path, error: Exception, remedy: str) -> UserError:
    return UserError(f"{path} cannot be read ({' '.join(str(error).split()):.200}): {remedy}")


def _next(part: Iterator[Columns]) -> list[Columns]:
    """The next batch of a part that has rows, in a list, which is empty if there is none."""
    return next(([batch] for batch in part if _length(batch)), [])


def _count_up_to(keys: Sequence[NDArray[np.uint64]], last: Sequence[np.uint64]) -> int:
    """How many of the sorted keys, given by their columns, come before another key or are it."""
    low, high = 0, len(keys[0])
    for column, value in zip(keys, last, strict=True):
        low, high = (low + int(np.searchsorted(column[low:high], value, side)) for side in ("left", "right"))
    return high


def _together(batches: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _slice(batch: Columns, start: int, stop: int | None) -> Columns:
    return {name: column[start:stop] for name, column in batch.items()}


def _length(batch: Columns) -> int:
    return len(next(iter(batch.values())))
