"""The loss of the LSD paper: mean squared error, weighted per voxel."""

from torch import Tensor


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor, entries: float | None = None) -> Tensor:
    """Compute the weighted squared error, averaged over the entries whose weight is not zero.

    Args:
        prediction: floating point, any shape.
        target: the same shape and type.
        weights: the same shape and type, >= 0.
        entries: the number to divide by, if the arguments are only a part of the batch. Default: the number of
            entries in `weights` that are not zero.

    Returns:
        A scalar; 0 if all weights are 0.
    """
    error = (weights * (prediction - target) ** 2).sum()
    return error / max(1.0, (weights > 0).sum().item() if entries is None else entries)
