"""Run a trained network over a volume of any size, tile by tile.

A tile's output starts on a multiple of the network's down-sampling, where shifting the input shifts the output by
exactly as much; and it is computed from as much context as the network can see. So a voxel's prediction does not
depend on the tile that it falls into, and volumes can be cut into tiles of any size, or into blocks on many machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
from funlib.persistence import Array
from torch import nn
from tqdm import tqdm

from lsdseg.config.network_shapes import total_factor
from lsdseg.data_utils.volumes import read
from lsdseg.engine.device import Precision, explain_device_errors, resolve_device
from lsdseg.engine.intensity import network_intensity
from lsdseg.engine.network import load_weights
from lsdseg.engine.sections import along_zyx

SECTIONS_PER_TILE = 8


class TilePredictor:
    """A network on its device with the weights TRAIN.CHECKPOINT.

    Args:
        cfg: resolved config.
        model, precision: a network from raw to predictions to use in place of those weights, and its precision.

    Attributes:
        factor: voxels along z, y, x of which tile begins and shapes are multiples.
        context: voxels of raw along z, y, x that a tile needs on every side of its output.

    Raises:
        UserError: the device or the checkpoint cannot be used.
    """

    def __init__(self, cfg, model: nn.Module | None = None, precision: Precision | None = None):
        self.cfg = cfg
        self.precision = precision or Precision(cfg.TRAIN.MIXED_PRECISION, resolve_device(cfg))
        self.model = self.precision.place(load_weights(cfg) if model is None else model).eval()
        self.factor = along_zyx(total_factor(cfg.MODEL.DOWNSAMPLE_FACTORS), 1)
        self.context = along_zyx(cfg.MODEL.CONTEXT, 0)
        self.keeps_size = cfg.MODEL.PAD_CONV == "same"

    @torch.inference_mode()
    def __call__(self, raw: Array, begin: Sequence[int], shape: Sequence[int]) -> dict[str, np.ndarray]:
        """Predict an output block.

        Args:
            raw: (z, y, x) array on disk; mirrored where the block's context reaches beyond it.
            begin, shape: the block in voxels of `raw`, multiples of `factor`.

        Returns:
            task -> (channels, *shape) float32 in 0..1.

        Raises:
            UserError: too little memory.
        """
        begin_in = [b - c for b, c in zip(begin, self.context, strict=True)]
        shape_in = [s + 2 * c for s, c in zip(shape, self.context, strict=True)]
        block = torch.from_numpy(network_intensity(read_mirrored(raw, begin_in, shape_in), self.cfg))
        batch = block[:, None] if self.cfg.DATA.DIM_2D else block[None, None]
        with explain_device_errors("make GROW_INPUT of the network's section smaller"), self.precision.autocast():
            outputs = self.model(self.precision.place(batch))
        results = {}
        for task, output in outputs._asdict().items():
            volume = output.transpose(0, 1) if self.cfg.DATA.DIM_2D else output[0]
            if self.keeps_size:
                volume = volume[:, *(slice(c, c + s) for c, s in zip(self.context, shape, strict=True))]
            results[task] = volume.float().cpu().numpy()
        return results

    def region(self, raw: Array, begin: Sequence[int], shape: Sequence[int]) -> dict[str, np.ndarray]:
        """Predict a box of a volume that fits in memory, tile by tile.

        Args:
            raw: (z, y, x) array.
            begin: first voxel of the box in `raw`.
            shape: voxels of the box.

        Returns:
            task -> (channels, *shape) float32 in 0..1.

        Raises:
            UserError: too little memory.
        """
        results: dict[str, np.ndarray] = {}
        for first, tile in tqdm(list(self.tiles(shape)), desc="predicting", unit="tile", delay=10, leave=False):
            inside = tuple(slice(f, min(f + t, size)) for f, t, size in zip(first, tile, shape, strict=True))
            predicted = self(raw, [b + f for b, f in zip(begin, first, strict=True)], tile)
            for task, values in predicted.items():
                whole = results.setdefault(task, np.empty((len(values), *shape), np.float32))
                whole[:, *inside] = values[:, *(slice(s.stop - s.start) for s in inside)]
        return results

    def tiles(self, volume_shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(begin, shape) in voxels of the tiles that cover a volume; those at its end may reach beyond it."""
        shape = tile_voxels(self.cfg, volume_shape)
        for begin in product(*(range(0, size, s) for size, s in zip(volume_shape, shape, strict=True))):
            yield begin, shape


def tile_voxels(cfg, volume_shape: Sequence[int]) -> tuple[int, ...]:
    """Output voxels of a tile along z, y, x: OUTPUT_SHAPE + GROW_INPUT of the config, less where the volume is smaller.

    In 2D a tile is a few sections, which go through the network as one batch.
    """
    network = cfg.MODEL
    sizes = zip(
        along_zyx(network.OUTPUT_SHAPE, SECTIONS_PER_TILE),
        along_zyx(network.GROW_INPUT, 0),
        volume_shape,
        along_zyx(total_factor(network.DOWNSAMPLE_FACTORS), 1),
        strict=True,
    )
    return tuple(min(output + grow, -(-size // factor) * factor) for output, grow, size, factor in sizes)


def read_mirrored(array: Array, begin: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Voxels of a box that may reach beyond the array, mirrored at its faces (whose voxels are not repeated)."""
    indices = []
    for first, count, size in zip(begin, shape, array.shape, strict=True):
        period = max(1, 2 * (size - 1))
        index = np.arange(first, first + count) % period
        indices.append(np.minimum(index, period - index))
    block = read(array, tuple(slice(index.min(), index.max() + 1) for index in indices))
    return block[np.ix_(*(index - index.min() for index in indices))]
