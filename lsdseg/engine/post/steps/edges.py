"""Step 2: fragments to the scored edges of the region adjacency graph."""

from collections.abc import Callable
from typing import Any

import daisy
import numpy as np
from yacs.config import CfgNode

from lsdseg.data_utils.layout import FRAGMENTS
from lsdseg.data_utils.volumes import open_array, read, voxels_of
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.markers import blocks_left, discard_markers
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep
from lsdseg.engine.post.graph import edges_of_block
from lsdseg.engine.post.methods import method_of, method_that_scores
from lsdseg.engine.post.steps.fragments import check_block_settings, require_fragments
from lsdseg.engine.post.steps.grid import block_step
from lsdseg.engine.sample import Sample, samples_of
from lsdseg.errors import UserError
from lsdseg.rag import open_store


def agglomerate_blockwise(cfg: CfgNode) -> None:
    """Write the edges of the region adjacency graph of every sample, scored by the configured merge function.

    Raises:
        UserError: fragments are missing or incomplete; blocks failed.
    """
    merge_function = method_of(cfg.INS_SEGMENT).merge_function(cfg.INS_SEGMENT)
    for sample in samples_of(cfg):
        with working_on(sample.output, edges_name(merge_function), reads=["predict", "fragments"]):
            require_fragments(sample)
            check_block_settings(sample)
            store = open_store(cfg, sample.output, "r+")
            step = edges_step(sample, merge_function)
            if cfg.DATA.DROP_DS_MONGOTABLE or merge_function not in store.merge_functions():
                discard_markers(step.markers)
                store.drop_edges(merge_function)
            run_blocks(cfg, step)
            store.finish()
            print(f"edges of {merge_function} in {store}")


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], None]:
    """Open what a worker needs; returns what it does with each block."""
    sample, merge_function = Sample.of_arguments(cfg, arguments), arguments["merge_function"]
    affinities, fragments = sample.affinities, open_array(sample.output, FRAGMENTS)
    store = open_store(cfg, sample.output, "r+")
    method = method_that_scores(merge_function)
    no_edges = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.float32))

    def process(block: daisy.Block) -> None:
        number = block.block_id[1]
        roi = block.read_roi.intersect(affinities.roi)
        labels = read(fragments, voxels_of(fragments, roi))
        edges = no_edges
        if labels.any():
            predicted = read(affinities, (slice(None), *voxels_of(affinities, roi)))
            channels = method.channels(predicted, sample.offsets)
            all_edges = method.edges(channels, labels, merge_function, sample.offsets)
            edges = edges_of_block(all_edges, *store.id_range(number))
        store.write_edges(merge_function, number, *edges)

    return process


def edges_name(merge_function: str) -> str:
    """Name of the step for one merge function."""
    return f"agglomerate_{merge_function}"


def edges_step(sample: Sample, merge_function: str) -> BlockStep:
    """The step on a sample, for one merge function."""
    arguments = {"merge_function": merge_function}
    return block_step(sample, edges_name(merge_function), f"{__name__}:open_worker", arguments=arguments)


def require_edges(sample: Sample, merge_function: str) -> None:
    """Check that this step is done for a merge function.

    Raises:
        UserError: it is not.
    """
    store = open_store(sample.cfg, sample.output, "r")
    available = store.merge_functions()
    if merge_function not in available:
        raise UserError(
            f"the graph {store} has no edges of {merge_function!r}, only of {', '.join(available) or 'none'}: "
            f"run 03_agglomerate_blockwise.py with INS_SEGMENT.MERGE_FUNCTION {merge_function}, or change -mf"
        )
    if left := blocks_left(edges_step(sample, merge_function)):
        raise UserError(f"{left} blocks of {sample.output} are not agglomerated: run 03_agglomerate_blockwise.py again")
