"""Write what the network sees and predicts during training, as zarrs and as TensorBoard images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.volumes import write_array
from lsdseg.engine.intensity import display_intensity
from lsdseg.engine.training.pipeline import TrainingBatch


def write_snapshot(cfg: CfgNode, iteration: int, batch: TrainingBatch, predictions: dict[str, torch.Tensor]) -> Path:
    """Write the first element of a batch as a zarr.

    Args:
        cfg: the config.
        iteration: the number in the name of the zarr.
        batch: the batch.
        predictions: task -> predictions for the batch.

    Returns:
        The path OUTPUT_DIR/snapshot_N.zarr. It contains `volumes/raw`, `volumes/labels/neuron_ids`, and for each task
        `volumes/gt_TASK` and `volumes/pred_TASK`. Their offsets put the output in the middle of raw.
    """
    path = Path(cfg.MODEL.OUTPUT_DIR) / f"snapshot_{iteration}.zarr"
    voxel_size = tuple(cfg.MODEL.VOXEL_SIZE)
    margin = [(i - o) // 2 for i, o in zip(batch.raw.shape[2:], batch.labels.shape[1:], strict=True)]
    offset = tuple(m * v for m, v in zip(margin, voxel_size, strict=True))
    arrays: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
        "volumes/raw": (display_intensity(batch.raw[0, 0], cfg), (0,) * len(voxel_size)),
        "volumes/labels/neuron_ids": (batch.labels[0].astype(np.uint64), offset),
    }
    for task, prediction in predictions.items():
        arrays[f"volumes/gt_{task}"] = (batch.targets[task][0].astype(np.float32), offset)
        arrays[f"volumes/pred_{task}"] = (prediction[0].cpu().numpy(), offset)
    for name, (data, begin) in arrays.items():
        write_array(path, name, data, voxel_size=voxel_size, offset=begin)
    return path


def preview_images(batch: TrainingBatch, predictions: dict[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    """Return the middle sections of the first element of a batch.

    Returns:
        Name -> float32 (3, y, x) in 0..1. Raw is gray. Of each task, the first three channels are shown (affinities z,
        y, x; LSD offsets z, y, x).
    """
    raw = _section(batch.raw)
    images = {"raw": (raw - raw.min()) / max(np.ptp(raw), 1e-6)}
    for task, prediction in predictions.items():
        images[f"{task}/predicted"] = _section(prediction.cpu().numpy())
        images[f"{task}/target"] = _section(batch.targets[task].astype(np.float32))
    return images


def _section(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the middle section of the first element of a batch: its first three channels, (3, y, x)."""
    element = array[0] if array.ndim == 4 else array[0, :, array.shape[2] // 2]
    return element[np.minimum([0, 1, 2], len(element) - 1)]
