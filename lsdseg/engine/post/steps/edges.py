"""Step 2: fragments to the scored edges of the region adjacency graph.

Workers write what the fragments of each block touch. When all blocks are done, the graph is agglomerated as a whole,
and its edges are scored by that. A block alone would see only a part of the neurites that merge. A large graph is
agglomerated by workers, too, in a tree of blocks: level by level upwards, and back down.
"""

import math
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import daisy
import numpy as np
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.rules import EDGES, settings_of
from lsdseg.data_utils.layout import FRAGMENTS
from lsdseg.data_utils.records import START_OVER, Record, identity
from lsdseg.data_utils.volumes import open_array, read, voxels_of
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.markers import begun_before, blocks_left, complete, discard_markers
from lsdseg.engine.blocks.rates import rate_name
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import NOTHING, BlockStep, Work
from lsdseg.engine.blocks.stopwatch import Stopwatch
from lsdseg.engine.post.block_tree import Position
from lsdseg.engine.post.methods import method_of, method_that_scores
from lsdseg.engine.post.steps.fragments import check_block_settings, require_fragments
from lsdseg.engine.post.steps.grid import block_grid, block_position, block_step
from lsdseg.engine.post.steps.levels import DOWN, UP, climb, level_step
from lsdseg.engine.post.tree import Tree
from lsdseg.engine.sample import AFFINITIES, Sample, samples_of
from lsdseg.errors import UserError
from lsdseg.rag import RagStore, open_store

# In the folder of markers: what workers found and the markers of the levels of the tree, until the graph is
# agglomerated, and a file that says that it is.
CONTACTS, LEVELS, SCORED = "contacts", "levels", "scored"
# Name of the setting that tells edges of the whole graph from those of an earlier version.
SCORES = "the scores"


def agglomerate_blockwise(cfg: CfgNode) -> None:
    """Write the edges of the region adjacency graph of every sample, scored by the configured merge function.

    Raises:
        UserError: fragments are missing or incomplete; blocks failed.
    """
    merge_function = method_of(cfg.INS_SEGMENT).merge_function(cfg.INS_SEGMENT)
    for sample in samples_of(cfg):
        with working_on(sample.output, edges_name(merge_function), reads=["predict", "fragments"]):
            fragments = require_fragments(sample)
            check_block_settings(sample)
            store = open_store(sample.cfg, sample.output, "r+", fragments)
            record = _record(sample, merge_function, fragments)
            begun = begun_before(
                cfg.DATA.DROP_DS_MONGOTABLE,
                sample.markers(edges_name(merge_function)),
                _begun,
                store,
                merge_function,
                record,
            )
            if begun is None:
                discard_markers(sample.markers(edges_name(merge_function)))
                store.drop_edges(merge_function)
                store.write_edges_record(merge_function, record.to_json())
            step = edges_step(sample, merge_function, (begun or record).id)
            run_blocks(cfg, step)
            if not _is_scored(step):
                _score_whole_graph(sample, step, store, merge_function)
            store.finish_edges(merge_function)
            complete(step)
            print(f"edges of {merge_function} in {store}")


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], Work]:
    """Open what a worker needs; returns what it does with each block."""
    sample, merge_function = Sample.of_arguments(cfg, arguments), arguments["merge_function"]
    affinities, fragments = sample.affinities, open_array(sample.output, sample.fragments_dataset)
    store = open_store(sample.cfg, sample.output, "r+", identity(fragments))
    method = method_that_scores(merge_function)
    tree = _tree(sample, merge_function)
    no_edges = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.float32))

    def process(block: daisy.Block) -> Work:
        number = block.block_id[1]
        roi = block.read_roi.intersect(affinities.roi)
        labels = read(fragments, voxels_of(fragments, roi))
        if not labels.any():
            store.write_edges(merge_function, number, *no_edges)
            return NOTHING
        predicted = read(affinities, (slice(None), *voxels_of(affinities, roi)))
        channels = method.channels(predicted, sample.offsets)
        contacts = method.contacts(channels, labels, cfg.INS_SEGMENT, sample.offsets, store.id_range(number))
        tree.settle_block(block_position(sample, block.write_roi.begin), number, contacts)
        written = block.write_roi.intersect(affinities.roi).shape / affinities.voxel_size
        return Work(labels.size, math.prod(written))

    return process


def edges_name(merge_function: str) -> str:
    """Name of the step for one merge function."""
    return f"agglomerate_{merge_function}"


def edges_step(sample: Sample, merge_function: str, made: str, in_blocks: bool = False) -> BlockStep:
    """The step on a sample, for one merge function.

    Args:
        sample: the sample.
        merge_function: scores the edges.
        made: id of the edges.
        in_blocks: edges are scored in their blocks, which see the neurites only as far as INS_SEGMENT.CONTEXT.
    """
    method = method_that_scores(merge_function)
    return block_step(
        sample,
        edges_name(merge_function),
        f"{__name__}:open_worker",
        arguments={"merge_function": merge_function},
        settings={f"the edges of {merge_function}": made},
        context=None if in_blocks else method.reach(sample.offsets),
        rate=partial(edges_rate, sample.cfg, merge_function),
    )


def edges_rate(cfg: CfgNode, merge_function: str, _workers: int = 1) -> str:
    """Name under which it is kept what blocks take, see `rates.py`."""
    return rate_name(cfg, f"edges of {method_that_scores(merge_function).name}")


def scoring_rate(cfg: CfgNode) -> str:
    """Name under which it is kept what it takes to agglomerate the whole graph, by this process or in a tree."""
    return rate_name(cfg, "agglomeration")


