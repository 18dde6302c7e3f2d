"""From stored raw values to what the network sees: one rule for training and prediction."""

import numpy as np


def unit_factor(dtype) -> float:
    """Factor that brings raw values of a dtype to 0..1: integers by their range, floats are taken as they are."""
    return 1.0 / np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1.0


def network_intensity(raw: np.ndarray, cfg) -> np.ndarray:
    """Raw voxels as the network's input, float32 of the same shape, -1..1 with the default scale and shift."""
    scale, shift = network_scale_shift(cfg)
    return raw.astype(np.float32) * np.float32(unit_factor(raw.dtype) * scale) + np.float32(shift)


def display_intensity(network_input: np.ndarray, cfg) -> np.ndarray:
    """The network's input back in 0..1, with the second scale and shift of the config."""
    return network_input * cfg.MODEL.INTENSITYSCALESHIFT_SCALE[1] + cfg.MODEL.INTENSITYSCALESHIFT_SHIFT[1]


def network_scale_shift(cfg) -> tuple[float, float]:
    """Scale and shift from 0..1 to the network's input, the first pair of the config."""
    return cfg.MODEL.INTENSITYSCALESHIFT_SCALE[0], cfg.MODEL.INTENSITYSCALESHIFT_SHIFT[0]
