"""Steps over the levels of a tree of blocks: up to where one process takes what is left, and back down."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

from funlib.geometry import Roi

from lsdseg.engine.blocks.step import BlockStep, Summary
from lsdseg.engine.post.block_tree import BlockTree
from lsdseg.engine.sample import Sample

UP, DOWN = "up", "down"


def level_step(
    sample: Sample, blocks: BlockStep, level: int, direction: str, *, open_worker: str, folder: Path
) -> BlockStep:
    """Return the step over the nodes of one level of a tree.

    Args:
        sample: the sample.
        blocks: the step over its blocks.
        level: of the nodes; level 0 are the blocks.
        direction: UP or DOWN.
        open_worker: "module:function"; its arguments are those of the blocks, `level` and `direction`.
        folder: where its markers go.
    """
    box = Roi(sample.affinities.roi.begin, blocks.write_roi.shape * 2**level)
    return replace(
        blocks,
        name=f"{blocks.name}_{direction}_{level}",
        total_roi=sample.affinities.roi,
        read_roi=box,
        write_roi=box,
        open_worker=open_worker,
        arguments=blocks.arguments | {"level": level, "direction": direction},
        markers=folder / f"{direction}_{level}",
        may_skip=False,
    )


def climb(
    run: Callable[[BlockStep], Summary],
    tree: BlockTree,
    most: int,
    levels: Callable[[int, str], BlockStep],
    too_many: str = "",
) -> tuple[int, int]:
    """Settle level by level upwards until one process can take what is left. The blocks are settled already.

    Args:
        run: does all blocks of a step.
        tree: the tree.
        most: how much one process takes.
        levels: returns the step over the nodes of a level in a direction.
        too_many: what to print before each level, with {} for how much is left. Empty: nothing.

    Returns:
        The last level, and how much it has left.

    Raises:
        UserError: a file is damaged; blocks failed.
    """
    level = 0
    while (left := tree.size(level)) > most and prod(tree.level_grid(level)) > 1:
        level += 1
        if too_many:
            print(too_many.format(left), flush=True)
        run(levels(level, UP))
    return level, left
