"""The U-Net of the LSD paper, in 2D and 3D.

The module names (`l_conv`, `r_up`, `r_conv`, `conv_pass`, `up`) are those of the networks that the published LSD
scripts trained. Checkpoints address weights by name: renaming a module makes every existing checkpoint useless.

The architecture follows Ronneberger et al., MICCAI 2015. Valid convolutions, and the crop that keeps the network
translation equivariant, follow Funke et al., TPAMI 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsdseg.config.network_shapes import equivariant_size

# Number of spatial dimensions -> layer.
CONV: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOL: dict[int, type[nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
# The names that ACTIVATION can have -> layer.
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class ConvPass(nn.Module):
    """A sequence of convolutions, each followed by an activation.

    Args:
        in_channels: number of feature maps that go in.
        out_channels: number of feature maps that come out.
        kernel_sizes: one kernel size (2 or 3 ints) per convolution.
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
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for kernel_size in kernel_sizes:
            conv = CONV[len(kernel_size)]
            layers += [conv(in_channels, out_channels, tuple(kernel_size), padding=padding), activation()]
            in_channels = out_channels
        self.conv_pass = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map float (batch, in_channels, *spatial) to (batch, out_channels, *smaller spatial)."""
        features: Tensor = self.conv_pass(x)
        return features


class Upsample(nn.Module):
    """Up-sample by a transposed convolution, crop the skip connection to the result, and concatenate the two.

    Args:
        channels: number of feature maps that come from below. The transposed convolution keeps it.
        factor: up-sampling factor per axis.
        crop_factor: product of the down-sampling factors from this level to the bottom. With valid padding, the
            up-sampled map is cropped such that the output of the convolutions after it is a multiple of this product
            in size. Tiles that are shifted by multiples of it then get the same values.
        shrink: voxels per axis that the convolutions after it remove; None with "same" padding (no crop).
    """

    def __init__(
        self,
        channels: int,
        factor: Sequence[int],
        crop_factor: Sequence[int],
        shrink: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.up = CONV_TRANSPOSE[len(factor)](channels, channels, kernel_size=tuple(factor), stride=tuple(factor))
        self.crop_factor = tuple(crop_factor)
        self.shrink = shrink

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Combine the feature maps of this level and the level below.

        Args:
            skip: float (batch, skip channels, *spatial), from the way down.
            below: float (batch, channels, *spatial / factor).

        Returns:
            float (batch, skip channels + channels, *smaller spatial), the skip connection first.
        """
        up = self.up(below)
        if self.shrink is not None:
            sizes = zip(up.shape[2:], self.crop_factor, self.shrink, strict=True)
            up = center_crop(up, [equivariant_size(*size) for size in sizes])
        return torch.cat([center_crop(skip, up.shape[2:]), up], dim=1)


def center_crop(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Crop the middle of a tensor. If an odd number of voxels goes, one more goes at the end of the axis.

    Args:
        x: (batch, channels, *spatial).
        shape: spatial size of the result in voxels.

    Returns:
        (batch, channels, *shape), a view of `x`.
    """
    for axis, size in enumerate(shape, start=2):
        x = x.narrow(axis, (x.shape[axis] - size) // 2, size)
    return x


class UNet(nn.Module):
    """A U-Net with one decoder.

    Args:
        in_channels: number of input channels.
        num_fmaps: number of feature maps of the first level.
        fmap_inc_factor: factor by which each level multiplies that number.
        downsample_factors: one tuple per down-sampling; there is one more level than there are tuples.
        kernel_size_down: kernel sizes of the convolutions on the way down, one list per level.
        kernel_size_up: kernel sizes of the convolutions on the way up, one list per level except the last.
        num_fmaps_out: number of feature maps of the output. Default: `num_fmaps`.
        padding: "valid" or "same".
        activation: name in ACTIVATIONS of what follows every convolution.

    Attributes:
        dims: number of spatial dimensions, 2 or 3.
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
        activation: str = "relu",
    ) -> None:
        super().__init__()
        layer = ACTIVATIONS[activation]
        levels = len(downsample_factors) + 1
        fmaps = [num_fmaps * fmap_inc_factor**level for level in range(levels)]
        out = [num_fmaps_out or num_fmaps, *fmaps[1:]]
        self.dims = len(kernel_size_down[0][0])

        self.l_conv = nn.ModuleList(
            ConvPass(fmaps[level - 1] if level else in_channels, fmaps[level], kernel_size_down[level], padding, layer)
            for level in range(levels)
        )
        self.l_down = nn.ModuleList(MAX_POOL[len(f)](tuple(f)) for f in downsample_factors)

        ups, convs = nn.ModuleList(), nn.ModuleList()
        for level, factor in enumerate(downsample_factors):
            crop_factor = [1] * len(factor)
            for f in downsample_factors[level:]:
                crop_factor = [a * b for a, b in zip(crop_factor, f, strict=True)]
            shrink = [sum(k) - len(k) for k in zip(*kernel_size_up[level], strict=True)]
            ups.append(Upsample(fmaps[level + 1], factor, crop_factor, shrink if padding == "valid" else None))
            convs.append(ConvPass(fmaps[level] + fmaps[level + 1], out[level], kernel_size_up[level], padding, layer))
        # The outer list counts decoders: the published networks can have several.
        self.r_up = nn.ModuleList([ups])
        self.r_conv = nn.ModuleList([convs])
        self.apply(initialize_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the feature maps.

        Args:
            x: float (batch, in_channels, *spatial).

        Returns:
            float (batch, num_fmaps_out, *smaller spatial); `lsdseg.config.network_shapes.output_shape` computes the
            size.
        """
        skips = []
        for conv, down in zip(self.l_conv, self.l_down, strict=False):
            x = conv(x)
            skips.append(x)
            x = down(x)
        x = self.l_conv[-1](x)
        ups, convs = self.r_up[0], self.r_conv[0]
        assert isinstance(ups, nn.ModuleList)
        assert isinstance(convs, nn.ModuleList)
        for up, conv in zip(reversed(ups), reversed(convs), strict=True):
            x = conv(up(skips.pop(), x))
        return x


def initialize_weights(module: nn.Module) -> None:
    """Initialize a convolution such that it keeps the variance of its input (He et al., ICCV 2015, for ReLU).

    PyTorch's default reduces the variance a little in every layer. Without normalization layers this adds up: a deep
    U-Net then spends its first thousands of iterations on growing its signal again.

    Args:
        module: any module; only convolutions and transposed convolutions are changed.
    """
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
        # Stride equals kernel size: every output voxel sees one tap per input channel, and no activation follows.
        nn.init.normal_(module.weight, std=module.in_channels**-0.5)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
