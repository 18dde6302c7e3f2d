"""Prediction in one process: every volume in the test folder, from raw to affinities and LSDs on disk."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
from funlib.persistence import Array
from tqdm import tqdm

from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.checks import check_raw
from lsdseg.data_utils.layout import block_markers, output_path, prediction_name, volumes_in
from lsdseg.data_utils.volumes import chunk_shape, create_array, open_array, rename_array, source_defaults
from lsdseg.engine.blocks.run import forget
from lsdseg.engine.predict.tiles import TilePredictor, tile_voxels
from lsdseg.engine.sections import affinity_offsets
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk

# Predictions compress to about this part of their size; less room than that is certainly too little.
LEAST_COMPRESSED = 0.25


def predict(cfg) -> None:
    """Predict every zarr in the test folder with the weights TRAIN.CHECKPOINT.

    Raises:
        UserError: before anything is written, if a volume, the checkpoint, the device or a setting cannot be used, or
            the disk has no room.
    """
    volumes = volumes_in(cfg, "test")
    outputs = [output_path(cfg, path) for path in volumes]
    prediction_channels(cfg)
    for path in volumes:
        check_raw(path, cfg)
    predictor = TilePredictor(cfg)
    for number, (path, output) in enumerate(zip(volumes, outputs, strict=True), start=1):
        print(f"[{number}/{len(volumes)}] {path.name} on {predictor.precision.device}", flush=True)
        began = time.monotonic()
        names = predict_volume(cfg, predictor, path, output)
        print(f"{', '.join(names)} in {output} ({time.monotonic() - began:.0f} s)")


def predict_volume(cfg, predictor: TilePredictor, sample: Path, output: Path) -> list[str]:
    """Predict one volume; returns the names of the datasets in `output`.

    The datasets cover raw's whole ROI. They get their names when the last tile is written, so that a run that was
    ended half-way leaves nothing that looks like a prediction.
    """
    raw = open_array(sample, cfg.DATA.RAW, **source_defaults(cfg))
    tiles = list(predictor.tiles(raw.shape))
    with room_on_disk(output):
        arrays = create_predictions(cfg, output, raw)
        began, done = time.monotonic(), 0
        with tqdm(tiles, unit="tile") as bar:
            for begin, shape in bar:
                done += write_tile(cfg, arrays, predictor(raw, begin, shape), begin, raw.shape)
                bar.set_postfix_str(f"{done / 1e6 / (time.monotonic() - began):.2f} Mvoxel/s")
        return name_predictions(cfg, output)


def prediction_channels(cfg) -> dict[str, int]:
    """What is predicted -> number of channels: the network's tasks and, if configured, the inverted affinities.

    Raises:
        UserError: there are no affinities to invert.
    """
    channels = task_channels(cfg)
    if not cfg.DATA.INVERT_PRED_AFFS:
        return channels
    if "affs" not in channels:
        raise UserError(
            f"DATA.INVERT_PRED_AFFS is True, but {cfg.TRAIN.MODEL_TYPE} predicts no affinities: set it to False"
        )
    return channels | {"affs_inverted": 1}


def create_predictions(cfg, output: Path, raw: Array) -> dict[str, Array]:
    """Empty datasets on raw's voxels, named `.partial` until `name_predictions`, in chunks that no two tiles share.

    What is recorded of blocks that were done in earlier ones is forgotten.

    Raises:
        UserError: the disk has certainly too little room; workers of another run are writing.
    """
    dtype = np.dtype(cfg.DATA.AFFS_DTYPE)
    channels = prediction_channels(cfg)
    needed = sum(channels.values()) * math.prod(raw.shape) * dtype.itemsize * LEAST_COMPRESSED
    with room_on_disk(output, int(needed)):
        forget(block_markers(output, "predict"))
        return {
            task: create_array(
                output,
                f"{prediction_name(task)}.partial",
                (count, *raw.shape),
                voxel_size=raw.voxel_size,
                offset=raw.offset,
                dtype=dtype,
                chunk_shape=(count, *chunk_shape(tile_voxels(cfg, raw.shape), raw.shape)),
                attributes={"offsets": affinity_offsets(cfg)} if task == "affs" else {},
            )
            for task, count in channels.items()
        }


def write_tile(cfg, arrays: dict[str, Array], results: dict[str, np.ndarray], begin, volume_shape) -> int:
    """Write what `TilePredictor` gave for a tile; returns how many of its voxels lie in the volume."""
    if cfg.DATA.INVERT_PRED_AFFS:
        results = results | {"affs_inverted": 1 - results["affs"].mean(axis=0, keepdims=True)}
    shape = next(iter(results.values())).shape[1:]
    inside = tuple(slice(b, min(b + s, size)) for b, s, size in zip(begin, shape, volume_shape, strict=True))
    for task, result in results.items():
        cropped = result[:, *(slice(s.stop - s.start) for s in inside)]
        arrays[task][:, *inside] = stored(cropped, np.dtype(cfg.DATA.AFFS_DTYPE))
    return math.prod(s.stop - s.start for s in inside)


def name_predictions(cfg, output: Path) -> list[str]:
    """Give complete datasets of `create_predictions` their names, which are returned."""
    names = [prediction_name(task) for task in prediction_channels(cfg)]
    for name in names:
        rename_array(output, f"{name}.partial", name)
    return names


def stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in 0..1 as they are stored: uint8 as 0..255, rounded; floats as they are."""
    return np.rint(values * 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype)
