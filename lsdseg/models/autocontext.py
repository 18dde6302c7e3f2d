"""Two networks in a row: the second one sees what the first one predicts, and also raw data if its type says so.

The first network is already trained. Both run in one pass, on the same patch or tile. The output of the first network
is cropped, by the same amount on either side, to the largest size that the second network can take.
`cfg.MODEL.RAW_SHAPE` and `cfg.MODEL.CONTEXT` say how much raw data that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lsdseg.models.inside import Box
from lsdseg.models.unet import center_crop


class AutoContext(nn.Module):
    """Run `second` on the predictions of `first`, which is not trained.

    Args:
        first: network from raw data to a named tuple of predictions.
        second: network whose input channels are those of `inputs`.
        inputs: what the second network sees, in the order of its input channels: "raw", or fields of the output of
            the first network.
        fit: from a spatial shape in voxels to the largest shape that the second network can take, such that it can
            be cropped from the middle by whole voxels.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        inputs: tuple[str, ...],
        fit: Callable[[tuple[int, ...]], Sequence[int]],
    ) -> None:
        super().__init__()
        self.first, self.second, self.inputs, self.fit = first.eval().requires_grad_(False), second, inputs, fit

    def forward(self, raw: Tensor, inside: Box | None = None) -> tuple[Tensor, ...]:
        """Predict from raw data.

        Args:
            raw: float (batch, channels, *spatial).
            inside: with "same" padding, a box within raw that the second network predicts. Default: all of it.

        Returns:
            The output of `second`.
        """
        with torch.no_grad():
            predicted = self.first(raw)._asdict()
        size = next(iter(predicted.values())).shape[2:]
        # Crop raw in two steps, so that it loses the same voxels on each side as the predictions do.
        available = {"raw": center_crop(raw, size), **predicted}
        fitting = self.fit(tuple(size))
        outputs: tuple[Tensor, ...] = self.second(
            torch.cat([center_crop(available[name], fitting) for name in self.inputs], dim=1), inside
        )
        return outputs

    def train(self, mode: bool = True) -> AutoContext:
        """Set the training mode of `second`. `first` always stays in evaluation mode."""
        super().train(mode)
        self.first.eval()
        return self