def require_edges(sample: Sample, merge_function: str, fragments: str) -> str:
    """Check that this step is done for a merge function.

    Args:
        sample: the sample.
        merge_function: its name.
        fragments: their id, see `require_fragments`.

    Returns:
        The id of the edges, empty if others made them.

    Raises:
        UserError: it is not, or not on these fragments and affinities.
    """
    store = open_store(sample.cfg, sample.output, "r", fragments)
    available = store.merge_functions()
    if merge_function not in available:
        raise UserError(
            f"the graph {store} has no edges of {merge_function!r}, only of {', '.join(available) or 'none'}: "
            f"run 03_agglomerate_blockwise.py with INS_SEGMENT.MERGE_FUNCTION {merge_function}, or change -mf"
        )
    made_from = Record.from_json(store.edges_record(merge_function))
    if made_from is not None:
        record = _record(sample, merge_function, fragments)
        if SCORES not in made_from.settings:
            record.settings.pop(SCORES, None)
        made_from.require_same(f"{merge_function} of the graph {store}", record)
    made = "" if made_from is None else made_from.id
    # A graph of others has neither a record nor markers: it is taken as it is.
    known = made_from is not None or sample.markers(edges_name(merge_function)).is_dir()
    in_blocks = made_from is None or SCORES not in made_from.settings  # by an earlier version
    step = edges_step(sample, merge_function, made, in_blocks=in_blocks)
    if known and ((left := blocks_left(step)) or not (in_blocks or _is_scored(step))):
        what = f"{left} blocks" if left else "the scores"
        raise UserError(f"{what} of {sample.output} are not agglomerated: run 03_agglomerate_blockwise.py again")
    return made


def _tree(sample: Sample, merge_function: str) -> Tree:
    """The tree over the blocks of a sample, with its files."""
    name = edges_name(merge_function)
    limit = method_that_scores(merge_function).limit(sample.cfg.INS_SEGMENT)
    return Tree(sample.markers(name) / CONTACTS, block_grid(sample), merge_function, limit)


def _is_scored(step: BlockStep) -> bool:
    return (step.markers / SCORED).is_file()


def _score_whole_graph(sample: Sample, step: BlockStep, store: RagStore, merge_function: str) -> None:
    """Agglomerate what all blocks found, and write the edges of each block.

    Workers do it level by level, until what is left fits into this process.

    Raises:
        UserError: a file with contacts is damaged; blocks failed.
    """
    tree = _tree(sample, merge_function)
    worker, markers = f"{__name__}:open_level_worker", step.markers / LEVELS
    levels = partial(level_step, sample, step, open_worker=worker, folder=markers)
    watch = Stopwatch(sample.cfg)
    too_many = f"{step}: {{}} pairs of regions touch, more than INS_SEGMENT.CONTACTS_IN_MEMORY"
    level, left = climb(watch.run, tree, sample.cfg.INS_SEGMENT.CONTACTS_IN_MEMORY, levels, too_many)
    print(f"{step}: agglomerating {left} pairs of regions that touch", flush=True)
    tree.settle_top(level)
    for lower in range(level, 0, -1):
        watch.run(levels(lower, DOWN))
    if level:
        watch.run(levels(0, DOWN))
    else:
        total = math.prod(tree.grid)
        for position in tqdm(np.ndindex(tree.grid), total=total, desc="writing edges", unit="block", delay=10):
            _write_edges(tree, position, store)
    watch.keep(scoring_rate(sample.cfg), 1, math.prod(sample.affinities.shape[-3:]))
    (step.markers / SCORED).touch()
    for folder in (CONTACTS, LEVELS):
        shutil.rmtree(step.markers / folder, ignore_errors=True)


def open_level_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], None]:
    """Open what a worker needs for a level of the tree; returns what it does with each of its nodes."""
    sample, merge_function = Sample.of_arguments(cfg, arguments), arguments["merge_function"]
    level, direction = arguments["level"], arguments["direction"]
    tree = _tree(sample, merge_function)
    store = open_store(sample.cfg, sample.output, "r+", identity(open_array(sample.output, sample.fragments_dataset)))

    def process(block: daisy.Block) -> None:
        position = block_position(sample, block.write_roi.begin, level)
        if direction == UP:
            tree.settle_node(level, position)
        elif level:
            tree.tell_node(level, position)
        else:
            _write_edges(tree, position, store)

    return process


def _write_edges(tree: Tree, position: Position, store: RagStore) -> None:
    if found := tree.edges_of_block(position):
        number, edges = found
        store.write_edges(tree.merge_function, number, *edges)


def _record(sample: Sample, merge_function: str, fragments: str) -> Record:
    """What the edges of a sample would be made from now. Most keys that affect them affect the fragments."""
    inputs = {AFFINITIES: identity(sample.affinities), FRAGMENTS: fragments}
    settings = {"the merge function": merge_function, SCORES: "of the whole graph", **settings_of(sample.cfg, EDGES)}
    return Record("03_agglomerate_blockwise.py", inputs, settings)


def _begun(store: RagStore, merge_function: str, record: Record) -> Record | None:
    """Return the record of edges to go on with, None if there are none.

    Raises:
        UserError: they are made from something else, or by others.
    """
    begun = Record.from_json(store.edges_record(merge_function))
    if begun is None and merge_function in store.merge_functions():
        raise UserError(
            f"the edges of {merge_function} in {store} do not say what they were made from: go on with "
            f"04_find_segments_full.py to use them, or {START_OVER}"
        )
    if begun is not None:
        begun.require_same(f"the edges of {merge_function} in {store}", record)
    return begun
