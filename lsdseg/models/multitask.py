"""One U-Net, one 1x1x1 convolution per task: what every model type has in common."""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import Tensor, nn

from lsdseg.config.model_types import TASKS, input_channels, task_channels
from lsdseg.models.unet import ConvPass, UNet


class MultiTaskUNet(nn.Module):
    """A U-Net with one sigmoid head per task.

    Args:
        unet: the network under the heads.
        num_fmaps_out: feature maps that it gives.
        channels: task -> number of channels, in output order.

    `forward` takes (batch, in_channels, *spatial) and returns a named tuple with a field per task, each
    (batch, channels, *smaller spatial) in 0..1.
    """

    def __init__(self, unet: UNet, num_fmaps_out: int, channels: dict[str, int]):
        super().__init__()
        self.unet = unet
        dims = unet.l_conv[0].conv_pass[0].weight.ndim - 2
        for task, count in channels.items():
            head = ConvPass(num_fmaps_out, count, [(1,) * dims], activation=nn.Sigmoid)
            self.add_module(TASKS[task].head, head)
        self.output_type = namedtuple("Outputs", channels)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in output order."""
        return self.output_type._fields

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.unet(x)
        # Near 0 and 1, where most affinities are, reduced precision has too few digits for the sigmoid.
        with torch.autocast(x.device.type, enabled=False):
            features = features.float()
            return self.output_type(*(getattr(self, TASKS[task].head)(features) for task in self.tasks))


def build_model(cfg) -> MultiTaskUNet:
    """The network of the configured model type, with random weights, on the CPU.

    For auto-context types that is the second network; see `lsdseg.models.autocontext`.
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
    )
    return MultiTaskUNet(unet, model.NUM_FMAPS_OUT, task_channels(cfg))
