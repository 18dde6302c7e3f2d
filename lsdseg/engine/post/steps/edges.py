"""Step 2: fragments to the scored edges of the region adjacency graph."""

from collections.abc import Callable
from typing import Any

import daisy
import numpy as np
from yacs.config import CfgNode

from lsdseg.data_utils.layout import FRAGMENTS
from lsdseg.data_utils.records import START_OVER, Record, identity
from lsdseg.data_utils.volumes import open_array, read, voxels_of
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.markers import blocks_left, discard_markers
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep
from lsdseg.engine.post.graph import edges_of_block
from lsdseg.engine.post.methods import method_of, method_that_scores
from lsdseg.engine.post.steps.fragments import check_block_settings, require_fragments
from lsdseg.engine.post.steps.grid import block_step
from lsdseg.engine.sample import AFFINITIES, Sample, samples_of
from lsdseg.errors import UserError
from lsdseg.rag import RagStore, open_store


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
            store = open_store(cfg, sample.output, "r+", fragments)
            record = _record(sample, merge_function, fragments)
            begun = None if cfg.DATA.DROP_DS_MONGOTABLE else _begun(store, merge_function, record)
            if begun is None:
                discard_markers(sample.markers(edges_name(merge_function)))
                store.drop_edges(merge_function)
                store.write_edges_record(merge_function, record.to_json())
            step = edges_step(sample, merge_function, (begun or record).id)
            run_blocks(cfg, step)
            store.finish_edges(merge_function)
            print(f"edges of {merge_function} in {store}")


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], None]:
    """Open what a worker needs; returns what it does with each block."""
    sample, merge_function = Sample.of_arguments(cfg, arguments), arguments["merge_function"]
    affinities, fragments = sample.affinities, open_array(sample.output, sample.fragments_dataset)
    store = open_store(cfg, sample.output, "r+", identity(fragments))
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


def edges_step(sample: Sample, merge_function: str, made: str) -> BlockStep:
    """The step on a sample, for one merge function.

    Args:
        sample: the sample.
        merge_function: scores the edges.
        made: id of the edges.
    """
    return block_step(
        sample,
        edges_name(merge_function),
        f"{__name__}:open_worker",
        arguments={"merge_function": merge_function},
        settings={f"the edges of {merge_function}": made},
    )


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
        made_from.require_same(f"{merge_function} of the graph {store}", _record(sample, merge_function, fragments))
    made = "" if made_from is None else made_from.id
    # A graph of others has neither a record nor markers: it is taken as it is.
    known = made_from is not None or sample.markers(edges_name(merge_function)).is_dir()
    if known and (left := blocks_left(edges_step(sample, merge_function, made))):
        raise UserError(f"{left} blocks of {sample.output} are not agglomerated: run 03_agglomerate_blockwise.py again")
    return made


def _record(sample: Sample, merge_function: str, fragments: str) -> Record:
    """What the edges of a sample would be made from now. The keys that affect them affect the fragments, too."""
    inputs = {AFFINITIES: identity(sample.affinities), FRAGMENTS: fragments}
    return Record("03_agglomerate_blockwise.py", inputs, {"the merge function": merge_function})


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
