"""Losses of the LSD paper: mean squared error, weighted per voxel."""

from torch import Tensor


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error, averaged over the entries whose weight is not zero.

    All three have the same shape, floating point; weights are >= 0. Returns a scalar, 0 where all weights are 0.
    """
    error = weights * (prediction - target) ** 2
    return error.sum() / (weights > 0).sum().clamp(min=1)
