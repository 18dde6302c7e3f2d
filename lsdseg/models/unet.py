"""The U-Net of the LSD paper, in 2D and 3D.

The module names (`l_conv`, `r_up`, `r_conv`, `conv_pass`, `up`) are those of the networks that the published LSD
scripts trained, because checkpoints address weights by name: renaming one makes every existing checkpoint useless.

Architecture: Ronneberger et al., MICCAI 2015; valid convolutions and the crop that keeps translation
equivariance as in Funke et al., TPAMI 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsdseg.config.network_shapes import equivariant_size

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class ConvPass(nn.Module):
    """Convolutions in a row, each followed by an activation.

    Args:
        in_channels, out_channels: feature maps that go in and come out.
        kernel_sizes: one kernel size (a tuple of 2 or 3 ints) per convolution.
        padding: "valid" or "same".
        activation: module class of the activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[Sequence[int]],
        padding: str = "valid",
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for kernel_size in kernel_sizes:
            conv = CONV[len(kernel_size)]
            layers += [conv(in_channels, out_channels, tuple(kernel_size), padding=padding), activation()]
            in_channels = out_channels
        self.conv_pass = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_pass(x)


class Upsample(nn.Module):
    """Transposed convolution, then the skip connection cropped to it and concatenated in front of it.

    Args:
        channels: feature maps that come from below (the transposed convolution keeps their number).
        factor: up-sampling per axis.
        crop_factor: product of the down-sampling factors from this level to the bottom. With valid padding the
            up-sampled map is cropped so that what the convolutions after it give is a multiple of it; tiles that
            are shifted by multiples of it then give the same values.
        shrink: voxels per axis that the convolutions after it take off; None with "same" padding (no crop).
    """

    def __init__(
        self,
        channels: int,
        factor: Sequence[int],
        crop_factor: Sequence[int],
        shrink: Sequence[int] | None,
    ):
        super().__init__()
        self.up = CONV_TRANSPOSE[len(factor)](channels, channels, kernel_size=tuple(factor), stride=tuple(factor))
        self.crop_factor = tuple(crop_factor)
        self.shrink = shrink

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        up = self.up(below)
        if self.shrink is not None:
            sizes = zip(up.shape[2:], self.crop_factor, self.shrink, strict=True)
            up = center_crop(up, [equivariant_size(*size) for size in sizes])
        return torch.cat([center_crop(skip, up.shape[2:]), up], dim=1)


def center_crop(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The middle of `x` (batch, channels, *spatial) with spatial size `shape`; the odd voxel goes off the end."""
    for axis, size in enumerate(shape, start=2):
        x = x.narrow(axis, (x.shape[axis] - size) // 2, size)
    return x


class UNet(nn.Module):
    """A U-Net with one decoder.

    Args:
        in_channels: channels of the input.
        num_fmaps: feature maps of the first level.
        fmap_inc_factor: factor by which every level multiplies them.
        downsample_factors: one tuple per down-sampling; their number plus one is the number of levels.
        kernel_size_down, kernel_size_up: kernel sizes of the convolutions of every level on the way down (one list
            per level) and up (one list per level but the last).
        num_fmaps_out: feature maps that come out (default: `num_fmaps`).
        padding: "valid" or "same".

    Input (batch, in_channels, *spatial) float; output (batch, num_fmaps_out, *smaller spatial) float, whose size
    `lsdseg.config.network_shapes.output_shape` computes.
    """

    def __init__(
        self,
        in_channels: int,
        num_fmaps: int,
        fmap_inc_factor: int,
        downsample_factors: Sequence[Sequence[int]],
        kernel_size_down: Sequence[Sequence[Sequence[int]]],
        kernel_size_up: Sequence[Sequence[Sequence[int]]],
        num_fmaps_out: int | None = None,
        padding: str = "valid",
    ):
        super().__init__()
        levels = len(downsample_factors) + 1
        fmaps = [num_fmaps * fmap_inc_factor**level for level in range(levels)]
        out = [num_fmaps_out or num_fmaps, *fmaps[1:]]

        self.l_conv = nn.ModuleList(
            ConvPass(fmaps[level - 1] if level else in_channels, fmaps[level], kernel_size_down[level], padding)
            for level in range(levels)
        )
        self.l_down = nn.ModuleList(MAX_POOL[len(f)](tuple(f)) for f in downsample_factors)

        # The extra list level is the decoder's number: the published networks can have several.
        ups, convs = nn.ModuleList(), nn.ModuleList()
        for level, factor in enumerate(downsample_factors):
            crop_factor = [1] * len(factor)
            for f in downsample_factors[level:]:
                crop_factor = [a * b for a, b in zip(crop_factor, f, strict=True)]
            shrink = [sum(k) - len(k) for k in zip(*kernel_size_up[level], strict=True)]
            ups.append(Upsample(fmaps[level + 1], factor, crop_factor, shrink if padding == "valid" else None))
            convs.append(ConvPass(fmaps[level] + fmaps[level + 1], out[level], kernel_size_up[level], padding))
        self.r_up = nn.ModuleList([ups])
        self.r_conv = nn.ModuleList([convs])
        self.apply(keep_variance)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for conv, down in zip(self.l_conv, self.l_down, strict=False):
            x = conv(x)
            skips.append(x)
            x = down(x)
        x = self.l_conv[-1](x)
        for up, conv in zip(reversed(self.r_up[0]), reversed(self.r_conv[0]), strict=True):
            x = conv(up(skips.pop(), x))
        return x


def keep_variance(module: nn.Module) -> None:
    """Initialise a convolution so that it keeps the variance of its input (He et al., ICCV 2015, for ReLU).

    PyTorch's default shrinks it a little in every layer. Without normalisation layers that adds up: a deep U-Net then
    spends its first thousands of iterations growing its signal again.
    """
    if isinstance(module, tuple(CONV.values())):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)
    elif isinstance(module, tuple(CONV_TRANSPOSE.values())):
        # Stride equals kernel size: every output voxel sees one tap per input channel, and no activation follows.
        nn.init.normal_(module.weight, std=module.in_channels**-0.5)
        nn.init.zeros_(module.bias)
