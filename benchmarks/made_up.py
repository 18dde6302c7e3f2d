"""Affinities that are made up, for benchmarks that need some without training a network."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.segmentation import find_boundaries

from lsdseg.data_utils.phantom import make_phantom


def phantom_with_affinities(edge: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Make a phantom of a cube of so many voxels along each axis.

    Returns:
        Raw (z, y, x), and affinities of its labels with blur and noise (3, z, y, x), both uint8.
    """
    raw, labels, _ = make_phantom((edge,) * 3, seed=0)
    inside = np.where(find_boundaries(labels, mode="thick"), 0, labels)
    affinities = np.ones((3, *labels.shape), np.float32)
    for axis in range(3):
        here, before = np.moveaxis(inside, axis, 0)[1:], np.moveaxis(inside, axis, 0)[:-1]
        np.moveaxis(affinities[axis], axis, 0)[1:] = (here == before) & (here > 0)
    noise = np.random.default_rng(0).normal(0, 0.1, affinities.shape)
    blurred = np.stack([gaussian_filter(channel, 0.7) for channel in affinities])
    return raw, np.rint(255 * (blurred + noise).clip(0, 1)).astype(np.uint8)
