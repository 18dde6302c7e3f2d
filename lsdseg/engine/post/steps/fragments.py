"""Step 1: affinities to fragments, and to the nodes of the region adjacency graph."""

from collections.abc import Callable
from functools import partial
from typing import Any

import daisy
import numpy as np
from yacs.config import CfgNode

from lsdseg.config import rules
from lsdseg.config.loader import derived_config
from lsdseg.data_utils.layout import FRAGMENTS
from lsdseg.data_utils.masks import open_mask, read_mask
from lsdseg.data_utils.placement import nanometers, voxel_size_nm
from lsdseg.data_utils.records import Record, identity, record_of
from lsdseg.data_utils.volumes import (
    has_array,
    open_array,
    read,
    require_whole,
    voxels_of,
)
from lsdseg.engine.block_size import choose_block
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.markers import begun_before, blocks_left, complete, discard_markers
from lsdseg.engine.blocks.rates import rate_name
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import NOTHING, BlockStep, Work
from lsdseg.engine.post.graph import fragments_of_block
from lsdseg.engine.post.inputs import IN_BLOCKS, IN_MEMORY, inputs_of
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.post.placement import open_placement, read_placement
from lsdseg.engine.post.steps.grid import begun_labels, block_step, create_labels, seal_labels
from lsdseg.engine.sample import BLOCK_SIZE, Sample, samples_of
from lsdseg.errors import UserError
from lsdseg.rag import open_store
from lsdseg.rag.store import Mode

NAME = "fragments"


def extract_fragments_blockwise(cfg: CfgNode) -> None:
    """Write `volumes/fragments` and the nodes of the region adjacency graph of every sample.

    Raises:
        UserError: before anything is written, if affinities are missing or a setting cannot be used; later, if blocks
            fail.
    """
    open_mask(cfg.INS_SEGMENT)  # refused before anything is written if it cannot be
    for sample in samples_of(cfg):
        with working_on(sample.output, NAME, reads=["predict"]):
            begun = begun_before(cfg.DATA.DROP_DS_MONGOTABLE, sample.markers(NAME), begun_fragments, sample)
            if begun is None and cfg.INS_SEGMENT.BLOCK_SIZE is None:
                block, why = choose_block(cfg, sample.affinities.shape[-3:])
                sample.cfg = derived_config(cfg, {BLOCK_SIZE: block})
                print(why)
            check_block_settings(sample)
            record = _record(sample)
            if begun is None:
                discard_markers(sample.markers(NAME))
                mode: Mode = "w" if cfg.DATA.DROP_DS_MONGOTABLE else "x"
                store = open_store(sample.cfg, sample.output, mode, record.id)
                create_labels(sample, FRAGMENTS, record.attributes)
            else:
                store = open_store(sample.cfg, sample.output, "r+", begun.id)
            step = fragments_step(sample)
            run_blocks(cfg, step)
            store.finish_nodes()
            seal_labels(sample, FRAGMENTS, step, sample.affinities)
            complete(step)
            print(f"{FRAGMENTS} in {sample.output}, nodes in {store}")


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], Work]:
    """Open what a worker needs; returns what it does with each block."""
    sample = Sample.of_arguments(cfg, arguments)
    affinities, fragments = sample.affinities, open_array(sample.output, FRAGMENTS, "r+")
    store = open_store(sample.cfg, sample.output, "r+", identity(fragments))
    settings, method = sample.cfg.INS_SEGMENT, method_of(cfg.INS_SEGMENT)
    placement, voxel_size = open_placement(sample), affinities.voxel_size

    def extract(channels: Any, mask: Any, placement: Any) -> Any:
        return method.fragments(channels, settings, sample.offsets, mask, placement)

    def process(block: daisy.Block) -> Work:
        number = block.block_id[1]
        read_roi, write_roi = (roi.intersect(affinities.roi) for roi in (block.read_roi, block.write_roi))
        before, after = (write_roi.begin - read_roi.begin) / voxel_size, (read_roi.end - write_roi.end) / voxel_size
        predicted = read(affinities, (slice(None), *voxels_of(affinities, read_roi)))
        try:
            labels, ids, centers = fragments_of_block(
                method.channels(predicted, sample.offsets),
                context=list(zip(before, after, strict=True)),
                block=number,
                voxels_in_block=int(np.prod(settings.BLOCK_SIZE)),
                mask=read_mask(sample.mask, read_roi, affinities),
                extract=extract,
                placement=read_placement(placement, voxels_of(affinities, read_roi)),
            )
        except ValueError as error:
            raise UserError(f"affinities in {sample.output}, {read_roi}: {error}") from error
        where = voxels_of(fragments, write_roi)
        if len(ids) or read(fragments, where).any():
            fragments[where] = labels
        begin = np.array(nanometers(write_roi.begin, affinities))
        world = np.rint(begin + (centers + 0.5) * np.array(voxel_size_nm(affinities))).astype(np.int64)
        store.write_nodes(number, ids, world)
        return Work(predicted[0].size, labels.size) if len(ids) else NOTHING

    return process


