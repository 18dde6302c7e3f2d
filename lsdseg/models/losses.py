"""Losses, weighted per voxel: mean squared error, which the LSD paper trains with, and cross-entropy."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import binary_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


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
    return _mean((weights * (prediction - target) ** 2).sum(), weights, entries)


def weighted_bce(prediction: Tensor, target: Tensor, weights: Tensor, entries: float | None = None) -> Tensor:
    """Compute the weighted binary cross-entropy in nats, averaged over the entries whose weight is not zero.

    Args:
        prediction: probabilities, floating point in 0..1, any shape.
        target: in 0..1, the same shape and type.
        weights: as for `weighted_mse`.
        entries: as for `weighted_mse`.

    Returns:
        A scalar; 0 if all weights are 0.
    """
    return _mean(binary_cross_entropy(prediction, target, weights, reduction="sum"), weights, entries)


def _mean(error: Tensor, weights: Tensor, entries: float | None) -> Tensor:
    return error / max(1.0, (weights > 0).sum().item() if entries is None else entries)


# The names that TRAIN.AFF_LOSS can have.
LOSSES: dict[str, Loss] = {"mse": weighted_mse, "bce": weighted_bce}
