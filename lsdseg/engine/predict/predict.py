"""Prediction in one process: from raw data to affinities and LSDs on disk, for every volume in the test folder."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.model_types import MODEL_TYPES, TASKS, task_channels
from lsdseg.config.rules import PREDICTION, settings_of
from lsdseg.data_utils.checks import check_raw
from lsdseg.data_utils.gray import own_window
from lsdseg.data_utils.layout import measured_path, prediction_name
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.records import Record, file_fingerprint, identity, record_of
from lsdseg.data_utils.volumes import chunk_shape, create_array, list_arrays, open_array, rename_array, require_whole
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.blocks.markers import discard_markers
from lsdseg.engine.blocks.rates import Rate, bytes_written, keep_rate, read_rates
from lsdseg.engine.blocks.status import duration
from lsdseg.engine.predict.rate import prediction_rate
from lsdseg.engine.predict.tile_size import count_tiles, tile_voxels, tile_with_context, tiles_in_words
from lsdseg.engine.predict.tiles import TilePredictor, one_ahead
from lsdseg.engine.predict.views import views_of
from lsdseg.engine.sample import Sample, samples_of
from lsdseg.engine.statistics import prediction_window, warn_if_unlike
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, room_on_disk

# Compressed predictions take at least about this share of their size, so a disk with less room is certainly too small.
MIN_COMPRESSED_SHARE = 0.25


def predict(cfg: CfgNode) -> None:
    """Predict every zarr in the test folder with the weights TRAIN.CHECKPOINT.

    Raises:
        UserError: before anything is written, if a volume, the checkpoint, the device or a setting cannot be used, or
            the disk has no room.
    """
    samples = samples_of(cfg)
    prediction_channels(cfg)
    for sample in samples:
        check_raw(sample.volume, cfg)
    predictor = TilePredictor(cfg)
    warn_if_unlike(samples)
    for number, sample in enumerate(samples, start=1):
        print(f"[{number}/{len(samples)}] {sample.volume.name} on {predictor.precision.device}", flush=True)
        with working_on(sample.output, "predict"):
            record = prediction_record(sample)
            if not cfg.DATA.DROP_DS_MONGOTABLE and is_predicted(sample, record):
                print(f"{sample.output} is predicted already; to predict it again, set DATA.DROP_DS_MONGOTABLE True")
                continue
            began = time.monotonic()
            names = predict_sample(predictor, sample, record)
            print(f"{', '.join(names)} in {sample.output} ({time.monotonic() - began:.0f} s)")


def prediction_record(sample: Sample, masked: bool = False) -> Record:
    """Say what the prediction of a sample is made from.

    Args:
        sample: the sample.
        masked: INS_SEGMENT.MASK_FILE says where to predict.

    Raises:
        UserError: raw or the weights cannot be read.
    """
    cfg = sample.cfg
    inputs = {"raw": identity(sample.raw), "the file TRAIN.CHECKPOINT": file_fingerprint(cfg.TRAIN.CHECKPOINT)}
    if MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].first:
        inputs["the file TRAIN.CHECKPOINT_AC"] = file_fingerprint(cfg.TRAIN.CHECKPOINT_AC)
    if masked and sample.mask is not None:
        inputs["the mask"] = identity(sample.mask)
    return Record("prediction", inputs, settings_of(cfg, PREDICTION))


def is_predicted(sample: Sample, record: Record) -> bool:
    """Return whether a sample has all datasets of its prediction.

    Raises:
        UserError: one was made from something else than what the record says, or has lost chunks.
    """
    names = [prediction_name(task) for task in prediction_channels(sample.cfg)]
    existing = set(names) & set(list_arrays(sample.output))
    for name in sorted(existing):
        # One without a record was made by others, or by an earlier version: nobody can say from what.
        require_whole(sample.output, name)
        if made_from := record_of(open_array(sample.output, name)):
            made_from.require_same(f"{name} in {sample.output}", record)
    return len(existing) == len(names)


def predict_sample(predictor: TilePredictor, sample: Sample, record: Record) -> list[str]:
    """Predict the whole ROI of one sample.

    The datasets get their names after the last tile, so an interrupted run leaves nothing that looks like a prediction.

    Args:
        predictor: the network.
        sample: the sample.
        record: what `prediction_record` returned.

    Returns:
        The names of the datasets in the sample's output.
    """
    cfg, raw = sample.cfg, sample.raw
    with working_on(sample.output, "predict"):
        tile = tile_voxels(cfg, raw.shape)
        arrays, tiles = create_predictions(sample, record, tile), count_tiles(tile, raw.shape)
        computed, name = tile_with_context(cfg, tile), prediction_rate(cfg)
        known = read_rates([measured_path(cfg)]).get(name)
        about = f"; about {duration(known.seconds_for(tiles * computed))}" if known else ""
        print(f"{tiles_in_words(cfg, tile, raw.shape)}{about}", flush=True)
        began, before = time.monotonic(), bytes_written()
        with (
            tqdm(total=math.prod(raw.shape), unit="voxel", unit_scale=True) as bar,
            ThreadPoolExecutor(max_workers=1) as writer,
        ):
            predicted = predictor.predict_tiles(raw, (0,) * len(raw.shape), raw.shape, tile)
            writes = (writer.submit(write_tile, cfg, arrays, values, begin, raw.shape) for begin, values in predicted)
            for written in one_ahead(writes):
                bar.update(written)
        measured = Rate(
            blocks=tiles,
            computed=tiles * computed,
            written=math.prod(raw.shape),
            seconds=time.monotonic() - began,
            bytes=bytes_written() - before,
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000,
            largest=computed,
        )
        keep_rate(cfg, name, measured)
        return finalize_predictions(sample)


def prediction_channels(cfg: CfgNode) -> dict[str, int]:
    """Return how many channels each prediction has.

    Returns:
        Name -> number of channels, for the network's tasks, and with DATA.INVERT_PRED_AFFS and DATA.DISAGREEMENT, for
        the inverted affinities and the disagreement of views.

    Raises:
        UserError: there are no affinities to invert, no views that could disagree, or not the views of DATA.VIEWS.
    """
    channels = task_channels(cfg)
    of_affinities = {"INVERT_PRED_AFFS": "affs_inverted", "DISAGREEMENT": "disagreement"}
    for key in (key for key in of_affinities if cfg.DATA[key]):
        if "affs" not in task_channels(cfg):
            raise UserError(f"DATA.{key} is True, but {cfg.TRAIN.MODEL_TYPE} predicts no affinities: set it to False")
        channels |= {of_affinities[key]: 1}
    views_of(cfg)
    if cfg.DATA.DISAGREEMENT and cfg.DATA.VIEWS == 1:
        raise UserError("DATA.DISAGREEMENT is True, but one view disagrees with nobody: set DATA.VIEWS to 4 or more")
    return channels


def create_predictions(sample: Sample, record: Record, tile: Sequence[int]) -> dict[str, Array]:
    """Create empty datasets on raw's voxels, in chunks that no two tiles share.

    Their names end in PARTIAL until `finalize_predictions`. The markers of blocks in earlier datasets are deleted.

    Args:
        sample: the sample.
        record: what `prediction_record` returned.
        tile: voxels of a tile along z, y, x.

    Returns:
        Name, as in `prediction_channels` -> array.

    Raises:
        UserError: the disk is certainly too small, or the workers of another run are writing.
    """
    cfg, raw, output = sample.cfg, sample.raw, sample.output
    dtype = np.dtype(cfg.DATA.AFFS_DTYPE)
    channels = prediction_channels(cfg)
    window = {} if own_window(raw.dtype) == (chosen := prediction_window(raw, cfg)) else {"raw_window": list(chosen)}
    if window:
        print(f"{cfg.DATA.RAW} is {raw.dtype}: {chosen[0]:g} becomes 0, and {chosen[1]:g} becomes 1 (DATA.RAW_WINDOW)")
    needed = sum(channels.values()) * math.prod(raw.shape) * dtype.itemsize * MIN_COMPRESSED_SHARE
    with room_on_disk(output, int(needed)):
        discard_markers(sample.markers("predict"))
        return {
            task: create_array(
                output,
                f"{prediction_name(task)}{PARTIAL}",
                (count, *raw.shape),
                voxel_size=voxel_size_nm(raw),
                offset=offset_nm(raw),
                dtype=dtype,
                chunk_shape=(count, *chunk_shape(tile, raw.shape)),
                attributes=(TASKS[task].attributes(cfg) if task in TASKS else {}) | window | record.attributes,
            )
            for task, count in channels.items()
        }


def write_tile(
    cfg: CfgNode,
    arrays: dict[str, Array],
    results: dict[str, NDArray[np.float32]],
    begin: Sequence[int],
    volume_shape: Sequence[int],
) -> int:
    """Write the predictions of one tile.

    Args:
        cfg: the config.
        arrays: what `create_predictions` returned.
        results: what `TilePredictor` returned.
        begin: first voxel of the tile in the volume.
        volume_shape: voxels of the volume. Whatever lies beyond it is cut off.

    Returns:
        The number of voxels of the tile that lie in the volume.
    """
    if cfg.DATA.INVERT_PRED_AFFS:
        results = results | {"affs_inverted": 1 - results["affs"].mean(axis=0, keepdims=True)}
    shape = next(iter(results.values())).shape[1:]
    inside = tuple(slice(b, min(b + s, size)) for b, s, size in zip(begin, shape, volume_shape, strict=True))
    for task, result in results.items():
        cropped = result[:, *(slice(s.stop - s.start) for s in inside)]
        arrays[task][:, *inside] = to_stored(cropped, np.dtype(cfg.DATA.AFFS_DTYPE))
    return math.prod(s.stop - s.start for s in inside)


def finalize_predictions(sample: Sample, missing: Sequence[Any] = ()) -> list[str]:
    """Give the complete datasets of `create_predictions` their final names, unless they have them; return these.

    Args:
        sample: whose predictions they are.
        missing: see `seal_array`.
    """
    names = [prediction_name(task) for task in prediction_channels(sample.cfg)]
    for name in set(names) & {array.removesuffix(PARTIAL) for array in list_arrays(sample.output) if PARTIAL in array}:
        rename_array(sample.output, f"{name}{PARTIAL}", name, missing)
    return names


def to_stored(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert values in 0..1 to the type on disk: rounded to 0..255 for uint8, unchanged for floats."""
    return np.rint(values * 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype)
