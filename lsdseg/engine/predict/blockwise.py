"""Prediction block by block on many workers. A block is one tile of the network; a worker has one GPU or a few cores.

Tiles do not depend on each other (see `tiles.py`), and each chunk on disk lies in one tile, so two workers never write
to the same file. The result is the same as that of `predicter.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import daisy
import numpy as np
from funlib.geometry import Coordinate, Roi
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.checks import check_raw
from lsdseg.data_utils.layout import prediction_name
from lsdseg.data_utils.masks import open_mask, read_mask
from lsdseg.data_utils.placement import units_per_nanometer, voxel_size_nm
from lsdseg.data_utils.records import Record, record_of
from lsdseg.data_utils.volumes import is_stored, list_arrays, open_array, voxels_of
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.markers import begun_before, block_begun, complete, missing_blocks
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep, Work
from lsdseg.engine.network import load_network
from lsdseg.engine.predict.predict import (
    create_predictions,
    finalize_predictions,
    is_predicted,
    prediction_channels,
    prediction_record,
    write_tile,
)
from lsdseg.engine.predict.rate import prediction_rate
from lsdseg.engine.predict.tile_size import tile_voxels, tile_with_context, tiles_in_words
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.engine.sample import Sample, samples_of
from lsdseg.engine.sections import along_zyx
from lsdseg.engine.statistics import warn_if_unlike
from lsdseg.files import PARTIAL


def predict_blockwise(cfg: CfgNode, skip_empty: bool = False) -> None:
    """Predict every zarr in the test folder on SYSTEM.NUM_WORKERS workers.

    Args:
        cfg: the config.
        skip_empty: skip blocks outside INS_SEGMENT.MASK_FILE and blocks where raw has no stored chunk.

    Raises:
        UserError: before anything is written, if a volume or the checkpoint cannot be used; later, if blocks fail.
    """
    samples = samples_of(cfg)
    names = [prediction_name(task) for task in prediction_channels(cfg)]
    load_network(cfg)
    if skip_empty:
        open_mask(cfg.INS_SEGMENT)
    for sample in samples:
        check_raw(sample.volume, cfg)
    warn_if_unlike(samples)
    for sample in samples:
        with working_on(sample.output, "predict"):
            record = prediction_record(sample, masked=skip_empty)
            begun = begun_before(
                cfg.DATA.DROP_DS_MONGOTABLE, sample.markers("predict"), begun_prediction, sample, record
            )
            if begun is None and not cfg.DATA.DROP_DS_MONGOTABLE and is_predicted(sample, record):
                print(f"{sample.output} is predicted already; to predict it again, set DATA.DROP_DS_MONGOTABLE True")
                continue
            tile = _tile(sample, begun is not None)
            print(tiles_in_words(cfg, tile, sample.raw.shape))
            if begun is None:
                create_predictions(sample, record, tile)
            step = _predict_step(sample, tile)
            step.settings = {"the prediction": (begun or record).id}
            if skip_empty:
                step.skip = _blocks_to_skip(sample, step)
            run_blocks(cfg, step)
            finalize_predictions(sample, missing_blocks(step.markers))
            complete(step)
            print(f"{', '.join(sorted(names))} in {sample.output}")


def begun_prediction(sample: Sample, record: Record) -> Record | None:
    """Return the record of a prediction that another run has begun block by block, None if there is none to go on with.

    Raises:
        UserError: it was begun with something else than what the record says.
    """
    if not sample.markers("predict").is_dir():
        return None
    existing, begun = set(list_arrays(sample.output)), None
    for name in (prediction_name(task) for task in prediction_channels(sample.cfg)):
        # A run may have ended between giving two datasets their final names.
        array = next((form for form in (f"{name}{PARTIAL}", name) if form in existing), None)
        begun = record_of(open_array(sample.output, array)) if array else None
        if begun is None:
            return None
        begun.require_same(f"{name} in {sample.output}", record)
    return begun


def open_worker(cfg: CfgNode, arguments: dict[str, Any]) -> Callable[[daisy.Block], Work]:
    """Load the network and open the arrays, once per worker.

    Args:
        cfg: the config.
        arguments: those of the step, see `_predict_step`.

    Returns:
        A function that predicts one block.
    """
    sample = Sample.of_arguments(cfg, arguments)
    raw, tile = sample.raw, tuple(arguments["tile"])
    predictor = TilePredictor(cfg)
    existing, arrays = set(list_arrays(sample.output)), {}
    for task in prediction_channels(cfg):
        name = prediction_name(task)  # it has its final name if records of finished blocks were lost since
        partial = f"{name}{PARTIAL}"
        arrays[task] = open_array(sample.output, partial if partial in existing else name, "r+")

    computed = tile_with_context(cfg, tile)  # also where a tile reaches beyond the volume

    def process(block: daisy.Block) -> Work:
        begin = tuple((block.write_roi.begin - raw.roi.begin) / raw.voxel_size)
        return Work(computed, write_tile(cfg, arrays, predictor(raw, begin, tile), begin, raw.shape))

    return process


def _tile(sample: Sample, begun: bool) -> Coordinate:
    """Return the voxels of a tile: as before where a run has begun, since the memory that is free may have changed."""
    cfg, raw = sample.cfg, sample.raw
    before = block_begun(sample.markers("predict")) if begun and cfg.MODEL.GROW_INPUT is None else None
    if before:
        return Coordinate(round(n / size) for n, size in zip(before, voxel_size_nm(raw), strict=True))
    return Coordinate(tile_voxels(cfg, raw.shape, cfg.SYSTEM.NUM_WORKERS or 1))


def _predict_step(sample: Sample, tile: Coordinate) -> BlockStep:
    """Describe the step that predicts a sample, one tile per block."""
    raw = sample.raw
    context = Coordinate(along_zyx(sample.cfg.MODEL.CONTEXT, 0)) * raw.voxel_size
    write_roi = Roi(raw.roi.begin, tile * raw.voxel_size)
    return BlockStep(
        name="predict",
        sample=sample.name,
        total_roi=raw.roi.grow(context, context),
        read_roi=write_roi.grow(context, context),
        write_roi=write_roi,
        open_worker=f"{__name__}:open_worker",
        arguments=sample.arguments | {"tile": list(tile)},
        markers=sample.markers("predict"),
        rate=partial(prediction_rate, sample.cfg),
        gpu=sample.cfg.TRAIN.DEVICE != "cpu",
        per_nanometer=units_per_nanometer(raw),
    )


def _blocks_to_skip(sample: Sample, step: BlockStep) -> NDArray[np.bool_]:
    """Find the blocks that need no prediction, from file names and the mask only, and print how many there are.

    Returns:
        True for the blocks to skip, in the shape of the grid of blocks.
    """
    raw, mask, block = sample.raw, sample.mask, step.write_roi.shape
    grid = tuple(-(-size // width) for size, width in zip(raw.roi.shape, block, strict=True))
    empty, outside = np.zeros(grid, bool), np.zeros(grid, bool)
    for index in np.ndindex(*grid):
        roi = Roi(raw.roi.begin + Coordinate(index) * block, block).intersect(raw.roi)
        empty[index] = not is_stored(sample.volume, sample.cfg.DATA.RAW, voxels_of(raw, roi))
        inside = read_mask(mask, roi, raw)
        outside[index] = inside is not None and not inside.any()
    print(
        f"{sample.volume.name}: of {empty.size} blocks, {np.count_nonzero(empty)} are skipped because raw has no chunk "
        f"there, and {np.count_nonzero(outside & ~empty)} more because they lie outside the mask"
    )
    return empty | outside
