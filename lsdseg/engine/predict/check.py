"""Checks before `segment.py` starts: can this network segment this volume? They run before hours of work do."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.data_utils.checks import check_raw
from lsdseg.data_utils.layout import SEGMENTATIONS
from lsdseg.data_utils.placement import voxel_size_nm
from lsdseg.data_utils.records import record_of
from lsdseg.data_utils.volumes import list_arrays, open_array
from lsdseg.engine.device import resolve_device
from lsdseg.engine.network import load_network
from lsdseg.engine.predict.predict import MIN_COMPRESSED_SHARE, prediction_channels
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk


def check_before_segmenting(path: Path, output: Path, cfg: CfgNode, names: Sequence[str] = ()) -> None:
    """Check that a volume can be rescaled, segmented and written. Warn if its voxels differ by more than a factor of 2.

    Args:
        path: zarr with the raw data, of any voxel size. It will be rescaled to MODEL.VOXEL_SIZE.
        output: zarr to write.
        cfg: the config of the network with the weights TRAIN.CHECKPOINT.
        names: datasets to write there; other segmentations may be there already.

    Raises:
        UserError: the voxel size of the raw data is unknown or differs between axes; `check_raw` refuses the raw data;
            the output holds one of the datasets, or something else; the weights or the device cannot be used; the disk
            has no room.
    """
    raw = open_array(path, cfg.DATA.RAW, default_key="--resolution Z Y X")
    where, own, trained = f"{cfg.DATA.RAW} in {path}", voxel_size_nm(raw), cfg.MODEL.VOXEL_SIZE
    if own != (own[0],) * 3:
        raise UserError(
            f"{where} has voxel size {own} nm, but these weights are for isotropic volumes: make its voxels cubes with "
            "data_utils/rescale.py if they almost are, otherwise train a network on similar data (trainer.py)"
        )
    own_size = cfg.clone()
    own_size.defrost()
    own_size.MODEL.VOXEL_SIZE = own
    check_raw(path, own_size)
    there = list_arrays(output)
    if output.exists() and not (there and all(map(SEGMENTATIONS.fullmatch, there))):
        raise UserError(f"{output} exists: delete it, or name another output")
    of_others = [name for name in sorted(set(there) & set(names)) if record_of(open_array(output, name)) is None]
    if of_others:
        raise UserError(
            f"{output} holds {', '.join(of_others)}, which does not say what it was made from: delete it, or name "
            "another threshold or output"
        )
    resolve_device(cfg)
    load_network(cfg)

    voxels = math.prod(raw.shape) * math.prod(own) / math.prod(trained)
    values = voxels * (raw.dtype.itemsize + sum(prediction_channels(cfg).values()))
    with room_on_disk(output, int(values * MIN_COMPRESSED_SHARE)):
        pass
    if not 0.5 <= own[0] / trained[0] <= 2:
        print(
            f"warning: {where} has voxels of {own[0]} nm, but the network was trained on {trained[0]} nm: "
            "beyond a factor of 2, expect a poor segmentation",
            file=sys.stderr,
        )
