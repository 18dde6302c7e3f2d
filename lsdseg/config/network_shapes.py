"""Which output shape the U-Net gives: plain arithmetic, so that a config is checked without torch.

The axes of a U-Net are independent of each other, so everything here is worked out for one axis at a time.
With valid convolutions each kernel of width k takes k - 1 voxels, max-pooling by f needs a length that f
divides, and after every up-sampling the feature map is cropped so that shifting the input by the product of
the down-sampling factors shifts the output by exactly as much (translation equivariance; without it, tiles
predicted side by side do not fit together). With padding "same" nothing is lost, and only the divisibility
remains.
"""

import math
from itertools import count

AXES = "zyx"

Shape = tuple[int, ...]
Kernels = list[list[Shape]]


def default_kernels(levels: int, dims: int) -> Kernels:
    """Two convolutions 3 voxels wide on each of `levels` levels: what a kernel size of None stands for."""
    return [[(3,) * dims, (3,) * dims] for _ in range(levels)]


def output_shape(input_shape, downsample_factors, kernel_size_down=None, kernel_size_up=None, padding="valid") -> Shape:
    """Output shape in voxels of the U-Net for an input shape in voxels.

    Args:
        input_shape: voxels per axis, 2 or 3 axes.
        downsample_factors: one factor per axis for each of n down-samplings.
        kernel_size_down: per level (n + 1 of them, finest first) the kernel of each convolution on the way
            down; None for two kernels of width 3.
        kernel_size_up: the same for the n levels on the way up.
        padding: "valid" or "same".

    Raises:
        ValueError: "argument: reason" if the network cannot be built or cannot take such an input.
    """
    axes = _axes(len(input_shape), downsample_factors, kernel_size_down, kernel_size_up, padding)
    sizes = []
    for name, size, axis in zip(AXES[-len(input_shape) :], input_shape, axes, strict=True):
        try:
            sizes.append(_output_size(size, *axis))
        except ValueError as error:
            raise ValueError(f"input_shape: axis {name}, {error}") from None
    return tuple(sizes)


def input_shape_for(output, downsample_factors, kernel_size_down=None, kernel_size_up=None, padding="valid") -> Shape:
    """The smallest input shape in voxels from which the network gives at least `output`, in the middle of its own.

    Raises ValueError if the network itself cannot be built.
    """
    network = downsample_factors, kernel_size_down, kernel_size_up, padding
    axes = _axes(len(output), *network)
    shape = tuple(_first_possible(count(size), axis, size) for size, axis in zip(output, axes, strict=True))
    return _in_the_middle(shape, +1, output_shape(shape, *network), output, downsample_factors)


def input_shape_within(size, downsample_factors, kernel_size_down=None, kernel_size_up=None, padding="valid") -> Shape:
    """The largest input shape in voxels that the network can take in the middle of the shape `size`.

    Raises ValueError if the network itself cannot be built.
    """
    shape, _ = nearest_input_shapes(size, downsample_factors, kernel_size_down, kernel_size_up, padding)[0]
    return _in_the_middle(shape, -1, size, shape, downsample_factors)


def nearest_input_shapes(
    input_shape, downsample_factors, kernel_size_down=None, kernel_size_up=None, padding="valid"
) -> list[tuple[Shape, Shape]]:
    """The possible input shapes nearest to `input_shape`, each with its output shape, smaller one first.

    Axes that are possible as they are stay; the others are rounded down in one answer and up in the other,
    or up in both where the network cannot take less. Raises ValueError if the network itself cannot be
    built.
    """
    axes = _axes(len(input_shape), downsample_factors, kernel_size_down, kernel_size_up, padding)
    above = [_first_possible(count(size), axis) for size, axis in zip(input_shape, axes, strict=True)]
    below = [
        _first_possible(range(size, 0, -1), axis) or larger
        for size, axis, larger in zip(input_shape, axes, above, strict=True)
    ]
    return [
        (shape, output_shape(shape, downsample_factors, kernel_size_down, kernel_size_up, padding))
        for shape in sorted({tuple(below), tuple(above)})
    ]


def equivariant_size(size: int, step: int, lost: int) -> int:
    """Length to which an up-sampled feature map of `size` voxels is cropped before convolutions take `lost`.

    What these leave is then a multiple of `step`, the product of the down-sampling factors from that level
    to the bottom.
    """
    return (size - lost) // step * step + lost


