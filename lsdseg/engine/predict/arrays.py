"""Prediction of a numpy array. It does what `predicter.py` does, without folders and config files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.config.network_shapes import nearest_input_shapes
from lsdseg.data_utils.layout import PREDICT_CONFIG
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.errors import UserError
from lsdseg.models.checkpoint import read_checkpoint

# Without a config, the input of a tile is as close to this many voxels along each axis as the network allows.
INPUT_SIZE = 128

# Settings of a network that have no key for 2D.
WITHOUT_2D = ("TRAIN.MODEL_TYPE", "TRAIN.PLACEMENT")


def predict(raw: NDArray[Any], checkpoint: Path | str, cfg: CfgNode | None = None) -> dict[str, NDArray[np.float32]]:
    """Predict a volume with trained weights, tile by tile.

    Args:
        raw: (z, y, x), integers, or floating point in 0..1 (with DATA.RAW_WINDOW, any). Its voxels must have the size
            that the network was trained on.
        checkpoint: a file model_checkpoint_N.
        cfg: a loaded config. By default, the one that training wrote beside the checkpoint, or else one made from the
            settings in the checkpoint itself.

    Returns:
        Task ("affs", "lsds", "placement", "mito") -> what the network predicts, (channels, z, y, x) in 0..1, on the
        voxels of `raw`.

    Raises:
        ValueError: `raw` has another shape, type or range.
        UserError: the checkpoint cannot be used, or it is too old to contain the network's settings and `cfg` is
            missing.
    """
    if raw.ndim != 3 or raw.dtype.kind not in "uif":
        raise ValueError(f"raw must be (z, y, x), integers or floating point, not {raw.shape}, {raw.dtype}")
    cfg = config_for(checkpoint) if cfg is None else cfg
    if raw.dtype.kind == "f" and not (cfg.DATA.RAW_WINDOW or (raw.min() >= 0 and raw.max() <= 1)):
        raise ValueError("floating-point raw must lie in 0..1, without NaN")
    predictor = TilePredictor(cfg)
    voxel_size = (*(1,) * (3 - len(cfg.MODEL.VOXEL_SIZE)), *cfg.MODEL.VOXEL_SIZE)
    return predictor.predict_box(Array(raw, (0, 0, 0), voxel_size), (0, 0, 0), raw.shape)


def config_for(checkpoint: Path | str) -> CfgNode:
    """Find or make the config to predict with a checkpoint.

    Args:
        checkpoint: a file model_checkpoint_N.

    Returns:
        `config_predict.yaml` beside the file if it exists. Otherwise the defaults, with the settings of the network
        that the checkpoint contains.

    Raises:
        UserError: the file does not exist, or it contains no settings.
    """
    checkpoint = Path(checkpoint).absolute()
    overrides = ["TRAIN.CHECKPOINT", str(checkpoint)]
    beside = checkpoint.with_name(PREDICT_CONFIG)
    if beside.is_file():
        return load_config(beside, overrides)
    settings = dict(read_checkpoint(checkpoint).get("network_settings", {}))
    if not settings:
        raise UserError(f"{checkpoint} does not contain the settings of its network: pass a config as cfg")
    section = "MODEL_ISO" if "MODEL_ISO.NUM_FMAPS" in settings else "MODEL_ANISO"
    keys = [f"{section}.{name}" for name in ("DOWNSAMPLE_FACTORS", "KERNEL_SIZE_DOWN", "KERNEL_SIZE_UP", "PAD_CONV")]
    try:
        shapes = [settings[key] for key in keys]
        dims = len(shapes[0][0])
        (input_shape, _), *_ = nearest_input_shapes((INPUT_SIZE,) * dims, *shapes)
    except (KeyError, ValueError) as error:
        raise UserError(f"the network_settings in {checkpoint} describe no network ({error}): pass a config") from None
    settings[f"{section}.INPUT_SHAPE"] = input_shape
    if dims == 2:  # a 2D network is built from the keys with the suffix, where there are any
        settings = {key if key in WITHOUT_2D else f"{key}_2D": value for key, value in settings.items()}
    settings |= {"DATA.FIB": int(section == "MODEL_ISO"), "DATA.DIM_2D": dims == 2}
    return load_config(None, [*overrides, *(part for item in settings.items() for part in item)])
