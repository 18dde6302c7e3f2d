"""How stored raw values become the input of the network. Training and prediction share this one rule."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from yacs.config import CfgNode


def unit_factor(dtype: DTypeLike) -> float:
    """Return the factor that scales raw values of a dtype to 0..1: 1 / maximum for integers, 1 for floats."""
    kind = np.dtype(dtype)
    return 1.0 / np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 1.0


def network_intensity(raw: NDArray[Any], cfg: CfgNode) -> NDArray[np.float32]:
    """Convert raw voxels to network input: float32 of the same shape, -1..1 with the default scale and shift."""
    scale, shift = network_scale_shift(cfg)
    return raw.astype(np.float32) * np.float32(unit_factor(raw.dtype) * scale) + np.float32(shift)


def display_intensity(network_input: NDArray[np.float32], cfg: CfgNode) -> NDArray[np.float32]:
    """Convert network input back to 0..1 with the second scale and shift in the config."""
    scale, shift = cfg.MODEL.INTENSITYSCALESHIFT_SCALE[1], cfg.MODEL.INTENSITYSCALESHIFT_SHIFT[1]
    displayed: NDArray[np.float32] = network_input * scale + shift
    return displayed


def network_scale_shift(cfg: CfgNode) -> tuple[float, float]:
    """Return the scale and shift from 0..1 to network input: the first pair in the config."""
    return cfg.MODEL.INTENSITYSCALESHIFT_SCALE[0], cfg.MODEL.INTENSITYSCALESHIFT_SHIFT[0]