def tile_context(downsample_factors, kernel_size_down=None, kernel_size_up=None, padding="valid") -> Shape:
    """Voxels per axis and side that a tile needs around its output, so that tiles fit without a seam.

    With valid convolutions that is what the network takes off. A network with "same" padding gives its
    whole input, but only what lies farther from the rim than its receptive field reaches is free of the
    padding; the answer is then a multiple of `total_factor`, since the max-pooling grid must lie the same
    way in every tile. Raises as `output_shape`.
    """
    total = total_factor(downsample_factors)
    if padding == "valid":
        shape, output = nearest_input_shapes((1,) * len(total), downsample_factors, kernel_size_down, kernel_size_up)[0]
        return tuple((i - o) // 2 for i, o in zip(shape, output, strict=True))
    sides = []
    for factors, lost_down, lost_up in _axes(len(total), downsample_factors, kernel_size_down, kernel_size_up, "valid"):
        scales = [math.prod(factors[:level]) for level in range(len(factors) + 1)]
        lost = sum(s * n for s, n in zip(scales, lost_down, strict=True))
        lost += sum(s * n for s, n in zip(scales, lost_up, strict=False))
        sides.append(math.ceil((lost / 2 + scales[-1] - 1) / scales[-1]) * scales[-1])
    return tuple(sides)


def total_factor(downsample_factors) -> Shape:
    """Product of the down-sampling factors per axis: possible input shapes differ by multiples of it."""
    return tuple(math.prod(factors) for factors in zip(*downsample_factors, strict=True))


def _in_the_middle(shape, direction: int, outer, inner, downsample_factors) -> Shape:
    """An input shape, one possible size further along each axis where that puts `inner` in the middle of `outer`."""
    sizes = zip(shape, outer, inner, total_factor(downsample_factors), strict=True)
    # Possible sizes differ by `step`, so only an odd one turns an odd difference into an even one.
    return tuple(size + direction * step * ((o - i) * step % 2) for size, o, i, step in sizes)


def _axes(dims, factors, kernels_down, kernels_up, padding) -> list[tuple[list[int], list[int], list[int]]]:
    """Per axis: factors, voxels lost by the convolutions of each level on the way down, and on the way up."""
    if not factors or any(len(factor) != dims for factor in factors):
        raise ValueError(f"downsample_factors: needs {dims} factors for each down-sampling, got {factors}")
    losses = []
    for name, kernels, levels in [
        ("kernel_size_down", kernels_down, len(factors) + 1),
        ("kernel_size_up", kernels_up, len(factors)),
    ]:
        kernels = default_kernels(levels, dims) if kernels is None else kernels
        if len(kernels) != levels:
            raise ValueError(
                f"{name}: {len(factors)} down-samplings need kernels for {levels} levels, got {len(kernels)}"
            )
        if any(len(kernel) != dims for level in kernels for kernel in level):
            raise ValueError(f"{name}: every kernel needs {dims} numbers, got {kernels}")
        lost = 0 if padding == "same" else 1
        losses.append([[lost * sum(k[axis] - 1 for k in level) for level in kernels] for axis in range(dims)])
    return [([factor[axis] for factor in factors], losses[0][axis], losses[1][axis]) for axis in range(dims)]


def _output_size(size: int, factors: list[int], lost_down: list[int], lost_up: list[int]) -> int:
    """Output length of one axis, or ValueError."""
    for level, factor in enumerate(factors):
        size -= lost_down[level]
        if size <= 0 or size % factor:
            raise ValueError(f"level {level}: {size} voxels cannot be down-sampled by {factor}")
        size //= factor
    size -= lost_down[-1]
    for level in reversed(range(len(factors))):
        size *= factors[level]
        cropped = equivariant_size(size, math.prod(factors[level:]), lost_up[level])
        if cropped <= lost_up[level]:
            raise ValueError(f"level {level}: nothing is left after cropping {size} voxels on the way up")
        size = cropped - lost_up[level]
    return size


def _first_possible(sizes, axis, least_output: int = 1) -> int | None:
    for size in sizes:
        try:
            output = _output_size(size, *axis)
        except ValueError:
            continue
        if output >= least_output:
            return size
    return None
