"""Tables of the segments, which step 4 writes beside a segmentation.

While a worker relabels a block, it also counts what the block holds of each segment. When all blocks are done, workers
put the counts of eight blocks together, then those of eight of these boxes, and so on, until few boxes are left. Rows
of boxes are divided into ranges of ids, and in the end each range is merged to its part of the tables. So no process
ever holds all segments, nor looks at all of them.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import daisy
import fastremap
import numpy as np
from funlib.geometry import Roi
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.layout import segments_folder
from lsdseg.data_utils.records import identity
from lsdseg.data_utils.segment_tables import NEIGHBORS, SEGMENTS, finish_tables, has_tables, write_range
from lsdseg.data_utils.volumes import open_array, read
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep
from lsdseg.engine.post.block_tree import Position, around
from lsdseg.engine.post.segments import REMEDY, SegmentTree, segments_in
from lsdseg.engine.post.steps.edges import require_edges
from lsdseg.engine.post.steps.grid import block_grid, block_number, block_position
from lsdseg.engine.post.steps.levels import UP, level_step
from lsdseg.engine.post.steps.tables import EDGES
from lsdseg.engine.post.tables import Lut, look_up, lut_record, relabel
from lsdseg.engine.sample import Sample
from lsdseg.errors import DamagedError, UserError
from lsdseg.files import explain_os_errors
from lsdseg.rag import open_store
from lsdseg.rag.store import voxels_in_block

# In the folder of markers, until the tables are written: what was counted, and the markers of the levels of the tree.
COUNTS, LEVELS = "counts", "levels"
MOST_NODES = 64  # whose files are merged at once, with some MB of each in memory
BLOCKS_IN_RANGE = 4096  # a range has the segments whose first fragment is in one of so many blocks, by their numbers

Ids = NDArray[np.uint64]
# Counts in a block, given its position, its slices, its fragments and its segments.
Count = Callable[[Position, tuple[slice, ...], Ids, Ids], None]


def with_counts(sample: Sample, step: BlockStep, lut: Path, merge_function: str, fragments: str) -> BlockStep:
    """Let the blocks of a step that relabels count segments, unless an earlier version has begun it, which did not.

    Args:
        sample: the sample.
        step: without any markers, if nothing of it is done.
        lut: what it relabels by.
        merge_function: its name.
        fragments: their id.
    """
    folder = step.markers / COUNTS
    if not step.markers.is_dir():
        with explain_os_errors(folder):
            folder.mkdir(parents=True)
    counts = str(folder.absolute()) if folder.is_dir() else ""
    scores = merge_function if _has_scores(sample, lut, merge_function, fragments) else ""
    width = BLOCKS_IN_RANGE * voxels_in_block(sample.cfg)
    return replace(step, arguments=step.arguments | {"counts": counts, "scores": scores, "width": width})


def _has_scores(sample: Sample, lut: Path, merge_function: str, fragments: str) -> bool:
    """Return whether the edges that a table was made from are still there, so that scores of neighbors are known."""
    record = lut_record(lut)
    try:
        return record is not None and record.inputs.get(EDGES) == require_edges(sample, merge_function, fragments)
    except UserError:
        return False


def is_counted(step: BlockStep) -> bool:
    """Return whether tables of the segments have still to be made of what blocks counted."""
    return (step.markers / COUNTS).is_dir()


def open_counter(sample: Sample, arguments: dict[str, Any], lut: Lut) -> Count | None:
    """Open what a worker needs to count segments; returns what it does in each block, None if there is nothing to do.

    Args:
        sample: the sample.
        arguments: of a step `with_counts`.
        lut: what it relabels by.
    """
    if not arguments["counts"]:
        return None
    tree, scores = _tree(sample, arguments), arguments["scores"]
    fragments = open_array(sample.output, sample.fragments_dataset)
    store = open_store(sample.cfg, sample.output, "r", identity(fragments)) if scores else None

    def segments_before(position: Position, where: tuple[slice, ...], axis: int) -> Ids | int:
        """The layer of voxels before a block; 0 where it cannot be read and the run goes on without it."""
        before = tuple(slice(s.start - 1, s.start) if n == axis else s for n, s in enumerate(where))
        neighbor = tuple(at - (n == axis) for n, at in enumerate(position))
        try:
            return relabel(read(fragments, before), lut.of_blocks(neighbor))
        except DamagedError:
            if not sample.cfg.CLUSTER.SKIP_FAILED:
                raise
            return 0

    def count(position: Position, where: tuple[slice, ...], here: Ids, labels: Ids) -> None:
        ids = fastremap.unique(here)
        ids = ids[ids > 0]
        if not len(ids):
            return
        own = lut.of_blocks(position)
        wide = np.zeros([size + 1 for size in labels.shape], np.uint64)
        wide[1:, 1:, 1:] = labels
        for axis in range(3):
            if position[axis]:
                layer = tuple(slice(0, 1) if n == axis else slice(1, None) for n in range(3))
                wide[layer] = segments_before(position, where, axis)
        edges = None
        if store is not None:
            u, v, values = store.read_edges(scores, *store.id_range(block_number(position, tree.grid)))
            edges = look_up(u, own), look_up(v, lut.of_blocks(*around(position, tree.grid))), values
        tree.write_block(position, segments_in(wide, [s.start for s in where], relabel(ids, own), edges))

    return count


def write_counted(sample: Sample, dataset: str, step: BlockStep) -> None:
    """Write the tables of a segmentation, if its blocks counted segments and it has none yet.

    Raises:
        UserError: a file with counts is damaged; blocks failed; the disk is full.
    """
    if not is_counted(step):
        if not has_tables(sample.output, dataset):
            print(f"there are no tables of the segments of {dataset}: to get them, {REMEDY}")
        return
    if not has_tables(sample.output, dataset):
        _put_together(sample, dataset, step)
    # Moved first: counts of which some are deleted already must not be taken for all.
    done = step.markers / f"{COUNTS}.done"
    shutil.rmtree(done, ignore_errors=True)
    (step.markers / COUNTS).rename(done)
    for folder in (done, step.markers / LEVELS):
        shutil.rmtree(folder, ignore_errors=True)


def _put_together(sample: Sample, dataset: str, step: BlockStep) -> None:
    """Put together what blocks counted, on workers where it is in many files, and finish the tables."""
    tree, level = _tree(sample, step.arguments), 0
    levels = partial(level_step, sample, step, open_worker=f"{__name__}:open_worker", folder=step.markers / LEVELS)
    while prod(tree.level_grid(level)) > MOST_NODES:
        level += 1
        run_blocks(sample.cfg, levels(level, UP))
    array, ranges = open_array(sample.output, dataset), tree.ranges(level) or [0]
    if len(ranges) == 1:
        write_range(sample.output, dataset, array, 0, tree.merge_range(level, ranges[0]))
    else:
        run_blocks(sample.cfg, _ranges_step(step, dataset, level, ranges))
    rows = finish_tables(sample.output, dataset, array, "05_extract_segmentation_from_lut.py")
    scored = (
        "" if step.arguments["scores"] else " (without scores: the graph that the look-up table was made from is gone)"
    )
    print(
        f"{rows[SEGMENTS]} segments, and {rows[NEIGHBORS]} pairs of them that touch{scored}, in "
        f"{segments_folder(sample.output, dataset)}"
    )


def _ranges_step(step: BlockStep, dataset: str, level: int, ranges: list[int]) -> BlockStep:
    """The step over ranges of ids: the n-th block stands for the n-th range of which the nodes of a level know any."""
    one = Roi((0, 0, 0), (1, 1, 1))
    return replace(
        step,
        name=f"{step.name}_ranges",
        total_roi=Roi((0, 0, 0), (len(ranges), 1, 1)),
        read_roi=one,
        write_roi=one,
        open_worker=f"{__name__}:open_range_worker",
        arguments=step.arguments | {"dataset": dataset, "level": level, "ranges": ranges},
        markers=step.markers / LEVELS / "ranges",
        may_skip=False,
    )


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], None]:
    """Open what a worker needs for a level of the tree; returns what it does with each of its nodes."""
    sample, level = Sample.of_arguments(cfg, arguments), arguments["level"]
    tree = _tree(sample, arguments)
    return lambda block: tree.merge_node(level, block_position(sample, block.write_roi.begin, level))


def open_range_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], None]:
    """Open what a worker needs to write the tables; returns what it does with each range of ids."""
    sample, dataset = Sample.of_arguments(cfg, arguments), arguments["dataset"]
    tree, array = _tree(sample, arguments), open_array(sample.output, dataset)

    def process(block: daisy.Block) -> None:
        number = int(block.write_roi.begin[0])
        rows = tree.merge_range(arguments["level"], arguments["ranges"][number])
        write_range(sample.output, dataset, array, number, rows)

    return process


def _tree(sample: Sample, arguments: dict[str, Any]) -> SegmentTree:
    return SegmentTree(Path(arguments["counts"]), block_grid(sample), arguments["width"])
