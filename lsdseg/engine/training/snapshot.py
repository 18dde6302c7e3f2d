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
from lsdseg.pictures import RGBImage, enlarged, gray_image, label_image

PANEL, GAP = 400, 8  # pixels: the width that a panel of a picture is enlarged to, and between two of them
FIRST_PREVIEW = 100  # iterations until the first picture


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


def preview_images(batch: TrainingBatch, predictions: dict[str, torch.Tensor]) -> dict[str, RGBImage]:
    """Return pictures of the middle section of the first element of a batch, on the voxels of the output.

    Returns:
        Name -> panels side by side: raw and labels, and for each task raw, target and prediction. Of a task, the first
        three channels are red, green and blue (affinities z, y, x; LSD offsets z, y, x).
    """
    output = batch.labels.shape[1:]
    margin = [(i - o) // 2 for i, o in zip(batch.raw.shape[2:], output, strict=True)]
    inside = tuple(slice(m, m + o) for m, o in zip(margin, output, strict=True))
    raw = enlarged(gray_image(_section(batch.raw[0, 0][inside])), PANEL)
    images = {"labels": [raw, label_image(_section(batch.labels[0]), PANEL)]}
    for task, prediction in predictions.items():
        pair = batch.targets[task][0].astype(np.float32), prediction[0].float().cpu().numpy()
        images[task] = [raw, *(enlarged(_channels_image(array), PANEL) for array in pair)]
    return {f"preview/{name}": _side_by_side(panels) for name, panels in images.items()}


def is_preview_due(iteration: int, save_every: int) -> bool:
    """Return whether to show pictures: with every checkpoint and, until the first one, at 100, 200, 400, 800 ..."""
    hundreds, rest = divmod(iteration, FIRST_PREVIEW)
    return iteration % save_every == 0 or (iteration < save_every and rest == 0 and hundreds.bit_count() == 1)


def _channels_image(array: NDArray[np.float32]) -> RGBImage:
    """Show the middle section of the first three channels of an array (channels, z, y, x) in 0..1."""
    section = np.stack([_section(array[min(channel, len(array) - 1)]) for channel in range(3)], axis=-1)
    return (255 * section.clip(0, 1)).astype(np.uint8)


def _section(array: NDArray[Any]) -> NDArray[Any]:
    """Return the middle section (y, x) of an array (z, y, x), or the array if it is (y, x)."""
    return array if array.ndim == 2 else array[len(array) // 2]


def _side_by_side(panels: list[RGBImage]) -> RGBImage:
    """Put pictures of one height next to each other, with a gap in white."""
    gap = np.full((len(panels[0]), GAP, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (gap, panel)][1:], axis=1)
