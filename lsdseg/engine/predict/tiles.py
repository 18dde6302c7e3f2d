"""Run a trained network over a volume of any size, tile by tile.

The output of a tile starts at a multiple of the network's down-sampling, where shifting the input shifts the output by
exactly as much. It is computed from all the context that the network can see. The prediction of a voxel therefore does
not depend on the tile that contains it. A volume can be cut into tiles of any size, or into blocks on many machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from funlib.persistence import Array
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.network_shapes import total_factor
from lsdseg.data_utils.volumes import read
from lsdseg.engine.device import Precision, explain_device_errors, resolve_device
from lsdseg.engine.fastest import find_precision
from lsdseg.engine.intensity import network_intensity, raw_window
from lsdseg.engine.network import load_network
from lsdseg.engine.predict.tile_size import count_tiles, tile_voxels
from lsdseg.engine.predict.views import Combination, margins, turned_back, views_of
from lsdseg.engine.sections import along_zyx
from lsdseg.engine.statistics import prediction_window
from lsdseg.models.inside import Box

Shape = tuple[int, ...]
Result = TypeVar("Result")

# Voxels along each axis of the tile with which precisions are timed, rounded up to what the network takes.
SMALL_TILE = 32


class TilePredictor:
    """A network that predicts tiles of a volume.

    Args:
        cfg: the config.
        model: network from raw data to predictions. By default, it is built from the config and gets the weights
            TRAIN.CHECKPOINT.
        precision: the precision and the device of the network. By default, those of the config.

    Attributes:
        precision: the precision and the device of the network.
        model: the network, in evaluation mode.
        views: the views of each tile to predict.
        factor: voxels along z, y, x; the begins and shapes of tiles are multiples of it.
        context: voxels of raw data along z, y, x that a tile needs on each side of its output.

    Raises:
        UserError: the device, the checkpoint or DATA.VIEWS cannot be used.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module | None = None, precision: Precision | None = None) -> None:
        self.cfg = cfg
        network = (load_network(cfg) if model is None else model).eval()
        # While a network is trained, its checkpoint knows nothing yet, and the volume decides alone.
        self._window = lru_cache(maxsize=4)(partial(prediction_window if model is None else raw_window, cfg=cfg))
        self.factor = along_zyx(total_factor(cfg.MODEL.DOWNSAMPLE_FACTORS), 1)
        self.context = along_zyx(cfg.MODEL.CONTEXT, 0)
        self.keeps_size = cfg.MODEL.PAD_CONV == "same"
        self.views = views_of(cfg)
        # Around the voxels of a tile: those that each view predicts, and the largest of them in whole steps of the
        # down-sampling, so that every view starts where shifts of its input are shifts of its output.
        self.around = [margins(view, cfg) for view in self.views]
        self.widest = [
            tuple(-(-max(along) // f) * f for along in zip(*ends, strict=True))
            for f, ends in zip(self.factor, zip(*self.around, strict=True), strict=True)
        ]
        self.precision = precision or find_precision(
            cfg.TRAIN.MIXED_PRECISION, resolve_device(cfg), network, self._small_tile
        )
        self.model = self.precision.place(network)

    def __call__(self, raw: Array, begin: Sequence[int], shape: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Predict a tile.

        Args:
            raw: (z, y, x) array. It is mirrored where the context of the tile reaches beyond it.
            begin: first output voxel of the tile in `raw`, a multiple of `factor`.
            shape: output voxels of the tile, a multiple of `factor`.

        Returns:
            Task -> float32 (channels, *shape) in 0..1, of all views together; with DATA.DISAGREEMENT, also
            "disagreement" (1, *shape).

        Raises:
            UserError: there is not enough memory.
        """
        return self.predict_voxels(self.read(raw, begin, shape), shape)

    def read(self, raw: Array, begin: Sequence[int], shape: Sequence[int]) -> NDArray[np.float32]:
        """Read a tile with all that its prediction depends on, in the network's gray values; arguments as above."""
        input_begin = [b - c - low for b, c, (low, _) in zip(begin, self.context, self.widest, strict=True)]
        return network_intensity(read_mirrored(raw, input_begin, self.input_shape(shape)), self.cfg, self._window(raw))

    def predict_voxels(self, voxels: NDArray[np.float32], shape: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Predict a tile of a shape from what `read` returned; results as above."""
        combination = Combination(self.cfg)
        for view, ends in zip(self.views, self.around, strict=True):
            box = [
                (c + most - low, c + most + s + high)
                for c, s, (low, high), (most, _) in zip(self.context, shape, ends, self.widest, strict=True)
            ]
            outputs = self._run(self.model, self.precision, view.of(voxels), view.box(box, self.input_shape(shape)))
            predicted = {task: output.float().cpu().numpy() for task, output in outputs.items()}
            combination.add(
                {task: turned_back(task, values, view, ends, self.cfg) for task, values in predicted.items()}
            )
        return combination.results()

    def input_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the voxels along z, y, x of what `read` returns for a tile of a shape."""
        return [s + 2 * c + low + high for s, c, (low, high) in zip(shape, self.context, self.widest, strict=True)]

    @torch.inference_mode()
    def _run(self, model: nn.Module, precision: Precision, voxels: NDArray[np.float32], box: Box) -> dict[str, Tensor]:
        """Predict a box (begin and end along z, y, x) of an array that reaches farther by the context or more."""
        batch = torch.from_numpy(np.ascontiguousarray(voxels))
        batch = batch[:, None] if self.cfg.DATA.DIM_2D else batch[None, None]
        inside = box[-(batch.ndim - 2) :] if self.keeps_size else None
        with explain_device_errors("set a smaller GROW_INPUT in the network's section"), precision.autocast():
            outputs = model(precision.place(batch), inside)
        # Without padding, the context is missing already.
        first = [b - (0 if self.keeps_size else c) for (b, _), c in zip(box, self.context, strict=True)]
        crop = [slice(f, f + end - begin) for f, (begin, end) in zip(first, box, strict=True)]
        volumes = {
            task: output.transpose(0, 1) if self.cfg.DATA.DIM_2D else output[0]
            for task, output in outputs._asdict().items()
        }
        return {task: volume if self.keeps_size else volume[:, *crop] for task, volume in volumes.items()}

    def _small_tile(self, model: nn.Module, precision: Precision) -> list[Tensor]:
        """Predict a tile of random voxels, to time it."""
        shape = along_zyx([-(-SMALL_TILE // f) * f for f in self.factor][-len(self.cfg.MODEL.CONTEXT) :], 1)
        box = tuple((c, c + s) for c, s in zip(self.context, shape, strict=True))
        size = [end + c for (_, end), c in zip(box, self.context, strict=True)]
        voxels = np.random.default_rng(0).random(size, np.float32) * 2 - 1
        return list(self._run(model, precision, voxels, box).values())

    def predict_tiles(
        self, raw: Array, begin: Sequence[int], shape: Sequence[int], tile: Shape
    ) -> Iterator[tuple[Shape, dict[str, NDArray[np.float32]]]]:
        """Predict a box of a volume. The next tile is read while one is computed.

        Args:
            raw: (z, y, x) array.
            begin: first voxel of the box in `raw`.
            shape: voxels of the box.
            tile: voxels of a tile, see `tile_voxels`.

        Yields:
            The first voxel of a tile in the box, and its prediction, which may reach beyond the end of the box.
        """
        with ThreadPoolExecutor(max_workers=1) as reader:

            def read_tile(first: Shape) -> tuple[Shape, NDArray[np.float32]]:
                return first, self.read(raw, [b + f for b, f in zip(begin, first, strict=True)], tile)

            for first, voxels in one_ahead(reader.submit(read_tile, first) for first in begins(tile, shape)):
                yield first, self.predict_voxels(voxels, tile)

    def predict_box(self, raw: Array, begin: Sequence[int], shape: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Predict a box of a volume tile by tile, in memory.

        Args:
            raw: (z, y, x) array.
            begin: first voxel of the box in `raw`.
            shape: voxels of the box.

        Returns:
            Task -> float32 (channels, *shape) in 0..1.

        Raises:
            UserError: there is not enough memory.
        """
        results: dict[str, NDArray[np.float32]] = {}
        tile = tile_voxels(self.cfg, shape)
        tiles, count = self.predict_tiles(raw, begin, shape, tile), count_tiles(tile, shape)
        for first, predicted in tqdm(tiles, total=count, desc="predicting", unit="tile", delay=10, leave=False):
            for task, values in predicted.items():
                whole = results.setdefault(task, np.empty((len(values), *shape), np.float32))
                place = whole[:, *(slice(f, f + size) for f, size in zip(first, values.shape[1:], strict=True))]
                place[:] = values[:, *map(slice, place.shape[1:])]
        return results


def begins(tile: Shape, volume_shape: Sequence[int]) -> Iterator[Shape]:
    """Yield the first voxels of the tiles that cover a volume. The last ones may reach beyond its end."""
    return product(*(range(0, size, width) for size, width in zip(volume_shape, tile, strict=True)))


def one_ahead(futures: Iterator[Future[Result]]) -> Iterator[Result]:
    """Yield the results of futures in order. Each is waited for when the next one has begun."""
    waiting = next(futures, None)
    while waiting is not None:
        following = next(futures, None)
        yield waiting.result()
        waiting = following


def read_mirrored(array: Array, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
    """Read a box that may reach beyond the array.

    Beyond its faces, the array is mirrored. The voxels at the faces are not repeated.
    """
    indices = []
    for first, count, size in zip(begin, shape, array.shape, strict=True):
        period = max(1, 2 * (size - 1))
        index = np.arange(first, first + count) % period
        indices.append(np.minimum(index, period - index))
    box = read(array, tuple(slice(index.min(), index.max() + 1) for index in indices))
    mirrored: NDArray[Any] = box[np.ix_(*(index - index.min() for index in indices))]
    return mirrored
