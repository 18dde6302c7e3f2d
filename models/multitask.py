"""One U-Net, one 1x1x1 convolution per task: what every model type has in common.

`MODEL_TYPES` says which tasks a model type has; everything else (network, targets, loss, output arrays) follows
from that list.
"""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import Tensor, nn

from config.errors import UserError
from models.unet import ConvPass, UNet

# Model type -> its tasks, in the order in which the network returns them.
MODEL_TYPES = {
    "MTLSD": ("lsds", "affs"),
}

# Task -> name of its head in the state dict (contract with published checkpoints).
HEAD_NAMES = {"lsds": "lsd_head", "affs": "aff_head"}


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
            self.add_module(HEAD_NAMES[task], head)
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
            return self.output_type(*(getattr(self, HEAD_NAMES[task])(features) for task in self.tasks))


def task_channels(cfg) -> dict[str, int]:
    """Task -> number of output channels of the configured model type.

    Raises:
        UserError: TRAIN.MODEL_TYPE is none that can be built.
    """
    if cfg.TRAIN.MODEL_TYPE not in MODEL_TYPES:
        raise UserError(f"TRAIN.MODEL_TYPE is {cfg.TRAIN.MODEL_TYPE!r}: set it to one of {', '.join(MODEL_TYPES)}")
    channels = {"lsds": cfg.MODEL.LSDS, "affs": len(cfg.TRAIN.NEIGHBORHOOD)}
    return {task: channels[task] for task in MODEL_TYPES[cfg.TRAIN.MODEL_TYPE]}


def build_model(cfg) -> MultiTaskUNet:
    """The network that `cfg` describes, with random weights, on the CPU.

    Raises:
        UserError: TRAIN.MODEL_TYPE is none that can be built.
    """
    channels = task_channels(cfg)
    model = cfg.MODEL
    unet = UNet(
        in_channels=model.IN_CHANNELS,
        num_fmaps=model.NUM_FMAPS,
        fmap_inc_factor=model.FMAP_INC_FACTOR,
        downsample_factors=model.DOWNSAMPLE_FACTORS,
        kernel_size_down=model.KERNEL_SIZE_DOWN,
        kernel_size_up=model.KERNEL_SIZE_UP,
        num_fmaps_out=model.NUM_FMAPS_OUT,
        padding=model.PAD_CONV,
    )
    return MultiTaskUNet(unet, model.NUM_FMAPS_OUT, channels)