def begun_fragments(sample: Sample) -> Record | None:
    """Return the record of the fragments that another run has begun, None if there are none to go on with.

    Raises:
        UserError: they are made from something else, or by others.
    """
    instead = "use it with 03_agglomerate_blockwise.py, or "
    return begun_labels(sample, FRAGMENTS, _record(sample), instead=instead, replaced=IN_MEMORY)


def fragments_step(sample: Sample) -> BlockStep:
    """The step on a sample, whose fragments exist."""
    made = identity(open_array(sample.output, FRAGMENTS))
    rate = partial(fragments_rate, sample.cfg)
    return block_step(sample, NAME, f"{__name__}:open_worker", settings={"the fragments": made}, rate=rate)


def fragments_rate(cfg: CfgNode, _workers: int = 1) -> str:
    """Name under which it is kept what blocks take, see `rates.py`."""
    return rate_name(cfg, f"fragments of {cfg.INS_SEGMENT.METHOD}")


def require_fragments(sample: Sample) -> str:
    """Check that this step is done.

    Returns:
        The id of the fragments.

    Raises:
        UserError: it is not, or not with these settings, or not on these affinities.
    """
    if not has_array(sample.output, sample.fragments_dataset):
        raise UserError(
            f"no {FRAGMENTS} in {sample.output}: run 02_extract_fragments_blockwise.py with the same config first"
        )
    require_whole(sample.output, sample.fragments_dataset)
    fragments = open_array(sample.output, sample.fragments_dataset)
    record = record_of(fragments)
    # Fragments of others have neither a record nor markers: they are taken as they are.
    if record is not None:
        record.require_same(f"{FRAGMENTS} in {sample.output}", _record(sample))
    if (record is not None or sample.markers(NAME).is_dir()) and (left := blocks_left(fragments_step(sample))):
        raise UserError(
            f"{left} blocks of {sample.output} have no fragments: run 02_extract_fragments_blockwise.py first"
        )
    return identity(fragments)


def _record(sample: Sample) -> Record:
    """What the fragments of a sample would be made from now."""
    return Record(IN_BLOCKS, inputs_of(sample), rules.settings_of(sample.cfg, rules.FRAGMENTS))


def check_block_settings(sample: Sample) -> None:
    """Check that the method can be used on a sample's affinities, and that its blocks see far enough.

    Raises:
        UserError: it cannot, or they do not.
    """
    settings = sample.cfg.INS_SEGMENT
    method_of(settings).check(settings, sample.offsets)
    if settings.LINK_SECTIONS is not None:
        raise UserError("INS_SEGMENT.LINK_SECTIONS is for instance_segmenter.py: leave it None for blockwise scripts")
    reach = method_of(settings).reach(sample.offsets)
    for axis, block, context, least in zip("zyx", settings.BLOCK_SIZE, settings.CONTEXT, reach, strict=True):
        if context > block:
            raise UserError(
                f"INS_SEGMENT.CONTEXT {tuple(settings.CONTEXT)} is larger than BLOCK_SIZE {tuple(settings.BLOCK_SIZE)} "
                f"along {axis}: make it smaller"
            )
        if context < least:
            raise UserError(
                f"INS_SEGMENT.CONTEXT is {tuple(settings.CONTEXT)}: it has to be {least} or more along {axis}, "
                "as far as the affinities reach"
            )
