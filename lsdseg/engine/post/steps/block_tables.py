"""Step 3 for graphs with more fragments than one process can take: look-up tables in parts, one for each block."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import daisy
import numpy as np
from yacs.config import CfgNode

from lsdseg.data_utils.layout import lut_path
from lsdseg.data_utils.records import Record, identity
from lsdseg.data_utils.volumes import open_array
from lsdseg.engine.blocks.markers import discard_markers, read_settings
from lsdseg.engine.blocks.stopwatch import Stopwatch
from lsdseg.engine.post.block_tree import Position, around
from lsdseg.engine.post.graph import Edges
from lsdseg.engine.post.steps.grid import block_grid, block_number, block_position, block_step
from lsdseg.engine.post.steps.levels import DOWN, UP, climb, level_step
from lsdseg.engine.post.table_tree import TableTree
from lsdseg.engine.post.tables import finish_parts, in_blocks, remove_lut, save_part
from lsdseg.engine.sample import Sample
from lsdseg.errors import UserError
from lsdseg.rag import open_store
from lsdseg.rag.store import REMEDY, RagStore

MADE_FROM = "the tables"  # the setting with all that the tables depend on


def find_segments_in_blocks(
    sample: Sample,
    name: str,
    merge_function: str,
    thresholds: Sequence[float],
    record: Callable[[float], Record],
    watch: Stopwatch,
) -> list[Path]:
    """Write the look-up tables of a sample, each a folder with a part for each block.

    Args:
        sample: the sample.
        name: of the step.
        merge_function: its name.
        thresholds: scores up to which to join.
        record: says of a threshold what its table is made from.
        watch: runs the workers.

    Returns:
        The folders, see `tables.in_blocks`.

    Raises:
        UserError: blocks failed; the graph is damaged.
    """
    paths = {value: lut_path(sample.output, merge_function, value) for value in sorted(thresholds)}
    records = {value: record(value) for value in paths}
    made = str({value: [made_from.inputs, made_from.settings] for value, made_from in records.items()})
    folder, worker = sample.markers(name), f"{__name__}:open_worker"
    arguments = {"step": name, "merge_function": merge_function, "thresholds": list(paths)}
    blocks = block_step(sample, name, worker, arguments=arguments, settings={MADE_FROM: made})
    step, tree = partial(level_step, sample, blocks, open_worker=worker, folder=folder), _tree(sample, arguments)
    if read_settings(step(0, UP).markers).get(MADE_FROM) not in (None, made):
        discard_markers(folder)
    for path in paths.values():
        remove_lut(path)
        if not folder.is_dir():
            remove_lut(in_blocks(path))
    watch.run(step(0, UP))
    level, left = climb(watch.run, tree, sample.cfg.INS_SEGMENT.FRAGMENTS_IN_MEMORY, step)
    print(f"{sample.output.name}: joining {left} fragments that blocks share", flush=True)
    tree.settle_top(level)
    for lower in range(level, -1, -1):
        watch.run(step(lower, DOWN))
    for value, path in paths.items():
        finish_parts(in_blocks(path), records[value])
        print(f"segments at {value:g}, in parts for each block, in {in_blocks(path)}")
    shutil.rmtree(folder)
    return [in_blocks(path) for path in paths.values()]


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], None]:
    """Open what a worker needs for a level of the tree; returns what it does with each of its nodes."""
    sample, merge_function = Sample.of_arguments(cfg, arguments), arguments["merge_function"]
    level, direction, tree = arguments["level"], arguments["direction"], _tree(sample, arguments)
    store = open_store(sample.cfg, sample.output, "r", identity(open_array(sample.output, sample.fragments_dataset)))

    def process(block: daisy.Block) -> None:
        position = block_position(sample, block.write_roi.begin, level)
        if direction == UP and level:
            tree.settle_node(level, position)
        elif direction == UP:
            _settle_block(tree, position, store, merge_function)
        elif level:
            tree.tell_node(level, position)
        else:
            for value, lut in (tree.tables_of_block(position) or {}).items():
                save_part(in_blocks(lut_path(sample.output, merge_function, value)), position, tree.grid, lut)

    return process


def _settle_block(tree: TableTree, position: Position, store: RagStore, merge_function: str) -> None:
    ranges = {place: store.id_range(block_number(place, tree.grid)) for place in around(position, tree.grid)}
    ids = np.sort(store.read_nodes(*ranges[position])[0])
    if not len(ids):
        return
    near = [store.read_edges(merge_function, *ids_of) for place, ids_of in ranges.items() if place != position]
    nothing: Edges = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.float32))
    u, v, scores = (np.concatenate(columns) for columns in zip(nothing, *near, strict=True))
    by_number = {int(np.ravel_multi_index(place, tree.grid)): ids_of for place, ids_of in ranges.items()}
    try:
        tree.settle_block(position, ids, store.read_edges(merge_function, *ranges[position]), (u, v, scores), by_number)
    except ValueError as error:
        raise UserError(f"the graph {store} is damaged ({error}): {REMEDY.format('02 and 03')}") from error


def _tree(sample: Sample, arguments: dict[str, Any]) -> TableTree:
    return TableTree(sample.markers(arguments["step"]) / "tree", block_grid(sample), tuple(arguments["thresholds"]))
