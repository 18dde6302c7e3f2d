"""Look-up tables (LUTs) of a graph with more fragments than one process can take, in a tree of blocks.

Each block joins its fragments by the edges that it owns. An edge belongs to the block of its smaller end, so its larger
end may be a fragment of a neighbor: the two blocks share it. Upwards, a node of the tree joins what the nodes below it
say of the fragments that they share, and leaves those that are shared with blocks beyond its box. Downwards, each node
tells those below it which segments they have become. In the end each block knows the segments of its own fragments, at
all thresholds. They are those of `tables.connected_segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lsdseg.engine.post.block_tree import LEFT, SETTLED, TOLD, TOP, BlockTree, Position
from lsdseg.engine.post.graph import Edges
from lsdseg.engine.post.tables import connected_segments

Ids = NDArray[np.uint64]


@dataclass(frozen=True)
class TableTree(BlockTree):
    """A tree over a grid of blocks that joins their fragments.

    Attributes:
        thresholds: scores up to which to join, ascending.
    """

    thresholds: tuple[float, ...]
    script: ClassVar[str] = "04_find_segments_full.py"

    def settle_block(self, position: Position, ids: Ids, edges: Edges, touching: Edges, ranges: dict[int, Any]) -> None:
        """Join the fragments of a block.

        Args:
            position: of the block in the grid.
            ids: uint64 (n,), its fragments, ascending.
            edges: those that it owns, u, v and scores.
            touching: edges of its neighbors.
            ranges: number of a block in the grid, counted along its axes -> its first and last id; for the block itself
                and all its neighbors.

        Raises:
            ValueError: edges between fragments that are neither of the block nor of its neighbors.
        """
        own = int(np.ravel_multi_index(position, self.grid))
        u, v, scores = self._joining(edges)
        foreign = np.setdiff1d(v, ids)
        owners = np.full(len(foreign), -1)
        for number, (first, last) in ranges.items():
            owners[(foreign >= first) & (foreign <= last)] = number
        if (owners < 0).any() or (owners == own).any():
            raise ValueError("ends of edges are at fragments that are not among the nodes")
        shared = np.intersect1d(self._joining(touching)[1], ids)
        nodes = np.union1d(ids, foreign)
        luts = connected_segments(nodes, [(u, v, scores)], self.thresholds)
        segments = np.stack([luts[value][1] for value in self.thresholds])
        self.save(self.file(0, SETTLED, position), {"ids": ids, "segments": segments[:, np.searchsorted(nodes, ids)]})
        left = np.concatenate([shared, foreign])
        self._leave(
            0, position, left, np.append(np.full(len(shared), own), owners), segments[:, nodes.searchsorted(left)]
        )

    def settle_node(self, level: int, position: Position) -> None:
        """Join what the nodes below a node have left. Without any, it has nothing to do.

        Raises:
            UserError: a file is damaged.
        """
        below = list(self.below(level, position))
        if not below:
            return
        ids, owners, segments = self._settle(level, position, below)
        ids, first = np.unique(ids, return_index=True)
        # A fragment may be shared with all neighbors of its block.
        block = np.stack(np.unravel_index(owners[first], self.grid))
        begin = 2**level * np.array(position)[:, None]
        grid = np.array(self.grid)[:, None]
        beyond = (np.maximum(block - 1, 0) < begin) | (np.minimum(block + 1, grid - 1) >= begin + 2**level)
        left = first[beyond.any(axis=0)]
        self._leave(level, position, ids[beyond.any(axis=0)], owners[left], segments[:, left])

    def settle_top(self, level: int) -> None:
        """Join all that the nodes of a level have left, and tell them what became of it.

        Raises:
            UserError: a file is damaged.
        """
        if places := self.all_nodes(level):
            self._settle(level + 1, TOP, places)
            nothing = {"segments": np.empty((len(self.thresholds), 0), np.uint64)}
            self.save(self.file(level + 1, LEFT, TOP), nothing)
            self.save(self.file(level + 1, TOLD, TOP), nothing)
            self._tell(level + 1, TOP, places)

    def tables_of_block(self, position: Position) -> dict[float, Ids] | None:
        """Return threshold -> LUT, uint64 (2, n), of the fragments of a block, None if it has none.

        Raises:
            UserError: a file is damaged.
        """
        if not self.has(0, position):
            return None
        settled = self.load(self.file(0, SETTLED, position))
        found = self._final(0, position, settled["segments"])
        return {value: np.stack([settled["ids"], row]) for value, row in zip(self.thresholds, found, strict=True)}

    def _joining(self, edges: Edges) -> Edges:
        """Edges that join anything at any threshold."""
        kept = edges[2] <= np.float32(self.thresholds[-1])
        return edges[0][kept], edges[1][kept], edges[2][kept]

    def _settle(self, level: int, position: Position, below: Sequence[Position]) -> tuple[Ids, NDArray[Any], Ids]:
        """Join what nodes have left. Returns the fragments, the blocks that own them, and their segments now."""
        parts = [self.load(self.file(level - 1, LEFT, place)) for place in below]
        ids, owners = (np.concatenate([part[name] for part in parts]) for name in ("ids", "owners"))
        before = np.concatenate([part["segments"] for part in parts], axis=1)
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        segments = np.stack([_joined(row, order[again], order[again + 1]) for row in before])
        lengths = np.array([len(part["ids"]) for part in parts])
        self.save(self.file(level, SETTLED, position), {"segments": segments, "lengths": lengths})
        return ids, owners, segments

    def _leave(self, level: int, position: Position, ids: Ids, owners: NDArray[Any], segments: Ids) -> None:
        """Write what a node leaves, which says that the node is done."""
        arrays = {"ids": ids, "owners": owners, "segments": segments, "count": np.int64(len(ids))}
        self.save(self.file(level, LEFT, position), arrays)

    def _tell(self, level: int, position: Position, below: Sequence[Position]) -> None:
        settled = self.load(self.file(level, SETTLED, position))
        final = self._final(level, position, settled["segments"])
        parts = np.split(final, np.cumsum(settled["lengths"])[:-1], axis=1)
        for place, part in zip(below, parts, strict=True):
            self.save(self.file(level - 1, TOLD, place), {"segments": part})

    def _final(self, level: int, position: Position, segments: Ids) -> Ids:
        """What segments of a node have become, by what it left and was told of that; the others stay what they are."""
        left = self.load(self.file(level, LEFT, position), "segments")["segments"]
        told = self.load(self.file(level, TOLD, position))["segments"]
        return np.stack([_replaced(*rows) for rows in zip(segments, left, told, strict=True)])


def _joined(segments: Ids, a: NDArray[np.int64], b: NDArray[np.int64]) -> Ids:
    """Join the segments at places a and b; each then has the smallest id in it."""
    nodes = np.unique(segments)
    u, v = np.minimum(segments[a], segments[b]), np.maximum(segments[a], segments[b])
    differ = u < v
    edges = (u[differ], v[differ], np.zeros(np.count_nonzero(differ), np.float32))
    lut = connected_segments(nodes, [edges], [0.0])[0.0]
    joined: Ids = lut[1][nodes.searchsorted(segments)]
    return joined


def _replaced(values: Ids, before: Ids, after: Ids) -> Ids:
    """Replace those values that are among others by what stands at their place."""
    if not len(before):
        return values
    order = np.argsort(before)
    at = order[np.minimum(before[order].searchsorted(values), len(order) - 1)]
    replaced: Ids = np.where(before[at] == values, after[at], values)
    return replaced
