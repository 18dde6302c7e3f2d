"""Losses of the LSD paper: mean squared error, weighted per voxel."""

from torch import Tensor


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor, entries: float | None = None) -> Tensor:
    """Weighted squared error, averaged over the entries whose weight is not zero.

    All three have the same shape, floating point; weights are >= 0. entries: the number to divide by, if these are a
    part of a larger batch. Returns a scalar, 0 where all weights are 0.
    """
    error = (weights * (prediction - target) ** 2).sum()
    return error / max(1.0, (weights > 0).sum().item() if entries is None else entries)
