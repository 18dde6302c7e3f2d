"""What the network sees and says during training, as zarrs and as TensorBoard images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lsdseg.data_utils.volumes import write_array
from lsdseg.engine.intensity import display_intensity
from lsdseg.engine.training.pipeline import TrainingBatch


def write_snapshot(cfg, iteration: int, batch: TrainingBatch, predictions: dict[str, torch.Tensor]) -> Path:
    """Write the first element of a batch to OUTPUT_DIR/snapshot_N.zarr and return its path.

    `volumes/raw`, `volumes/labels/neuron_ids`, and per task `volumes/gt_TASK` and `volumes/pred_TASK`, all placed
    so that the output lies in the middle of raw.
    """
    path = Path(cfg.MODEL.OUTPUT_DIR) / f"snapshot_{iteration}.zarr"
    voxel_size = tuple(cfg.MODEL.VOXEL_SIZE)
    margin = [(i - o) // 2 for i, o in zip(batch.raw.shape[2:], batch.labels.shape[1:], strict=True)]
    offset = tuple(m * v for m, v in zip(margin, voxel_size, strict=True))
    arrays = {
        "volumes/raw": (display_intensity(batch.raw[0, 0], cfg), (0,) * len(voxel_size)),
        "volumes/labels/neuron_ids": (batch.labels[0].astype(np.uint64), offset),
    }
    for task, prediction in predictions.items():
        arrays[f"volumes/gt_{task}"] = (batch.targets[task][0], offset)
        arrays[f"volumes/pred_{task}"] = (prediction[0].cpu().numpy(), offset)
    for name, (data, begin) in arrays.items():
        write_array(path, name, data, voxel_size=voxel_size, offset=begin)
    return path


def sample_images(batch: TrainingBatch, predictions: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Middle sections of a batch's first element: name -> (3, y, x) float32 in 0..1.

    Raw in grey; of every task the first three channels (affinities z, y, x; LSD offsets z, y, x).
    """
    raw = _section(batch.raw)
    images = {"raw": (raw - raw.min()) / max(np.ptp(raw), 1e-6)}
    for task, prediction in predictions.items():
        images[f"{task}/predicted"] = _section(prediction.cpu().numpy())
        images[f"{task}/target"] = _section(batch.targets[task])
    return images


def _section(array: np.ndarray) -> np.ndarray:
    """Middle section, (3, y, x), of a batch's first element: its first three channels."""
    element = array[0] if array.ndim == 4 else array[0, :, array.shape[2] // 2]
    return element[np.minimum([0, 1, 2], len(element) - 1)]
