"""Compute a box of what a U-Net with "same" padding gives, and nothing that the box does not depend on.

A tile is predicted with context on all sides. A network with "same" padding gives an output for the context, too, which
is thrown away; most of the work goes into that. Here, every pass of convolutions computes only the box that the next
ones need. The numbers are those of the whole output: where the input ends, zeros are padded as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lsdseg.models.unet import CONV, ConvPass, UNet

# Begin and end in voxels along each axis.
Box = tuple[tuple[int, int], ...]
CONVOLVE: dict[int, Any] = {2: functional.conv2d, 3: functional.conv3d}


def features_inside(unet: UNet, x: Tensor, inside: Box) -> Tensor:
    """Compute the feature maps in a box.

    Args:
        unet: a network with "same" padding.
        x: float (batch, in_channels, *spatial).
        inside: the box, within x.

    Returns:
        float (batch, num_fmaps_out, *shape of the box): what `unet(x)` has there, up to rounding.
    """
    # What mypy knows of the items of a ModuleList is not enough to use them.
    convs_down: Any = unet.l_conv
    pools: Any = unet.l_down
    ups: Any = unet.r_up[0]
    convs_up: Any = unet.r_conv[0]
    factors = [pool.kernel_size for pool in pools]
    sizes: list[Sequence[int]] = [tuple(x.shape[2:])]
    for factor in factors:
        sizes.append(tuple(size // f for size, f in zip(sizes[-1], factor, strict=True)))
    levels = range(len(factors))

    # From the output back to the input: the box that each pass has to compute, and the one that it has to be given.
    after_up, before_up = [], []
    box = inside
    for level in levels:
        after_up.append(box)
        before_up.append(_needed(convs_up[level], box, sizes[level])[0])
        box = _coarse(before_up[level], factors[level])
    after_down, before_down = [box], [_needed(convs_down[-1], box, sizes[-1])[0]]
    for level in reversed(levels):
        after_down.insert(0, _union(_fine(before_down[0], factors[level]), before_up[level]))
        before_down.insert(0, _needed(convs_down[level], after_down[0], sizes[level])[0])

    x = _crop(x, tuple((0, size) for size in sizes[0]), before_down[0])
    skips = []
    for level in levels:
        x = _convolve(convs_down[level], x, before_down[level], after_down[level], sizes[level])
        skips.append(_crop(x, after_down[level], before_up[level]))
        x = pools[level](_crop(x, after_down[level], _fine(before_down[level + 1], factors[level])))
    x = _convolve(convs_down[-1], x, before_down[-1], after_down[-1], sizes[-1])
    box = after_down[-1]
    for level in reversed(levels):
        up = _crop(ups[level].up(x), _fine(box, factors[level]), before_up[level])
        x = torch.cat([skips.pop(), up], dim=1)
        x = _convolve(convs_up[level], x, before_up[level], after_up[level], sizes[level])
        box = after_up[level]
    return x


def _needed(conv_pass: ConvPass, box: Box, size: Sequence[int]) -> list[Box]:
    """Return the boxes before each convolution of a pass, and the box after the last, to compute a box."""
    layers: Any = conv_pass.conv_pass
    boxes = [box]
    for conv in filter(_is_convolution, reversed(layers)):
        wanted = _grow(boxes[0], conv.kernel_size)
        boxes.insert(0, tuple((max(b, 0), min(e, n)) for (b, e), n in zip(wanted, size, strict=True)))
    return boxes


def _convolve(conv_pass: ConvPass, x: Tensor, has: Box, box: Box, size: Sequence[int]) -> Tensor:
    """Apply a pass to a box `has` of a feature map of this size, to compute the values in `box`."""
    boxes = _needed(conv_pass, box, size)
    x = _crop(x, has, boxes[0])
    layers: Any = conv_pass.conv_pass
    for layer in layers:
        if not _is_convolution(layer):
            x = layer(x)
            continue
        before, after, *_ = boxes
        boxes = boxes[1:]
        wanted = _grow(after, layer.kernel_size)
        ends = [(b - low, high - e) for (b, e), (low, high) in zip(before, wanted, strict=True)]
        if any(map(any, ends)):  # zeros beyond the end of the input, as "same" padding has them
            x = functional.pad(x, [voxels for pair in reversed(ends) for voxels in pair])
        x = CONVOLVE[len(size)](x, layer.weight, layer.bias)
    return x


def _is_convolution(layer: Any) -> bool:
    return isinstance(layer, tuple(CONV.values()))


def _grow(box: Box, kernel_size: Sequence[int]) -> Box:
    """Return what a convolution sees of its input. Even kernels reach one voxel farther at the end, as in PyTorch."""
    return tuple((b - (k - 1) // 2, e + k - 1 - (k - 1) // 2) for (b, e), k in zip(box, kernel_size, strict=True))


def _coarse(box: Box, factor: Sequence[int]) -> Box:
    """Return the box on the level below that covers a box."""
    return tuple((b // f, -(-e // f)) for (b, e), f in zip(box, factor, strict=True))


def _fine(box: Box, factor: Sequence[int]) -> Box:
    """Return a box of the level below on this level."""
    return tuple((b * f, e * f) for (b, e), f in zip(box, factor, strict=True))


def _union(first: Box, second: Box) -> Box:
    return tuple((min(b, c), max(e, f)) for (b, e), (c, f) in zip(first, second, strict=True))


def _crop(x: Tensor, has: Box, box: Box) -> Tensor:
    """Return the values in a box of a tensor that holds the box `has`."""
    for axis, ((begin, _), (low, high)) in enumerate(zip(has, box, strict=True), start=2):
        x = x.narrow(axis, low - begin, high - low)
    return x
