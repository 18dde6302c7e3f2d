"""Two networks in a row: the second sees what the first one, already trained, predicts (and raw, if its type says so).

Both run in one pass, on the same patch or tile. The first network's output is cropped, by as much on either
side, to the largest size that the second one can take; `cfg.MODEL.RAW_SHAPE` and `cfg.MODEL.CONTEXT` say how much raw
data that needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lsdseg.models.unet import center_crop


class AutoContext(nn.Module):
    """`second` on the predictions of `first`, which is not trained.

    Args:
        first: network from raw to a named tuple of predictions.
        second: network whose input is made of `inputs`.
        inputs: in the order of the second network's input channels: "raw", or fields of the first one's output.
        fit: the largest spatial shape that the second network can take in the middle of another one, by whole voxels.

    `forward` takes raw, (batch, channels, *spatial), and returns what `second` returns.
    """

    def __init__(self, first: nn.Module, second: nn.Module, inputs: tuple[str, ...], fit: Callable):
        super().__init__()
        self.first, self.second, self.inputs, self.fit = first.eval().requires_grad_(False), second, inputs, fit

    def forward(self, raw: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            predicted = self.first(raw)._asdict()
        size = next(iter(predicted.values())).shape[2:]
        # In two steps, so that raw loses the same voxels on each side as the predictions do.
        available = {"raw": center_crop(raw, size), **predicted}
        fitting = self.fit(tuple(size))
        return self.second(torch.cat([center_crop(available[name], fitting) for name in self.inputs], dim=1))

    def train(self, mode: bool = True) -> AutoContext:
        super().train(mode)
        self.first.eval()
        return self
