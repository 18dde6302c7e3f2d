"""What a region adjacency graph (RAG) store does, whatever keeps the rows.

A graph is a few tables of numbers, written block by block, so a store has to know only four things: replace a block's
rows, read the rows of an id range, stream a table, drop a table. Everything that users of a store see follows from
these here, once. Two stores have them: `lsdseg.rag.parquet` and `lsdseg.rag.mongo`.

Fragment ids are `block * voxels_in_block + local id` with local ids 1 ... voxels_in_block. A block's fragments
therefore are one id range, and an edge (u < v) belongs to the block of u: every row has exactly one block that writes
it, and writing a block again replaces just its rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from lsdseg.errors import UserError

NODES = "nodes"
EDGES = "edges_"  # followed by the merge function
NODE_COLUMNS = {"id": np.uint64, "center_z": np.int64, "center_y": np.int64, "center_x": np.int64}
EDGE_COLUMNS = {"u": np.uint64, "v": np.uint64, "merge_score": np.float32}
AGGLOMERATED = "agglomerated"  # a further column of stored edges: True, the score is known

Columns = dict[str, np.ndarray]


def is_table(name: str) -> bool:
    """Whether a folder or collection of that name belongs to a graph."""
    return name == NODES or name.startswith(EDGES)


def columns_of(table: str) -> dict[str, type]:
    """The columns of a table with their types. The first is the one that id ranges refer to."""
    return NODE_COLUMNS if table == NODES else EDGE_COLUMNS


class RagStore(ABC):
    """The region adjacency graph of one sample: nodes are fragments, edges join fragments that touch.

    There is one set of nodes, and one set of edges for every merge function. `str(store)` says where the graph lies.
    Any method raises UserError if files or server cannot be read or written.

    Args:
        mode: "r": the graph must exist; "r+": read and write, an absent graph is begun; "w": drop what is there first.
        settings: what everyone who uses the graph must agree on. It is kept with the graph.

    Raises:
        UserError: there is no graph to read, or it was made with other settings.
    """

    def __init__(self, mode: str, settings: dict[str, int | str]):
        self._settings = settings
        if mode == "w":
            self.drop()
        # In this order: whoever begins a graph writes the settings before the first table.
        exists = bool(self._tables())
        recorded = self._read_settings()
        if not exists and mode == "r":
            raise UserError(f"there is no graph {self}: run 02_extract_fragments_blockwise.py first")
        if not exists:
            self._write_settings()
        elif recorded is None and mode != "r":
            raise UserError(
                f"the graph {self} was written by other scripts and can only be read: "
                "DATA.DROP_DS_MONGOTABLE True drops it and starts over"
            )
        elif recorded not in (None, settings):
            changes = [
                f"{key} {recorded.get(key)}, now {new}" for key, new in settings.items() if recorded.get(key) != new
            ]
            raise UserError(
                f"the graph {self} was made with {'; '.join(changes)}: go back to that INS_SEGMENT.BLOCK_SIZE or "
                "output, choose another DATA.DB_NAME, or drop it and start over with DATA.DROP_DS_MONGOTABLE True"
            )

    def write_nodes(self, block: int, ids: np.ndarray, centers: np.ndarray) -> None:
        """Replace the nodes of a block.

        Args:
            block: the block's number, from 0.
            ids: fragment ids (uint64, n), in the block's id range.
            centers: centres of the fragments (int64, n x 3) in nm, z, y, x.
        """
        centers = np.asarray(centers).reshape(-1, 3)
        self._write(NODES, block, (ids, *centers.T))

    def write_edges(self, merge_function: str, block: int, u: np.ndarray, v: np.ndarray, scores: np.ndarray) -> None:
        """Replace a block's edges of one merge function.

        Args:
            block: the block's number, from 0.
            u, v: the fragment ids that each edge joins (uint64, m); u < v, and u in the block's id range.
            scores: thresholds at which the two fragments' regions merge (float32, m); NaN if they never do.
        """
        if np.any(u >= v):
            raise ValueError("an edge's first id must be smaller than its second")
        self._write(EDGES + merge_function, block, (u, v, scores))

    def read_nodes(self, first_id: int, last_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The nodes with ids from first_id to last_id, inclusive: ids (uint64, n) and centres (int64, n x 3, nm)."""
        ids, *centers = self._read(NODES, first_id, last_id).values()
        return ids, np.stack(centers, axis=1)

    def read_edges(self, merge_function: str, first_id: int, last_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges whose u is in first_id ... last_id: u, v (uint64, m) and scores (float32, m; NaN never merged)."""
        return tuple(self._read(EDGES + merge_function, first_id, last_id).values())

    def node_ids(self) -> Iterator[np.ndarray]:
        """All fragment ids, in batches (uint64). Meant for after the last write."""
        return (batch["id"] for batch in self._stream(NODES, ["id"]))

    def edges(self, merge_function: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All edges of a merge function, in batches like `read_edges`' results. Meant for after the last write."""
        return (tuple(batch.values()) for batch in self._stream(EDGES + merge_function, list(EDGE_COLUMNS)))

    def merge_functions(self) -> list[str]:
        """The merge functions that edges were written for, sorted; one that found no edges at all is among them."""
        return sorted(table.removeprefix(EDGES) for table in self._tables() if table.startswith(EDGES))

    @abstractmethod
    def finish(self) -> None:
        """To be called once after the last block, when nobody writes: what is cheaper at the end than in between."""

    def drop(self) -> None:
        """Remove the nodes and all edges of the sample. The store can be written to afterwards."""
        for merge_function in self.merge_functions():
            self.drop_edges(merge_function)
        self._drop(NODES)
        self._write_settings()

    def drop_edges(self, merge_function: str) -> None:
        """Remove the edges of one merge function."""
        self._drop(EDGES + merge_function)

    def id_range(self, block: int) -> tuple[int, int]:
        """The first and the last id that fragments of a block can have."""
        voxels = self._settings["voxels_in_block"]
        return block * voxels + 1, (block + 1) * voxels

    def _write(self, table: str, block: int, arrays) -> None:
        names = columns_of(table)
        columns = {
            name: np.ascontiguousarray(array, dtype) for (name, dtype), array in zip(names.items(), arrays, strict=True)
        }
        keys = next(iter(columns.values()))
        first, last = self.id_range(block)
        if np.any((keys < first) | (keys > last)):
            raise ValueError(f"block {block} owns the ids {first} to {last}, not {keys.min()} to {keys.max()}")
        self._replace(table, block, columns)

    @abstractmethod
    def _replace(self, table: str, block: int, columns: Columns) -> None:
        """Put these rows in the place of the block's; no rows still make the table exist."""

    @abstractmethod
    def _read(self, table: str, first_id: int, last_id: int) -> Columns:
        """All columns of the rows whose first column is in the range; none if there is no such table."""

    @abstractmethod
    def _stream(self, table: str, names: list[str]) -> Iterator[Columns]:
        """Those columns of all rows, in batches that fit in memory."""

    @abstractmethod
    def _tables(self) -> list[str]:
        """The tables that exist."""

    @abstractmethod
    def _drop(self, table: str) -> None:
        """Remove a table, if it exists."""

    @abstractmethod
    def _read_settings(self) -> dict[str, int | str] | None:
        """The settings kept with the graph, None if there are none."""

    @abstractmethod
    def _write_settings(self) -> None:
        """Keep `self._settings` with the graph."""
