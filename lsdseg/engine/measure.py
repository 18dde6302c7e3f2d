"""Prediction, fragments and contacts of a few small boxes of a volume, timed: for estimates without earlier runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from funlib.persistence import Array
from yacs.config import CfgNode

from lsdseg.config.model_types import TASKS
from lsdseg.engine.blocks.rates import Rate
from lsdseg.engine.post.affinities import direct_neighbors
from lsdseg.engine.post.contacts import settle, simplified
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.predict.predict import to_stored
from lsdseg.engine.predict.tile_size import tile_with_context
from lsdseg.engine.predict.tiles import TilePredictor

# Voxels of a box along an axis, where a processor predicts. A GPU takes a whole tile, which costs it no time.
EDGE = 64
# Boxes are timed until that many seconds have passed.
ENOUGH = 5.0
# Where boxes lie, as shares of the way from the first corner of the volume to the last. The first one is done twice,
# and the first time does not count: libraries are loaded and compiled then.
PLACES = (0.5, 0.5, 0.25, 0.75)


def measure_box(cfg: CfgNode, raw: Array, tile: Sequence[int], threads: int) -> dict[str, Rate]:
    """Time what workers do, on a few boxes of a volume.

    Args:
        cfg: the config.
        raw: (z, y, x), voxels of any size.
        tile: voxels of a tile along z, y, x; boxes are not larger.
        threads: that the network has in each worker, on a CPU.

    Returns:
        "prediction", "fragments" and "agglomeration" -> what the boxes took.

    Raises:
        UserError: the network or its device cannot be used, or there is not enough memory.
    """
    predictor, before = TilePredictor(cfg), torch.get_num_threads()
    torch.set_num_threads(threads)
    box = tuple(tile)
    if predictor.precision.device.type == "cpu":
        box = tuple(min(size, -(-EDGE // f) * f) for size, f in zip(tile, predictor.factor, strict=True))
    found, began = [], time.monotonic()
    for share in PLACES:
        room = (max(0, size - width) for size, width in zip(raw.shape, box, strict=True))
        begin = [int(share * free) // f * f for free, f in zip(room, predictor.factor, strict=True)]
        found.append(_measure(cfg, predictor, raw, begin, box))
        if time.monotonic() - began > ENOUGH:
            break
    torch.set_num_threads(before)
    counted = found[1:] or found
    return {step: sum((rates[step] for rates in counted), Rate()) for step in found[0]}


def _measure(
    cfg: CfgNode, predictor: TilePredictor, raw: Array, begin: Sequence[int], box: Sequence[int]
) -> dict[str, Rate]:
    settings, method = cfg.INS_SEGMENT, method_of(cfg.INS_SEGMENT)
    offsets = [tuple(offset) for offset in TASKS["affs"].attributes(cfg)["offsets"]]
    times = [time.monotonic()]
    predicted = predictor(raw, begin, box)
    times.append(time.monotonic())
    channels = method.channels(to_stored(predicted["affs"], np.dtype(np.uint8)), offsets)
    placement = None
    if settings.PLACEMENT and method.takes_placement and "placement" in predicted:
        given = [tuple(offset) for offset in TASKS["placement"].attributes(cfg)["offsets"]]
        placement = direct_neighbors(to_stored(predicted["placement"], np.dtype(np.uint8)), given)
    fragments = method.fragments(channels, settings, offsets, None, placement)
    times.append(time.monotonic())
    merge_function = method.merge_function(settings)
    contacts = method.contacts(channels, fragments, settings, offsets, (1, fragments.size))
    settle(simplified(contacts, merge_function), merge_function, method.limit(settings))
    times.append(time.monotonic())
    computed = {"prediction": tile_with_context(cfg, box), "fragments": fragments.size, "agglomeration": fragments.size}
    return {
        step: Rate(blocks=1, computed=voxels, seconds=seconds)
        for (step, voxels), seconds in zip(computed.items(), np.diff(times).tolist(), strict=True)
    }
