"""Prediction in one process: every volume in the test folder, from raw to affinities and LSDs on disk."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_utils.checks import check_raw
from data_utils.layout import output_path, volumes_in
from data_utils.volumes import create_array, open_array, rename_array, room_on_disk, source_defaults
from engine.predict.tiles import TilePredictor

# Predictions compress to about this part of their size; less room than that is certainly too little.
LEAST_COMPRESSED = 0.25


def predict(cfg) -> None:
    """Predict every zarr in the test folder with the weights TRAIN.CHECKPOINT.

    Raises:
        UserError: before anything is written, if a volume, the checkpoint or the device cannot be used, or the disk
            has no room.
    """
    volumes = volumes_in(cfg, "test")
    outputs = [output_path(cfg, path) for path in volumes]
    for path in volumes:
        check_raw(path, cfg)
    predictor = TilePredictor(cfg)
    for number, (path, output) in enumerate(zip(volumes, outputs, strict=True), start=1):
        print(f"[{number}/{len(volumes)}] {path.name} on {predictor.device}", flush=True)
        began = time.monotonic()
        names = predict_volume(cfg, predictor, path, output)
        print(f"{', '.join(names)} in {output} ({time.monotonic() - began:.0f} s)")


def output_name(task: str) -> str:
    """Dataset of a task's prediction."""
    return f"volumes/pred_{task}"


def predict_volume(cfg, predictor: TilePredictor, sample: Path, output: Path) -> list[str]:
    """Predict one volume; returns the names of the datasets in `output`.

    The datasets cover raw's whole ROI. They get their names when the last tile is written, so that a run that was
    ended half-way leaves nothing that looks like a prediction.
    """
    raw = open_array(sample, cfg.DATA.RAW, **source_defaults(cfg))
    dtype = np.dtype(cfg.DATA.AFFS_DTYPE)
    channels = predictor.channels | ({"affs_inverted": 1} if cfg.DATA.INVERT_PRED_AFFS else {})
    needed = sum(channels.values()) * math.prod(raw.shape) * dtype.itemsize * LEAST_COMPRESSED
    tiles = list(predictor.tiles(raw.shape))
    with room_on_disk(output, int(needed)):
        arrays = {
            task: create_array(
                output,
                f"{output_name(task)}.partial",
                (count, *raw.shape),
                voxel_size=raw.voxel_size,
                offset=raw.offset,
                dtype=dtype,
                chunk_shape=(count, *chunk_shape(tiles[0][1], raw.shape)),
                attributes={"offsets": [list(o) for o in cfg.TRAIN.NEIGHBORHOOD]} if task == "affs" else {},
            )
            for task, count in channels.items()
        }
        began, done = time.monotonic(), 0
        with tqdm(tiles, unit="tile") as bar:
            for begin, shape in bar:
                results = predictor(raw, begin, shape)
                if cfg.DATA.INVERT_PRED_AFFS:
                    results["affs_inverted"] = 1 - results["affs"].mean(axis=0, keepdims=True)
                inside = tuple(slice(b, min(b + s, size)) for b, s, size in zip(begin, shape, raw.shape, strict=True))
                for task, result in results.items():
                    cropped = result[:, *(slice(s.stop - s.start) for s in inside)]
                    arrays[task][:, *inside] = stored(cropped, dtype)
                done += math.prod(s.stop - s.start for s in inside)
                bar.set_postfix_str(f"{done / 1e6 / (time.monotonic() - began):.2f} Mvoxel/s")
        for task in arrays:
            rename_array(output, f"{output_name(task)}.partial", output_name(task))
    return [output_name(task) for task in arrays]


def stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in 0..1 as they are stored: uint8 as 0..255, rounded; floats as they are."""
    return np.rint(values * 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype)


def chunk_shape(tile_shape, volume_shape, largest: int = 96) -> tuple[int, ...]:
    """Chunks that tiles fill without sharing one: per axis the largest divisor of the tile up to `largest` voxels."""
    return tuple(
        min(size, max(n for n in range(1, min(tile, largest) + 1) if tile % n == 0))
        for tile, size in zip(tile_shape, volume_shape, strict=True)
    )
