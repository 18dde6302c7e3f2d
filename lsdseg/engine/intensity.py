"""How stored raw values become the input of the network. Training and prediction share this one rule."""

from typing import Any

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.gray import Window, gray_percentiles, own_window, to_unit


def raw_window(raw: Array, cfg: CfgNode, known: Window = (0, 1)) -> Window:
    """Return the gray values of a volume that become 0 and 1, or lie where 0 and 1 would be.

    DATA.RAW_WINDOW, or the range of uint8 and floating point. For other integers, a sample of the volume decides.

    Args:
        raw: (z, y, x).
        cfg: the config.
        known: what the percentiles of the sample, see `gray_percentiles`, become in 0..1.
    """
    fixed = cfg.DATA.RAW_WINDOW or own_window(raw.dtype)
    if fixed:
        return float(fixed[0]), float(fixed[1])
    low, high = gray_percentiles(raw)
    width = (high - low) / (known[1] - known[0])
    return low - known[0] * width, low + (1 - known[0]) * width


def network_intensity(raw: NDArray[Any], cfg: CfgNode, window: Window) -> NDArray[np.float32]:
    """Convert raw voxels to network input: float32 of the same shape, -1..1 with the default scale and shift."""
    scale, shift = network_scale_shift(cfg)
    return to_unit(raw, window) * np.float32(scale) + np.float32(shift)


def display_intensity(network_input: NDArray[np.float32], cfg: CfgNode) -> NDArray[np.float32]:
    """Convert network input back to 0..1 with the second scale and shift in the config."""
    scale, shift = cfg.MODEL.INTENSITYSCALESHIFT_SCALE[1], cfg.MODEL.INTENSITYSCALESHIFT_SHIFT[1]
    displayed: NDArray[np.float32] = network_input * scale + shift
    return displayed


def network_scale_shift(cfg: CfgNode) -> tuple[float, float]:
    """Return the scale and shift from 0..1 to network input: the first pair in the config."""
    return cfg.MODEL.INTENSITYSCALESHIFT_SCALE[0], cfg.MODEL.INTENSITYSCALESHIFT_SHIFT[0]
