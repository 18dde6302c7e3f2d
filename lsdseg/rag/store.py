"""The base class of all region adjacency graph (RAG) stores.

A graph is a few tables of numbers: one of nodes, and one of edges per merge function. They are written block by block.
A store only has to replace the rows of a block, read the rows of an id range, stream a table and drop a table.
`RagStore` builds everything else on these operations.

Fragment ids are `block * voxels_in_block + local id`, with local ids from 1 to voxels_in_block. The fragments of a
block therefore form one id range, and an edge (u < v) belongs to the block of u. Each row is written by exactly one
block, and writing a block again replaces the rows of that block and no others.

To add a store, write a module beside this one and add one entry to `lsdseg.rag.STORES`. The module holds a function
`open_...(uri, cfg, output, mode, fragments)` and the subclass of `RagStore` that it returns. The subclass implements

    _replace, _read, _stream        the rows of a table
    _count                          their number
    _tables, _drop                  the tables
    _read_record, _write_record     what the graph, and each table of edges, was made from
    _tidy                           work that is left until the last block is done
    __repr__                        where the graph is, for messages; without credentials

Three rules hold for all of them. Many processes read and write different blocks at once. A process may be killed at
any moment, and another one then writes the block again: no row of the first attempt may remain. If a file or server
cannot be used, raise a UserError. Values that are read need no check: `RagStore` checks those of all stores, and counts
their rows. `RagStore.__init__` already reads tables and record, so connect before you call it.
For an example, see `lsdseg.rag.parquet`, or `ToyStore` in tests/test_rag.py, which has nothing but these methods.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from yacs.config import CfgNode

from lsdseg.errors import UserError

NODES = "nodes"
EDGES = "edges_"  # followed by the merge function
NODE_COLUMNS: dict[str, type[np.generic]] = {
    "id": np.uint64,
    "center_z": np.int64,
    "center_y": np.int64,
    "center_x": np.int64,
}
EDGE_COLUMNS: dict[str, type[np.generic]] = {"u": np.uint64, "v": np.uint64, "merge_score": np.float32}
PUBLISHED_BLOCK = (256, 256, 256)  # INS_SEGMENT.BLOCK_SIZE of the published scripts
SCORES = (-1e-3, 1 + 1e-3)  # those of all merge functions are in 0..1, but for rounding
AGGLOMERATED = "agglomerated"  # another column of stored edges: True, the score is known

REMEDY = "run {} again, with DATA.DROP_DS_MONGOTABLE True"

Mode = Literal["r", "r+", "x", "w"]
Record = dict[str, Any]
GRAPH = "settings"  # the name of the record of the graph itself; that of a table has the name of the table
ROWS = "rows_"  # followed by the name of a table: the record of how many rows it has
Columns = dict[str, NDArray[Any]]
Ids = NDArray[np.uint64]
Nodes = tuple[Ids, NDArray[np.int64]]
Edges = tuple[Ids, Ids, NDArray[np.float32]]


def voxels_in_block(cfg: CfgNode) -> int:
    """Return the number of voxels in a block, which is the number of fragment ids that a block can assign.

    Where INS_SEGMENT.BLOCK_SIZE is None, blocks are those of a graph that exists, or else of the published scripts.
    """
    return math.prod(cfg.INS_SEGMENT.BLOCK_SIZE or PUBLISHED_BLOCK)


def is_table(name: str) -> bool:
    """Return whether a folder or collection of this name is a table of a graph."""
    return name == NODES or name.startswith(EDGES)


def columns_of(table: str) -> dict[str, type[np.generic]]:
    """Return the names and types of the columns of a table. Id ranges refer to the first column."""
    return NODE_COLUMNS if table == NODES else EDGE_COLUMNS


class RagStore(ABC):
    """The region adjacency graph of one sample: nodes are fragments, edges join fragments that touch.

    There is one set of nodes, and one set of edges per merge function. `str(store)` says where the graph is.
    Every method raises a UserError if the files or the server cannot be read or written.

    Args:
        mode: "r" opens a graph that exists. "r+" also writes, and creates the graph if there is none. "x" creates a
            graph where there is none. "w" drops an existing graph and creates a new one.
        voxels_in_block: number of voxels in a block; see the docstring of this module.
        more: what else must be the same whenever the graph is opened, such as the id of its `fragments`. The store
            keeps it with the graph. What is empty is not compared.

    Raises:
        UserError: there is no graph to read; there is one already; its record says that it was made with other values.
    """

    def __init__(self, mode: Mode, voxels_in_block: int, **more: str) -> None:
        self._voxels_in_block = voxels_in_block
        self._record: Record = {"voxels_in_block": voxels_in_block} | {key: text for key, text in more.items() if text}
        if mode == "w":
            self.drop()
        # Look for tables first: whoever creates a graph writes the record before the first table.
        exists = bool(self._tables())
        recorded = self._record_of(GRAPH)
        if mode == "r" and recorded and isinstance(size := recorded.get("voxels_in_block"), int):
            # To read a graph, one need not know with which blocks it was made.
            self._voxels_in_block = self._record["voxels_in_block"] = size
        if not exists and mode == "r":
            raise UserError(f"there is no graph {self}: run 02_extract_fragments_blockwise.py first")
        if exists and mode == "x":
            raise UserError(
                f"there is a graph {self} already, of other fragments: choose another DATA.DB_NAME to keep it, or set "
                "DATA.DROP_DS_MONGOTABLE True to drop it"
            )
        if not exists:
            self._write_record(ROWS + NODES, None)
            self._write_record(GRAPH, self._record)
        elif recorded is None and mode != "r":
            raise UserError(
                f"the graph {self} was written by other scripts, so it is read-only: "
                "set DATA.DROP_DS_MONGOTABLE True to drop it and start over"
            )
        elif recorded is not None and (
            # A graph of an earlier version does not say all that is said now.
            changes := [
                f"{key} {recorded[key]!s:.100}, now {new}"
                for key, new in self._record.items()
                if recorded.get(key, new) != new
            ]
        ):
            raise UserError(
                f"the graph {self} was made with {'; '.join(changes)}: go back to that INS_SEGMENT.BLOCK_SIZE or "
                "output, choose another DATA.DB_NAME, or set DATA.DROP_DS_MONGOTABLE True to drop it and start over"
            )

    def write_nodes(self, block: int, ids: ArrayLike, centers: ArrayLike) -> None:
        """Replace the nodes of a block.

        Args:
            block: the number of the block, from 0.
            ids: fragment ids, uint64 (n,), in the id range of the block.
            centers: centers of the fragments in nm, int64 (n, 3), in the order z, y, x.

        Raises:
            ValueError: an id lies outside the id range of the block.
        """
        centers = np.asarray(centers).reshape(-1, 3)
        self._write(NODES, block, (ids, *centers.T))

    def write_edges(self, merge_function: str, block: int, u: Ids, v: Ids, scores: ArrayLike) -> None:
        """Replace the edges of a block for one merge function.

        Args:
            merge_function: name of the merge function.
            block: the number of the block, from 0.
            u: first fragment id of each edge, uint64 (m,), in the id range of the block.
            v: second fragment id of each edge, uint64 (m,), larger than u.
            scores: thresholds at which the regions of the two fragments merge, float32 (m,); NaN if they never do.

        Raises:
            ValueError: u is not smaller than v, or lies outside the id range of the block; a score is not in 0..1.
        """
        self._write(EDGES + merge_function, block, (u, v, scores))

    def read_nodes(self, first_id: int, last_id: int) -> Nodes:
        """Read the nodes with ids from first_id to last_id, both included.

        Returns:
            ids: uint64 (n,), in any order.
            centers: int64 (n, 3), in nm and the order z, y, x.
        """
        ids, *centers = self._checked(NODES, self._read(NODES, first_id, last_id)).values()
        return ids, np.stack(centers, axis=1)

    def read_edges(self, merge_function: str, first_id: int, last_id: int) -> Edges:
        """Read the edges of a merge function whose u is from first_id to last_id, both included.

        Returns:
            u: uint64 (m,), in any order.
            v: uint64 (m,), larger than u.
            scores: float32 (m,); NaN where the two fragments never merge.
        """
        table = EDGES + merge_function
        return _edges(self._checked(table, self._read(table, first_id, last_id)))

    def count_nodes(self) -> int:
        """Return how many fragments there are.

        Raises:
            UserError: not as many as were written.
        """
        rows = self._count(NODES)
        self._require_rows(NODES, rows)
        return rows

    def node_ids(self) -> Iterator[Ids]:
        """Stream all fragment ids. Call this after the last write.

        Yields:
            ids: uint64 (n,), a batch that fits in memory.
        """
        return (batch["id"] for batch in self._all_rows(NODES, ["id"]))

    def edges(self, merge_function: str) -> Iterator[Edges]:
        """Stream all edges of a merge function. Call this after the last write.

        Yields:
            u, v and scores as `read_edges` returns them, a batch that fits in memory.
        """
        return (_edges(batch) for batch in self._all_rows(EDGES + merge_function, list(EDGE_COLUMNS)))

    def merge_functions(self) -> list[str]:
        """Return the sorted names of the merge functions that edges were written for, even if there were none."""
        return sorted(table.removeprefix(EDGES) for table in self._tables() if table.startswith(EDGES))

    def finish_nodes(self) -> None:
        """Do what is left after the last block of nodes: record how many there are, so that none can get lost.

        Raises:
            UserError: fewer or more nodes were recorded before.
        """
        self._finish(NODES)

    def finish_edges(self, merge_function: str) -> None:
        """Do what is left after the last block of edges of a merge function, as `finish_nodes`."""
        self._finish(EDGES + merge_function)

    def drop(self) -> None:
        """Remove all nodes and edges of the sample. The store can be written to afterwards."""
        for merge_function in self.merge_functions():
            self.drop_edges(merge_function)
        self._drop(NODES)
        self._write_record(ROWS + NODES, None)
        self._write_record(GRAPH, self._record)

    def drop_edges(self, merge_function: str) -> None:
        """Remove the edges of one merge function, and their records."""
        self._drop(EDGES + merge_function)
        self._write_record(ROWS + EDGES + merge_function, None)
        self._write_record(EDGES + merge_function, None)

    def edges_record(self, merge_function: str) -> Record | None:
        """Return what `write_edges_record` kept, None if it kept nothing."""
        record = self._record_of(EDGES + merge_function)
        try:
            made_from: Record | None = None if record is None else json.loads(record["made_from"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise self._damaged(EDGES + merge_function, "has a record that cannot be read") from None
        return made_from

    def write_edges_record(self, merge_function: str, record: Record) -> None:
        """Keep with the edges of a merge function what they were made from: anything that JSON can hold."""
        # As text: its keys are those of the config, and a database may not take names with dots.
        self._write_record(EDGES + merge_function, {"made_from": json.dumps(record)})

    def id_range(self, block: int) -> tuple[int, int]:
        """Return the first and the last id that fragments of a block can have."""
        return block * self._voxels_in_block + 1, (block + 1) * self._voxels_in_block

    def _write(self, table: str, block: int, arrays: Sequence[ArrayLike]) -> None:
        columns: Columns = {
            name: np.ascontiguousarray(array, dtype)
            for (name, dtype), array in zip(columns_of(table).items(), arrays, strict=True)
        }
        if problem := _problem(table, columns):
            raise ValueError(f"block {block} {problem}")
        keys = next(iter(columns.values()))
        first, last = self.id_range(block)
        if np.any((keys < first) | (keys > last)):
            raise ValueError(f"block {block} owns the ids {first} to {last}, not {keys.min()} to {keys.max()}")
        self._replace(table, block, columns)

    def _all_rows(self, table: str, names: list[str]) -> Iterator[Columns]:
        """Stream a table, check its values, and at the end their number."""
        rows = 0
        for batch in self._stream(table, names):
            rows += len(batch[names[0]])
            yield self._checked(table, batch)
        self._require_rows(table, rows)

    def _checked(self, table: str, columns: Columns) -> Columns:
        if problem := _problem(table, columns):
            raise self._damaged(table, problem)
        return columns

    def _finish(self, table: str) -> None:
        self._tidy()
        rows = self._count(table)
        self._require_rows(table, rows)
        self._write_record(ROWS + table, {"rows": rows})

    def _require_rows(self, table: str, rows: int) -> None:
        """Check a number of rows against the one that was recorded. Graphs of others have none."""
        record = self._record_of(ROWS + table)
        if record is not None and record.get("rows") != rows:
            raise self._damaged(table, f"has {rows} rows where {record.get('rows')!s:.30} were written")

    def _record_of(self, name: str) -> Record | None:
        """Read a record, whatever is stored in its place."""
        record: Any = self._read_record(name)
        if record is not None and not isinstance(record, dict):
            raise UserError(f"the record {name} of the graph {self} is damaged: {REMEDY.format('02 and 03')}")
        return record

    def _damaged(self, table: str, problem: str) -> UserError:
        steps = "02 and 03" if table == NODES else "03_agglomerate_blockwise.py"
        return UserError(f"{table} of the graph {self} {problem}: {REMEDY.format(steps)}")

    @abstractmethod
    def __repr__(self) -> str:
        """Say where the graph is, without credentials."""

    @abstractmethod
    def _replace(self, table: str, block: int, columns: Columns) -> None:
        """Replace the rows of a block by these. The table exists afterwards, even if there are no rows.

        Args:
            table: name of the table.
            block: the number of the block, from 0.
            columns: all columns of the table in the order and types of `columns_of(table)`, each (n,).
        """

    @abstractmethod
    def _read(self, table: str, first_id: int, last_id: int) -> Columns:
        """Read the rows whose first column is from first_id to last_id, both included.

        Returns:
            All columns in the order and types of `columns_of(table)`, each (n,) and writable. The rows come in any
            order. If the table does not exist, there are none.
        """

    @abstractmethod
    def _stream(self, table: str, names: list[str]) -> Iterator[Columns]:
        """Read some columns of all rows.

        Yields:
            The named columns, in that order and each (n,): a batch that fits in memory. Each row comes once. If the
            table does not exist, there are no batches.
        """

    @abstractmethod
    def _count(self, table: str) -> int:
        """Return the number of rows of a table, 0 if it does not exist."""

    @abstractmethod
    def _tidy(self) -> None:
        """Do what is cheaper at the end, such as building an index. Called after the last block of a table."""

    @abstractmethod
    def _tables(self) -> list[str]:
        """Return the names of the tables that exist, in any order."""

    @abstractmethod
    def _drop(self, table: str) -> None:
        """Remove a table if it exists."""

    @abstractmethod
    def _read_record(self, name: str) -> Record | None:
        """Return the record of this name, None if there is none."""

    @abstractmethod
    def _write_record(self, name: str, record: Record | None) -> None:
        """Keep a record with the graph, in place of the earlier one of this name. None removes it.

        Records outlive tables.
        """


def _problem(table: str, columns: Columns) -> str:
    """Say what is wrong with rows, whichever columns are there: nothing if they are what the graph can have."""
    types = columns_of(table)
    odd = [name for name, column in columns.items() if column.dtype != types[name]]
    if odd:
        return f"has values of {', '.join(odd)} that are missing or of another type"
    key = next(iter(columns.values()))
    if (key == 0).any():
        return "has the id 0, which is that of the background"
    if table != NODES:
        u, v, scores = columns.values()
        if (u >= v).any():
            return "has an edge whose first id is not smaller than the second"
        if ((scores < SCORES[0]) | (scores > SCORES[1])).any():  # not so for NaN
            return "has scores that are not in 0..1"
    return ""


def _edges(columns: Columns) -> Edges:
    u, v, scores = columns.values()
    return u, v, scores
