"""Prediction block by block on many workers: one tile of the network is one block, one GPU or core group one worker.

Tiles do not depend on each other (see `lsdseg.engine.predict.tiles`), and chunks on disk divide a tile, so workers
never touch the same file. What `predicter.py` gives, this gives too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from funlib.geometry import Coordinate, Roi

from lsdseg.data_utils.checks import check_raw
from lsdseg.data_utils.layout import block_markers, output_path, prediction_name, sample_name, volumes_in
from lsdseg.data_utils.masks import open_mask, read_mask
from lsdseg.data_utils.volumes import is_stored, list_arrays, open_array, source_defaults, voxels_of
from lsdseg.engine.blocks.run import BlockTask, run_blocks
from lsdseg.engine.network import load_weights
from lsdseg.engine.predict.predict import create_predictions, name_predictions, prediction_channels, write_tile
from lsdseg.engine.predict.tiles import TilePredictor, tile_voxels
from lsdseg.engine.sections import along_zyx


def predict_blockwise(cfg, skip_empty: bool = False) -> None:
    """Predict every zarr in the test folder on SYSTEM.NUM_WORKERS workers.

    Args:
        skip_empty: leave out blocks outside INS_SEGMENT.MASK_FILE and blocks without any stored chunk of raw.

    Raises:
        UserError: before anything is written, if a volume or the checkpoint cannot be used; later, if blocks fail.
    """
    samples = volumes_in(cfg, "test")
    outputs = [output_path(cfg, sample) for sample in samples]
    names = {prediction_name(kind) for kind in prediction_channels(cfg)}
    partial = {f"{name}.partial" for name in names}
    load_weights(cfg)
    if skip_empty:
        open_mask(cfg.INS_SEGMENT)
    for sample in samples:
        check_raw(sample, cfg)
    for sample, output in zip(samples, outputs, strict=True):
        task = _predict_task(cfg, sample, output)
        existing = set(list_arrays(output))
        begun = task.markers.is_dir()  # if not, partial arrays are not from here: type and chunks may be others
        if names <= existing and not begun and not cfg.DATA.DROP_DS_MONGOTABLE:
            print(f"{output} is predicted already; DATA.DROP_DS_MONGOTABLE True predicts it anew")
            continue
        if cfg.DATA.DROP_DS_MONGOTABLE or not (begun and (partial <= existing or names <= existing)):
            create_predictions(cfg, output, open_array(sample, cfg.DATA.RAW, **source_defaults(cfg)))
        if skip_empty:
            task.skip = _blocks_to_skip(cfg, sample, task)
            task.settings |= {f"INS_SEGMENT.{key}": cfg.INS_SEGMENT[key] for key in ("MASK_FILE", "MASK_DATASET")}
        run_blocks(cfg, task)
        if partial <= set(list_arrays(output)):
            name_predictions(cfg, output)
        print(f"{', '.join(sorted(names))} in {output}")


def open_predict_worker(cfg, arguments):
    """What a worker does with a block: the network is loaded once, then tile after tile is predicted."""
    raw = open_array(arguments["sample"], cfg.DATA.RAW, **source_defaults(cfg))
    predictor = TilePredictor(cfg)
    arrays = {
        kind: open_array(arguments["output"], f"{prediction_name(kind)}.partial", "r+")
        for kind in prediction_channels(cfg)
    }
    tile = tuple(arguments["tile"])

    def process(block):
        begin = tuple((block.write_roi.begin - raw.roi.begin) / raw.voxel_size)
        write_tile(cfg, arrays, predictor(raw, begin, tile), begin, raw.shape)

    return process


def _predict_task(cfg, sample: Path, output: Path) -> BlockTask:
    raw = open_array(sample, cfg.DATA.RAW, **source_defaults(cfg))
    tile = Coordinate(tile_voxels(cfg, raw.shape))
    context = Coordinate(along_zyx(cfg.MODEL.CONTEXT, 0)) * raw.voxel_size
    write_roi = Roi(raw.roi.begin, tile * raw.voxel_size)
    return BlockTask(
        name="predict",
        sample=sample_name(output),
        total_roi=raw.roi.grow(context, context),
        read_roi=write_roi.grow(context, context),
        write_roi=write_roi,
        open_worker=f"{__name__}:open_predict_worker",
        arguments={"sample": str(sample.absolute()), "output": str(output.absolute()), "tile": list(tile)},
        markers=block_markers(output, "predict"),
        settings={
            "TRAIN.CHECKPOINT": cfg.TRAIN.CHECKPOINT,
            "TRAIN.CHECKPOINT_AC": cfg.TRAIN.CHECKPOINT_AC,
            "DATA.AFFS_DTYPE": cfg.DATA.AFFS_DTYPE,
        },
        gpu=True,
    )


def _blocks_to_skip(cfg, sample: Path, task: BlockTask) -> np.ndarray:
    """Which blocks need no prediction, and says why; looks at file names and at the mask, not at raw's voxels."""
    raw, mask = open_array(sample, cfg.DATA.RAW, **source_defaults(cfg)), open_mask(cfg.INS_SEGMENT)
    block = task.write_roi.shape
    grid = tuple(-(-size // step) for size, step in zip(raw.roi.shape, block, strict=True))
    empty, outside = np.zeros(grid, bool), np.zeros(grid, bool)
    for index in np.ndindex(*grid):
        roi = Roi(raw.roi.begin + Coordinate(index) * block, block).intersect(raw.roi)
        empty[index] = not is_stored(sample, cfg.DATA.RAW, voxels_of(raw, roi))
        inside = read_mask(mask, roi, raw.voxel_size)
        outside[index] = inside is not None and not inside.any()
    print(
        f"{sample.name}: of {empty.size} blocks {np.count_nonzero(empty)} are skipped because raw has no chunk there, "
        f"{np.count_nonzero(outside & ~empty)} more because they lie outside the mask"
    )
    return empty | outside
