"""Step 3: the region adjacency graph to look-up tables (LUTs) from fragments to segments, one for each threshold."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.layout import FRAGMENTS, edits_path, lut_path
from lsdseg.data_utils.records import Record
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.rates import rate_name
from lsdseg.engine.blocks.stopwatch import Stopwatch
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.post.steps.block_tables import find_segments_in_blocks
from lsdseg.engine.post.steps.edges import edges_name, require_edges
from lsdseg.engine.post.steps.fragments import require_fragments
from lsdseg.engine.post.tables import connected_segments, in_blocks, lut_record, remove_lut, save_lut
from lsdseg.engine.sample import Sample, samples_of
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk
from lsdseg.rag import open_store
from lsdseg.rag.edits import Edit, EditLog, active
from lsdseg.rag.proofread import apply_edits
from lsdseg.rag.store import REMEDY, Edges, RagStore

EDGES = "the edges"
EDITS = "the edits"


def find_segments(cfg: CfgNode, merge_function: str | None, threshold: float | None) -> list[Path]:
    """Write the look-up table of every sample for one threshold, or for every INS_SEGMENT.THRESHOLDS.

    Edits in the log beside the output are made in every table.

    Args:
        cfg: the config.
        merge_function: its name. None: the one that 03 takes with this config.
        threshold: the only threshold. None: every INS_SEGMENT.THRESHOLDS.

    Returns:
        The files, see `lut_path`.

    Raises:
        UserError: agglomeration was not run with that merge function; the log of edits, SAMPLE.edits, is damaged or of
            other fragments.
    """
    merge_function = merge_function or method_of(cfg.INS_SEGMENT).merge_function(cfg.INS_SEGMENT)
    thresholds = cfg.INS_SEGMENT.THRESHOLDS if threshold is None else [threshold]
    paths: list[Path] = []
    for sample in samples_of(cfg):
        with working_on(
            sample.output, tables_name(merge_function), reads=["predict", "fragments", edges_name(merge_function)]
        ):
            fragments = require_fragments(sample)
            log = EditLog(edits_path(sample.output), fragments)
            edits = active(log.read())
            inputs = _inputs(sample, merge_function, fragments, edits)
            store = open_store(sample.cfg, sample.output, "r", fragments)
            made, watch = partial(_record, merge_function, inputs), Stopwatch(sample.cfg)
            if store.count_nodes() <= cfg.INS_SEGMENT.FRAGMENTS_IN_MEMORY:
                paths += _find_at_once(sample, store, merge_function, thresholds, made, (log, edits))
            elif edits:
                raise UserError(
                    f"{log.path} holds edits, which need the whole graph in memory: raise "
                    "INS_SEGMENT.FRAGMENTS_IN_MEMORY on a machine that has it, or move the file away"
                )
            else:
                name = tables_name(merge_function)
                paths += find_segments_in_blocks(sample, name, merge_function, thresholds, made, watch)
            watch.keep(tables_rate(sample.cfg), len(thresholds), math.prod(sample.affinities.shape[-3:]))
    listed = ", ".join(f"{value:g}" for value in sorted(thresholds))
    print(f"for 05_extract_segmentation_from_lut.py: -mf {merge_function}, and -th one of {listed}")
    return paths


def _find_at_once(
    sample: Sample,
    store: RagStore,
    merge_function: str,
    thresholds: Sequence[float],
    made: Callable[[float], Record],
    edited: tuple[EditLog, Sequence[Edit]],
) -> Iterator[Path]:
    """Write the look-up tables of a sample, made in this process."""
    log, edits = edited
    node_ids = np.sort(np.concatenate([np.empty(0, np.uint64), *store.node_ids()]))
    print(f"{sample.output.name}: {len(node_ids)} fragments, {len(thresholds)} thresholds", flush=True)
    try:
        luts = connected_segments(node_ids, store.edges(merge_function), thresholds)
    except ValueError as error:
        raise UserError(f"the graph {store} is damaged ({error}): {REMEDY.format('02 and 03')}") from error
    if edits:
        print(f"{len(edits)} edits of {log.path} are made in every table")
    for value, unedited in luts.items():
        lut = _edited(unedited, store.edges(merge_function), log, edits, value)
        path = lut_path(sample.output, merge_function, value)
        with room_on_disk(path, lut.nbytes):
            save_lut(path, lut, made(value))
        remove_lut(in_blocks(path))
        print(f"{len(np.unique(lut[1]))} segments at {value:g} in {path}")
        yield path


def _record(merge_function: str, inputs: dict[str, str], threshold: float) -> Record:
    settings = {"the merge function": merge_function, "the threshold": threshold}
    return Record("04_find_segments_full.py", inputs, settings)


def tables_left(sample: Sample, merge_function: str, thresholds: Sequence[float]) -> list[float]:
    """Return the thresholds whose look-up table is missing, or was made from other fragments, edges or edits.

    Raises:
        UserError: fragments or edges are missing, or made from something else; the log of edits cannot be used.
    """
    fragments = require_fragments(sample)
    inputs = _inputs(sample, merge_function, fragments, active(EditLog(edits_path(sample.output), fragments).read()))
    paths = {value: lut_path(sample.output, merge_function, value) for value in thresholds}
    made = {value: lut_record(path) or lut_record(in_blocks(path)) for value, path in paths.items()}
    return [value for value, record in made.items() if record is None or record.inputs != inputs]


def require_current(sample: Sample, lut: Path, fragments: str) -> None:
    """Check that a table that says what it was made from has the fragments and the edits that there are now.

    Args:
        sample: the sample.
        lut: the file or the folder.
        fragments: their id, see `require_fragments`.

    Raises:
        UserError: it has others; the log of edits cannot be used.
    """
    made_from = lut_record(lut)
    if made_from is None:
        return
    if made_from.inputs.get(FRAGMENTS) != fragments:
        raise UserError(
            f"{lut} was made from other fragments: run 03_agglomerate_blockwise.py and 04_find_segments_full.py again"
        )
    log = EditLog(edits_path(sample.output), fragments)
    if made_from.inputs.get(EDITS) != _edits_input(active(log.read())).get(EDITS):
        raise UserError(f"{lut} was made before the last edit in {log.path}: run 04_find_segments_full.py again")


def _edits_input(edits: Sequence[Edit]) -> dict[str, str]:
    """Return what the record of a table says of edits that are made in it: nothing if there are none."""
    return {EDITS: hashlib.blake2b(repr(edits).encode(), digest_size=16).hexdigest()} if edits else {}


def _inputs(sample: Sample, merge_function: str, fragments: str, edits: Sequence[Edit]) -> dict[str, str]:
    """Return name -> id of what tables are made from."""
    return {FRAGMENTS: fragments, EDGES: require_edges(sample, merge_function, fragments)} | _edits_input(edits)


def _edited(
    lut: NDArray[np.uint64], edges: Iterable[Edges], log: EditLog, edits: Sequence[Edit], threshold: float
) -> NDArray[np.uint64]:
    """Make the edits of a log in a table."""
    try:
        return apply_edits(lut, edges, edits, threshold) if edits else lut
    except ValueError as error:
        raise UserError(f"{log.path}: {error}: move the file away, or restore the fragments") from error


def tables_rate(cfg: CfgNode) -> str:
    """Name under which it is kept what a look-up table takes, see `rates.py`."""
    return rate_name(cfg, "look-up tables")


def tables_name(merge_function: str) -> str:
    """Name of the step for one merge function."""
    return f"tables_{merge_function}"
