"""What all model types have in common: one U-Net, and one 1x1x1 convolution per task."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from lsdseg.config.model_types import TASKS, input_channels, task_channels
from lsdseg.models.inside import Box, features_inside
from lsdseg.models.unet import ConvPass, UNet


class MultiTaskUNet(nn.Module):
    """A U-Net with one sigmoid head per task.

    Args:
        unet: the network below the heads.
        num_fmaps_out: number of feature maps that it returns.
        channels: task -> number of channels, in output order.

    Attributes:
        tasks: names of the tasks in output order.
        output_type: the named tuple that `forward` returns, with one field per task.
    """

    def __init__(self, unet: UNet, num_fmaps_out: int, channels: dict[str, int]) -> None:
        super().__init__()
        self.unet = unet
        for task, count in channels.items():
            head = ConvPass(num_fmaps_out, count, [(1,) * unet.dims], activation=nn.Sigmoid)
            self.add_module(TASKS[task].head, head)
        self.tasks = tuple(channels)
        self.output_type = _named_tuple(self.tasks)

    def forward(self, x: Tensor, inside: Box | None = None) -> tuple[Tensor, ...]:
        """Predict all tasks.

        Args:
            x: float (batch, in_channels, *spatial).
            inside: with "same" padding, a box within x to predict; nothing else is computed. Default: all of x.

        Returns:
            A named tuple with a field per task, each float32 (batch, channels, *smaller spatial) with values in 0..1.
        """
        features = self.unet(x) if inside is None else features_inside(self.unet, x, inside)
        # Most affinities are close to 0 or 1, where reduced precision has too few digits for the sigmoid.
        with torch.autocast(x.device.type, enabled=False):
            features = features.float()
            outputs: tuple[Tensor, ...] = self.output_type(
                *(getattr(self, TASKS[task].head)(features) for task in self.tasks)
            )
        return outputs


def build_model(cfg: CfgNode) -> MultiTaskUNet:
    """Build the network of the configured model type, with random weights, on the CPU.

    For auto-context types this is the second network; see `lsdseg.models.autocontext`.
    """
    model = cfg.MODEL
    unet = UNet(
        in_channels=input_channels(cfg),
        num_fmaps=model.NUM_FMAPS,
        fmap_inc_factor=model.FMAP_INC_FACTOR,
        downsample_factors=model.DOWNSAMPLE_FACTORS,
        kernel_size_down=model.KERNEL_SIZE_DOWN,
        kernel_size_up=model.KERNEL_SIZE_UP,
        num_fmaps_out=model.NUM_FMAPS_OUT,
        padding=model.PAD_CONV,
        activation=model.ACTIVATION,
    )
    return MultiTaskUNet(unet, model.NUM_FMAPS_OUT, task_channels(cfg))


def _named_tuple(fields: tuple[str, ...]) -> Any:
    return namedtuple("Outputs", fields)
