"""Agglomeration of a graph that is too large for one process, in a tree of blocks.

Upwards, a node of the tree puts together what up to eight nodes below it have left, merges what it can decide
(`contacts.settle`), and leaves the rest. What is left is about the surface of its box: nothing can be decided of a
region that touches what lies beyond. At the top nothing lies beyond. Downwards, each node tells those below it when
their pairs of regions become one, so that in the end each block knows it of its pairs of fragments.

Nodes know each other by files only, so the nodes of one level can be done in any order, on any machine, and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.engine.post.block_tree import LEFT, SETTLED, TOLD, TOP, BlockTree, Position
from lsdseg.engine.post.contacts import Contacts, Limit, Settled, settle, simplified
from lsdseg.engine.post.graph import Edges


@dataclass(frozen=True)
class Tree(BlockTree):
    """A tree over a grid of blocks that agglomerates their fragments.

    Attributes:
        merge_function: scores contacts.
        limit: keeps large regions apart.
    """

    merge_function: str
    limit: Limit
    script: ClassVar[str] = "03_agglomerate_blockwise.py"

    def settle_block(self, position: Position, number: int, contacts: Contacts) -> None:
        """Settle the contacts of a block.

        Args:
            position: of the block in the grid.
            number: under which the graph knows it.
            contacts: what `find_contacts` found.
        """
        settled = settle(simplified(contacts, self.merge_function), self.merge_function, self.limit)
        # Fragments that share no face have no edge. They may have a contact: mutex watershed knows what repels afar.
        touching = np.add.reduceat(contacts.counts, contacts.starts[:-1]) > 0 if len(contacts.u) else contacts.u > 0
        u = np.where(touching, contacts.u, np.uint64(0))
        self._keep(0, position, settled, u=u, v=contacts.v, number=np.int64(number))

    def settle_node(self, level: int, position: Position) -> None:
        """Settle what the nodes below a node have left. Without any, it has nothing to do.

        Raises:
            UserError: a file is damaged.
        """
        below = list(self.below(level, position))
        if below:
            self._settle(level, position, below, [self._inner_sides(level - 1, place) for place in below])

    def settle_top(self, level: int) -> None:
        """Settle all that the nodes of a level have left, and tell them when it merges.

        Raises:
            UserError: a file is damaged.
        """
        top, places = level + 1, self.all_nodes(level)
        if places:
            rest = self._settle(top, TOP, places, None)
            self.save(self.file(top, TOLD, TOP), {"scores": np.full(len(rest.u), np.nan, np.float32)})
            self._tell(top, TOP, places)

    def edges_of_block(self, position: Position) -> tuple[int, Edges] | None:
        """Return the number of a block, and when its fragments that touch become one, None if it has none.

        Raises:
            UserError: a file is damaged.
        """
        if not self.has(0, position):
            return None
        had = self.load(self.file(0, SETTLED, position))
        edges = np.flatnonzero(had["u"])
        return int(had["number"]), (had["u"][edges], had["v"][edges], self._all_scores(0, position, had)[edges])

    def _settle(
        self, level: int, position: Position, below: Sequence[Position], inner_sides: Sequence[int] | None
    ) -> Contacts:
        files = (self.file(level - 1, LEFT, place) for place in below)
        columns = [column.name for column in fields(Contacts)]
        bar = tqdm(files, total=len(below), desc="reading contacts", unit="file", delay=10)
        parts = [Contacts(**self.load(file, *columns)) for file in bar]
        contacts, order = Contacts.of_all(parts, inner_sides)
        settled = settle(contacts, self.merge_function, self.limit)
        self._keep(level, position, settled, order=order, lengths=np.array([len(part.u) for part in parts]))
        return settled.rest

    def _keep(self, level: int, position: Position, settled: Settled, **more: Any) -> None:
        """Write what became of the contacts of a node, and then what it leaves, which says that the node is done."""
        self.save(self.file(level, SETTLED, position), {"place": settled.place, "scores": settled.scores} | more)
        rest = settled.rest
        self.save(self.file(level, LEFT, position), vars(rest) | {"count": np.int64(len(rest.u))})

    def _tell(self, level: int, position: Position, below: Sequence[Position]) -> None:
        had = self.load(self.file(level, SETTLED, position))
        scores = np.empty(len(had["order"]), np.float32)
        scores[had["order"]] = self._all_scores(level, position, had)
        parts = np.split(scores, np.cumsum(had["lengths"])[:-1])
        for place, part in zip(below, parts, strict=True):
            self.save(self.file(level - 1, TOLD, place), {"scores": part})

    def _all_scores(self, level: int, position: Position, had: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """When the pairs that a node had become one: what it settled, and what it was told of the others."""
        told = np.append(self.load(self.file(level, TOLD, position))["scores"], np.float32(np.nan))
        return np.where(had["place"] < 0, had["scores"], told[had["place"]])

    def _inner_sides(self, level: int, place: Position) -> int:
        """The sides on which a node touches others of the node above it, in bits as `Contacts.open_sides`."""
        return sum((1 if at % 2 else 2) << 2 * axis for axis, at in enumerate(place))
