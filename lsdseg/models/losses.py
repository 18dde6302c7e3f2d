"""Losses, weighted per voxel: mean squared error, which the LSD paper trains with, and cross-entropy."""

from collections.abc import Callable

from torch import Tensor, where
from torch.nn.functional import binary_cross_entropy

# Weights of very rare values would hold for the few voxels that chance put into a patch.
RAREST = 0.05

Loss = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor, entries: float | None = None) -> Tensor:
    """Compute the weighted squared error, averaged over the entries whose weight is not zero.

    Args:
        prediction: floating point, any shape.
        target: the same shape and type.
        weights: >= 0, of the same type, and of the same shape or with one channel for all.
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


def balanced_weights(target: Tensor, known: Tensor, per_channel: bool) -> Tensor:
    """Weight a target of zeros and ones so that both have the same total weight in each patch.

    A kind that makes up less than `RAREST` of a patch counts as if it made up so much.

    Args:
        target: 0 or 1, (batch, channels, ...).
        known: 1 where the target is known, else 0, of the same shape.
        per_channel: they have the same total weight in each channel of a patch.

    Returns:
        The weights, float32, of the same shape: 0 where the target is unknown, about 1 on average elsewhere.
    """
    axes = tuple(range(2 if per_channel else 1, target.ndim))
    known, ones = known.float(), (target * known).float()
    share = ones.sum(axes, keepdim=True) / known.sum(axes, keepdim=True).clamp(min=1)
    of_ones, of_zeros = (0.5 / part.clamp(RAREST, 1 - RAREST) for part in (share, 1 - share))
    return known * where(target > 0, of_ones, of_zeros)


def _mean(error: Tensor, weights: Tensor, entries: float | None) -> Tensor:
    return error / max(1.0, (weights > 0).sum().item() if entries is None else entries)


# The names that TRAIN.AFF_LOSS can have.
LOSSES: dict[str, Loss] = {"mse": weighted_mse, "bce": weighted_bce}
