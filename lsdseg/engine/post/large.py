"""Segmentation of volumes larger than memory: fragments, edges, look-up tables, segments, block by block.

Every step goes through all samples of the test folder. Blocks write only what is theirs (their voxels, their id range
of nodes, the edges of their fragments) and replace what is there, so a block can be done twice, or broken off and done
again. What the numbers mean is in `graph.py` and `tables.py`; here blocks are read and written.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from funlib.geometry import Coordinate, Roi

from lsdseg.data_utils.layout import (
    FRAGMENTS,
    block_markers,
    final_segmentation_name,
    lut_path,
    output_path,
    sample_name,
    volumes_in,
)
from lsdseg.data_utils.masks import open_mask, read_mask
from lsdseg.data_utils.volumes import chunk_shape, create_array, list_arrays, open_array, read, voxels_of
from lsdseg.engine.blocks.run import BlockTask, blocks_left, forget, run_blocks
from lsdseg.engine.post.affinities import MUTEX, offsets_of, open_affinities, read_channels
from lsdseg.engine.post.graph import edges_of_block, fragments_of_block
from lsdseg.engine.post.tables import connected_segments, load_lut, relabel, save_lut
from lsdseg.engine.post.whole import configured_merge_function, fragments_by
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk
from lsdseg.rag import open_store

# Chunks of labels are at most this wide: what a viewer loads for one screen.
LARGEST_CHUNK = 64


def extract_fragments_blockwise(cfg) -> None:
    """Write `volumes/fragments` and the nodes of the region adjacency graph of every sample.

    Raises:
        UserError: before anything is written, if affinities are missing or a setting cannot be used; later, if blocks
            fail.
    """
    for output in _outputs(cfg):
        affinities = open_affinities(output)
        _check(cfg.INS_SEGMENT, offsets_of(affinities))
        open_mask(cfg.INS_SEGMENT)
        task = _fragments_task(cfg, output)
        if cfg.DATA.DROP_DS_MONGOTABLE:
            forget(task.markers)
        if FRAGMENTS in list_arrays(output) and task.markers.is_dir():
            store = open_store(cfg, output, "r+")
        else:
            forget(task.markers)
            store = open_store(cfg, output, "w")
            _create_labels(cfg, output, FRAGMENTS, affinities, {})
        run_blocks(cfg, task)
        store.finish()
        print(f"{FRAGMENTS} in {output}, nodes in {store}")


def agglomerate_blockwise(cfg) -> None:
    """Write the edges of the region adjacency graph of every sample, scored by the configured merge function.

    Raises:
        UserError: fragments are missing or incomplete; blocks failed.
    """
    merge_function = configured_merge_function(cfg.INS_SEGMENT)
    for output in _outputs(cfg):
        _require_fragments(cfg, output)
        _check(cfg.INS_SEGMENT, offsets_of(open_affinities(output)))
        store = open_store(cfg, output, "r+")
        task = _block_task(
            cfg, output, f"agglomerate_{merge_function}", "open_agglomerate_worker", {"merge_function": merge_function}
        )
        if cfg.DATA.DROP_DS_MONGOTABLE or merge_function not in store.merge_functions():
            forget(task.markers)
            store.drop_edges(merge_function)
        run_blocks(cfg, task)
        store.finish()
        print(f"edges of {merge_function} in {store}")


def find_segments(cfg, merge_function: str, threshold: float | None) -> list[Path]:
    """Write a look-up table from fragments to segments for one threshold, or for every INS_SEGMENT.THRESHOLDS.

    Returns:
        The files, `luts_full/seg_SAMPLE_edges_MERGE_FUNCTION_THRESHOLD.npz` beside the output zarrs.

    Raises:
        UserError: agglomeration was not run with that merge function.
    """
    thresholds = cfg.INS_SEGMENT.THRESHOLDS if threshold is None else [threshold]
    paths = []
    for output in _outputs(cfg):
        _require_fragments(cfg, output)
        store = open_store(cfg, output, "r")
        available = store.merge_functions()
        if merge_function not in available:
            raise UserError(
                f"the graph {store} has no edges of {merge_function!r}, only of {', '.join(available) or 'none'}: "
                f"run 03_agglomerate_blockwise.py with INS_SEGMENT.MERGE_FUNCTION {merge_function}, or change -mf"
            )
        task = _block_task(cfg, output, f"agglomerate_{merge_function}", "", {"merge_function": merge_function})
        if left := blocks_left(task):
            raise UserError(f"{left} blocks of {output} are not agglomerated: run 03_agglomerate_blockwise.py again")
        node_ids = np.sort(np.concatenate([np.empty(0, np.uint64), *store.node_ids()]))
        print(f"{output.name}: {len(node_ids)} fragments, {len(thresholds)} thresholds", flush=True)
        for value, lut in connected_segments(node_ids, store.edges(merge_function), thresholds).items():
            path = lut_path(output, merge_function, value)
            with room_on_disk(path, lut.nbytes):
                save_lut(path, lut)
            print(f"{len(np.unique(lut[1]))} segments at {value:.2f} in {path}")
            paths.append(path)
    return paths


def extract_segmentation(cfg, merge_function: str, threshold: float) -> None:
    """Write `volumes/final_segmentation_MERGE_FUNCTION_070` of every sample from its look-up table.

    Raises:
        UserError: the look-up table is missing, or was made from other fragments.
    """
    for output in _outputs(cfg):
        _require_fragments(cfg, output)
        path = lut_path(output, merge_function, threshold)
        digest = _digest(load_lut(path))
        name = final_segmentation_name(merge_function, threshold)
        task = _block_task(
            cfg,
            output,
            name.removeprefix("volumes/final_"),
            "open_relabel_worker",
            {"lut": str(path.absolute()), "segmentation": name},
            {f"the content of {path.name}": digest},
            context=(0, 0, 0),
        )
        if cfg.DATA.DROP_DS_MONGOTABLE or name not in list_arrays(output):
            forget(task.markers)
            method = MUTEX if merge_function == MUTEX else "waterz"
            attributes = {"method": method, "merge_function": merge_function, "threshold": threshold}
            _create_labels(cfg, output, name, open_affinities(output), attributes)
        run_blocks(cfg, task)
        print(f"{name} in {output}")


def open_fragments_worker(cfg, arguments):
    """What a worker does with a block in `extract_fragments_blockwise`."""
    output = Path(arguments["output"])
    affinities, fragments = open_affinities(output), open_array(output, FRAGMENTS, "r+")
    store = open_store(cfg, output, "r+")
    settings = cfg.INS_SEGMENT
    extract, mask = fragments_by(settings, offsets_of(affinities)), open_mask(settings)

    def process(block):
        number = block.block_id[1]
        read_roi, write_roi = (roi.intersect(affinities.roi) for roi in (block.read_roi, block.write_roi))
        voxel_size = affinities.voxel_size
        before, after = (write_roi.begin - read_roi.begin) / voxel_size, (read_roi.end - write_roi.end) / voxel_size
        try:
            labels, ids, centers = fragments_of_block(
                read_channels(affinities, settings.METHOD, voxels_of(affinities, read_roi)),
                context=list(zip(before, after, strict=True)),
                block=number,
                voxels_in_block=int(np.prod(settings.BLOCK_SIZE)),
                mask=read_mask(mask, read_roi, voxel_size),
                extract=extract,
            )
        except ValueError as error:
            raise UserError(f"affinities in {output}, {read_roi}: {error}") from error
        where = voxels_of(fragments, write_roi)
        if len(ids) or read(fragments, where).any():
            fragments[where] = labels
        world = np.rint(np.array(write_roi.begin) + (centers + 0.5) * np.array(voxel_size)).astype(np.int64)
        store.write_nodes(number, ids, world)

    return process


def open_agglomerate_worker(cfg, arguments):
    """What a worker does with a block in `agglomerate_blockwise`."""
    output, merge_function = Path(arguments["output"]), arguments["merge_function"]
    affinities, fragments = open_affinities(output), open_array(output, FRAGMENTS)
    store = open_store(cfg, output, "r+")

    def process(block):
        number = block.block_id[1]
        roi = block.read_roi.intersect(affinities.roi)
        labels = read(fragments, voxels_of(fragments, roi))
        if not labels.any():
            edges = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.float32))
        else:
            channels = read_channels(affinities, merge_function, voxels_of(affinities, roi))
            own_ids = store.id_range(number)
            edges = edges_of_block(channels, labels, merge_function, *own_ids, offsets_of(affinities))
        store.write_edges(merge_function, number, *edges)

    return process


def open_relabel_worker(cfg, arguments):
    """What a worker does with a block in `extract_segmentation`."""
    output = Path(arguments["output"])
    fragments = open_array(output, FRAGMENTS)
    segmentation = open_array(output, arguments["segmentation"], "r+")
    lut = load_lut(arguments["lut"])

    def process(block):
        where = voxels_of(fragments, block.write_roi.intersect(fragments.roi))
        try:
            segmentation[where] = relabel(read(fragments, where), lut)
        except ValueError as error:
            raise UserError(f"{arguments['lut']}: {error}; run 03 and 04 again") from error

    return process


def _outputs(cfg) -> list[Path]:
    return [output_path(cfg, sample) for sample in volumes_in(cfg, "test")]


def _fragments_task(cfg, output: Path) -> BlockTask:
    settings = {
        f"INS_SEGMENT.{name}": cfg.INS_SEGMENT[name]
        for name in (
            "METHOD",
            "MUTEX_BIAS",
            "FRAGMENTS_IN_XY",
            "BACKGROUND_MASK",
            "EPSILON_AGGLOMERATE",
            "FILTER_FRAGMENTS",
            "MASK_FILE",
            "MASK_DATASET",
        )
    }
    return _block_task(cfg, output, "fragments", "open_fragments_worker", {}, settings)


def _block_task(cfg, output: Path, name: str, worker: str, arguments, settings=None, context=None) -> BlockTask:
    """A task over blocks of BLOCK_SIZE voxels, read with CONTEXT (or another one) around them."""
    affinities = open_affinities(output)
    voxel_size = affinities.voxel_size
    context = Coordinate(cfg.INS_SEGMENT.CONTEXT if context is None else context) * voxel_size
    write_roi = Roi(affinities.roi.begin, Coordinate(cfg.INS_SEGMENT.BLOCK_SIZE) * voxel_size)
    return BlockTask(
        name=name,
        sample=sample_name(output),
        total_roi=affinities.roi.grow(context, context),
        read_roi=write_roi.grow(context, context),
        write_roi=write_roi,
        open_worker=f"{__name__}:{worker}",
        arguments={"output": str(output.absolute()), **arguments},
        markers=block_markers(output, name),
        settings=settings or {},
    )


def _require_fragments(cfg, output: Path) -> None:
    if FRAGMENTS not in list_arrays(output):
        raise UserError(f"no {FRAGMENTS} in {output}: run 02_extract_fragments_blockwise.py with the same config first")
    if left := blocks_left(_fragments_task(cfg, output)):
        raise UserError(f"{left} blocks of {output} have no fragments: run 02_extract_fragments_blockwise.py first")


def _check(settings, offsets) -> None:
    fragments_by(settings, offsets)
    if settings.LINK_SECTIONS is not None:
        raise UserError("INS_SEGMENT.LINK_SECTIONS is for instance_segmenter.py: leave it None for blockwise scripts")
    reach = np.maximum(np.abs(offsets).max(axis=0), 1) if settings.METHOD == MUTEX else (1, 1, 1)
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


def _create_labels(cfg, output: Path, name: str, like, attributes) -> None:
    """An empty label volume whose chunks no two blocks share."""
    shape = like.shape[-3:]
    chunks = chunk_shape(cfg.INS_SEGMENT.BLOCK_SIZE, shape, LARGEST_CHUNK)
    with room_on_disk(output):
        create_array(
            output,
            name,
            shape,
            voxel_size=like.voxel_size,
            offset=like.offset,
            dtype=np.uint64,
            chunk_shape=chunks,
            attributes=attributes,
        )


def _digest(lut: np.ndarray) -> str:
    """Short hash of a look-up table's content, read piece by piece."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, lut.shape[1], 2**20):
        digest.update(np.ascontiguousarray(lut[:, start : start + 2**20]))
    return digest.hexdigest()
