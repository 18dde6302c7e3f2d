"""The files of a tree over the blocks of a volume. Its nodes know each other by files only.

So the nodes of one level can be done in any order, on any machine, and again. Level 0 are the blocks, and each level
above has half as many nodes along each axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lsdseg.errors import UserError
from lsdseg.files import write_whole

FILES_PER_FOLDER = 1000
# Kinds of files of a node: what it leaves to the node above, what became of what it had, and what the node above tells.
LEFT, SETTLED, TOLD = "left", "settled", "told"

Position = tuple[int, ...]
TOP: Position = ()  # of the node above all nodes of the last level, which may be more than eight


@dataclass(frozen=True)
class TreeFiles:
    """Where the files of a tree over a grid of blocks are.

    Attributes:
        folder: where the files go.
        grid: number of blocks along z, y, x.
        suffix: of the files.
    """

    folder: Path
    grid: tuple[int, ...]
    suffix: ClassVar[str] = ".npz"

    def level_grid(self, level: int) -> Position:
        """Number of nodes of a level along z, y, x."""
        return tuple(-(-size // 2**level) for size in self.grid)

    def below(self, level: int, position: Position) -> Iterator[Position]:
        """The nodes below a node that have anything."""
        grid = self.level_grid(level - 1)
        ranges = (range(2 * at, min(2 * at + 2, size)) for at, size in zip(position, grid, strict=True))
        return (place for place in product(*ranges) if self.has(level - 1, place))

    def all_nodes(self, level: int) -> list[Position]:
        """The nodes of a level that have anything."""
        return [place for place in np.ndindex(self.level_grid(level)) if self.has(level, place)]

    def has(self, level: int, position: Position) -> bool:
        """Return whether a node has anything."""
        return self.file(level, LEFT, position).is_file()

    def file(self, level: int, kind: str, position: Position) -> Path:
        """Return the file of a kind of a node."""
        if position == TOP:
            return self.folder / "top" / f"{kind}{self.suffix}"
        return self.folder / str(level) / kind / numbered(position, self.level_grid(level)).with_suffix(self.suffix)


@dataclass(frozen=True)
class BlockTree(TreeFiles, ABC):
    """A tree whose nodes leave to the one above what they cannot settle, and are then told what became of it.

    Attributes:
        script: makes the files, for messages.
    """

    script: ClassVar[str]

    def size(self, level: int) -> int:
        """How much all nodes of a level have left.

        Raises:
            UserError: a file is damaged.
        """
        files = (self.folder / str(level) / LEFT).glob("*/*.npz")
        return sum(int(self.load(file, "count")["count"]) for file in files)

    def tell_node(self, level: int, position: Position) -> None:
        """Tell the nodes below a node what became of what they have left.

        Raises:
            UserError: a file is damaged.
        """
        if below := list(self.below(level, position)):
            self._tell(level, position, below)

    @abstractmethod
    def _tell(self, level: int, position: Position, below: Sequence[Position]) -> None:
        """Write the TOLD of nodes below a node, by the SETTLED and the TOLD of that node."""

    def save(self, path: Path, arrays: dict[str, Any]) -> None:
        """Write arrays to a file, which appears whole or not at all."""
        with write_whole(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)

    def load(self, path: Path, *names: str) -> dict[str, NDArray[Any]]:
        """Read what `save` wrote, all of it or these arrays.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with np.load(path) as arrays:
                return {name: arrays[name] for name in names or arrays}
        except Exception as error:  # zipfile and numpy raise what they like at a damaged file
            raise UserError(
                f"{path} is missing or damaged: run {self.script} with DATA.DROP_DS_MONGOTABLE True"
            ) from error


def around(position: Position, grid: Position) -> Iterator[Position]:
    """The positions of a block and of its neighbors in a grid: edges reach no farther."""
    return product(*(range(max(0, at - 1), min(at + 2, size)) for at, size in zip(position, grid, strict=True)))


def numbered(position: Position, grid: Position) -> Path:
    """Return FOLDER/NUMBER.npz for a position in a grid, so that no folder has too many files."""
    number = int(np.ravel_multi_index(position, grid))
    return Path(str(number // FILES_PER_FOLDER), f"{number}.npz")
