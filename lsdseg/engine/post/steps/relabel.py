"""Step 4: fragments to the final segmentation, through a look-up table."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import daisy
import numpy as np
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.layout import FRAGMENTS, final_segmentation_name
from lsdseg.data_utils.records import Record
from lsdseg.data_utils.segment_tables import remove_tables
from lsdseg.data_utils.volumes import open_array, read, require_whole, voxels_of
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.markers import begun_before, blocks_left, complete, discard_markers
from lsdseg.engine.blocks.rates import rate_name
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import NOTHING, BlockStep, Work
from lsdseg.engine.post.methods import method_that_scores
from lsdseg.engine.post.steps.edges import edges_name
from lsdseg.engine.post.steps.fragments import require_fragments
from lsdseg.engine.post.steps.grid import (
    begun_labels,
    block_grid,
    block_position,
    block_step,
    create_labels,
    seal_labels,
)
from lsdseg.engine.post.steps.segments import is_counted, open_counter, with_counts, write_counted
from lsdseg.engine.post.steps.tables import require_current, tables_name
from lsdseg.engine.post.tables import Lut, check_lut, existing_lut, load_lut, lut_record, relabel
from lsdseg.engine.sample import Sample, samples_of
from lsdseg.errors import UserError


def extract_segmentation(cfg: CfgNode, merge_function: str, threshold: float) -> None:
    """Write `volumes/final_segmentation_MERGE_FUNCTION_070` of every sample from its look-up table.

    Tables of its segments are written beside the output, see `lsdseg.data_utils.segment_tables`.

    Raises:
        UserError: the look-up table is missing, or was made from other fragments; blocks failed.
    """
    for sample in samples_of(cfg):
        path = existing_lut(sample.output, merge_function, threshold)
        name = final_segmentation_name(merge_function, threshold)
        reads = ["predict", "fragments", edges_name(merge_function), tables_name(merge_function)]
        with working_on(sample.output, _step_name(name), reads=reads):
            record = _record(sample, path, merge_function, threshold)
            begun = begun_before(
                cfg.DATA.DROP_DS_MONGOTABLE,
                sample.markers(_step_name(name)),
                begun_labels,
                sample,
                name,
                record,
            )
            if begun is None:
                discard_markers(sample.markers(_step_name(name)))
                made_by = {"method": method_that_scores(merge_function).name, "merge_function": merge_function}
                remove_tables(sample.output, name)
                create_labels(sample, name, made_by | {"threshold": threshold} | record.attributes)
            step = _relabel_step(sample, name, path, (begun or record).id)
            step = with_counts(sample, step, path, merge_function, record.inputs[FRAGMENTS])
            run_blocks(cfg, step)
            seal_labels(sample, name, step, open_array(sample.output, sample.fragments_dataset))
            write_counted(sample, name, step)
            complete(step)
            print(f"{name} in {sample.output}")


def is_extracted(sample: Sample, merge_function: str, threshold: float) -> bool:
    """Return whether this step is done for a threshold.

    Raises:
        UserError: what there is was made from something else, or there is no look-up table to make it from.
    """
    path = existing_lut(sample.output, merge_function, threshold)
    name = final_segmentation_name(merge_function, threshold)
    begun = begun_labels(sample, name, _record(sample, path, merge_function, threshold))
    if begun is None:
        return False
    require_whole(sample.output, name)
    step = _relabel_step(sample, name, path, begun.id)
    return not blocks_left(step) and not is_counted(step)


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], Work]:
    """Open what a worker needs; returns what it does with each block."""
    sample = Sample.of_arguments(cfg, arguments)
    fragments = open_array(sample.output, sample.fragments_dataset)
    segmentation = open_array(sample.output, arguments["segmentation"], "r+")
    lut = Lut(Path(arguments["lut"]), block_grid(sample))
    count = open_counter(sample, arguments, lut)

    def process(block: daisy.Block) -> Work:
        position = block_position(sample, block.write_roi.begin)
        where = voxels_of(fragments, block.write_roi.intersect(fragments.roi))
        labels = read(fragments, where)
        try:
            segments = relabel(labels, lut.of_blocks(position))
            segmentation[where] = segments
            if count is not None:
                count(position, where, labels, segments)
        except ValueError as error:
            raise UserError(f"{arguments['lut']}: {error}; run 03 and 04 again") from error
        return Work(labels.size, labels.size) if labels.any() else NOTHING

    return process


def _record(sample: Sample, lut: Path, merge_function: str, threshold: float) -> Record:
    """What a segmentation would be made from now.

    Raises:
        UserError: there is no look-up table, it is damaged, or it was made from other fragments or edits.
    """
    fragments = require_fragments(sample)
    require_current(sample, lut, fragments)
    if lut.is_dir():
        made_from = lut_record(lut)
        made = b"" if made_from is None else repr([made_from.inputs, made_from.settings]).encode()
        digest = hashlib.blake2b(made, digest_size=8).hexdigest()
    else:
        table = load_lut(lut)
        check_lut(lut, table)
        digest = _digest(table)
    inputs = {FRAGMENTS: fragments, "the look-up table": digest}
    settings = {"the merge function": merge_function, "the threshold": threshold}
    return Record("05_extract_segmentation_from_lut.py", inputs, settings)


def _relabel_step(sample: Sample, segmentation: str, lut: Path, made: str) -> BlockStep:
    return block_step(
        sample,
        _step_name(segmentation),
        f"{__name__}:open_worker",
        arguments={"lut": str(lut.absolute()), "segmentation": segmentation},
        settings={"the segmentation": made},
        context=(0, 0, 0),
        rate=partial(relabel_rate, sample.cfg),
    )


def relabel_rate(cfg: CfgNode, _workers: int = 1) -> str:
    """Name under which it is kept what blocks take, see `rates.py`."""
    return rate_name(cfg, "relabeling")


def _step_name(segmentation: str) -> str:
    return segmentation.removeprefix("volumes/final_")


def _digest(lut: NDArray[np.uint64]) -> str:
    """Short hash of a look-up table's content, read piece by piece."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, lut.shape[1], 2**20):
        digest.update(np.ascontiguousarray(lut[:, start : start + 2**20]).data)
    return digest.hexdigest()
