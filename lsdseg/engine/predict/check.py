"""What a volume must be for a network that was trained on another one: all of it is looked at before hours of work."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from lsdseg.data_utils.checks import check_raw
from lsdseg.data_utils.volumes import open_array
from lsdseg.engine.device import resolve_device
from lsdseg.engine.network import load_weights
from lsdseg.engine.predict.predict import LEAST_COMPRESSED, prediction_channels
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk


def check_before_segmenting(path: Path, output: Path, cfg) -> None:
    """Check that raw can be rescaled to MODEL.VOXEL_SIZE, segmented with TRAIN.CHECKPOINT and written to a new zarr.

    Raises:
        UserError: raw's voxel size is unknown or not the same along all axes, or raw is otherwise refused by
            `check_raw`; the output exists; the weights or the device cannot be used; there is no room on disk.
    """
    raw = open_array(path, cfg.DATA.RAW)
    where, own, trained = f"{cfg.DATA.RAW} in {path}", tuple(raw.voxel_size), cfg.MODEL.VOXEL_SIZE
    if own != (own[0],) * 3:
        raise UserError(
            f"{where} has voxel size {own} nm, and these weights are for isotropic volumes: make its voxels "
            "cubes with data_utils/rescale.py if they nearly are, else train a network on data like it (trainer.py)"
        )
    own_size = cfg.clone()
    own_size.defrost()
    own_size.MODEL.VOXEL_SIZE = own
    check_raw(path, own_size)
    if output.exists():
        raise UserError(f"{output} exists: delete it, or name another output")
    resolve_device(cfg)
    load_weights(cfg)

    voxels = math.prod(raw.roi.shape) / math.prod(trained)
    values = voxels * (raw.dtype.itemsize + sum(prediction_channels(cfg).values()))
    with room_on_disk(output, int(values * LEAST_COMPRESSED)):
        pass
    if not 0.5 <= own[0] / trained[0] <= 2:
        print(
            f"warning: {where} has voxels of {own[0]} nm and the network was trained on {trained[0]} nm: "
            "beyond a factor of 2, expect little of the segmentation",
            file=sys.stderr,
        )
