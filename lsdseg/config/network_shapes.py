"""The output shape of the U-Net, as plain arithmetic: checking a config does not need torch.

The axes of a U-Net do not depend on each other, so everything here is computed for one axis at a time. With valid
convolutions, a kernel of width k removes k - 1 voxels, and max-pooling by f needs a length that f divides. After every
up-sampling the feature map is cropped, so that shifting the input by the product of the down-sampling factors shifts
the output by exactly as much. Without this translation equivariance, tiles that are predicted side by side do not fit
together. With "same" padding no voxels are lost, and only the divisibility remains.

All functions take the network as the same four arguments:

    downsample_factors: one factor per axis for each of n down-samplings.
    kernel_size_down: the kernels of the convolutions on the way down, for n + 1 levels, finest level first. None: two
        kernels of width 3 on every level.
    kernel_size_up: the same for the n levels on the way up.
    padding: "valid" or "same".

A network that cannot be built raises ValueError with the text "argument: reason".
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

AXES = "zyx"

Shape = tuple[int, ...]
Factors = Sequence[Sequence[int]]
Kernels = Sequence[Sequence[Sequence[int]]]


class _Axis(NamedTuple):
    """What a network does to one axis.

    Attributes:
        factors: down-sampling factors.
        lost_down: voxels that the convolutions of each level remove on the way down.
        lost_up: the same on the way up.
    """

    factors: list[int]
    lost_down: list[int]
    lost_up: list[int]


def default_kernels(levels: int, dims: int) -> list[list[Shape]]:
    """Return two convolutions of width 3 for each of `levels` levels: what a kernel size of None means."""
    return [[(3,) * dims, (3,) * dims] for _ in range(levels)]


def output_shape(
    input_shape: Sequence[int],
    downsample_factors: Factors,
    kernel_size_down: Kernels | None = None,
    kernel_size_up: Kernels | None = None,
    padding: str = "valid",
) -> Shape:
    """Return the output shape in voxels for an input shape in voxels (2 or 3 axes).

    Raises:
        ValueError: "argument: reason" if the network cannot be built or cannot take this input.
    """
    axes = _axes(len(input_shape), downsample_factors, kernel_size_down, kernel_size_up, padding)
    sizes = []
    for name, size, axis in zip(AXES[-len(input_shape) :], input_shape, axes, strict=True):
        try:
            sizes.append(_output_size(size, axis))
        except ValueError as error:
            raise ValueError(f"input_shape: axis {name}, {error}") from None
    return tuple(sizes)


def input_shape_for(
    output: Sequence[int],
    downsample_factors: Factors,
    kernel_size_down: Kernels | None = None,
    kernel_size_up: Kernels | None = None,
    padding: str = "valid",
) -> Shape:
    """Return the smallest input shape in voxels for which the network's output contains `output` in its center.

    Raises:
        ValueError: the network cannot be built.
    """
    network = downsample_factors, kernel_size_down, kernel_size_up, padding
    axes = _axes(len(output), *network)
    shape = tuple(_possible_size_from(size, axis, size) for size, axis in zip(output, axes, strict=True))
    return _make_concentric(shape, +1, output_shape(shape, *network), output, downsample_factors)


def input_shape_within(
    size: Sequence[int],
    downsample_factors: Factors,
    kernel_size_down: Kernels | None = None,
    kernel_size_up: Kernels | None = None,
    padding: str = "valid",
) -> Shape:
    """Return the largest input shape in voxels that the network can take from the center of the shape `size`.

    Raises:
        ValueError: the network cannot be built.
    """
    shape, _ = nearest_input_shapes(size, downsample_factors, kernel_size_down, kernel_size_up, padding)[0]
    return _make_concentric(shape, -1, size, shape, downsample_factors)


def nearest_input_shapes(
    input_shape: Sequence[int],
    downsample_factors: Factors,
    kernel_size_down: Kernels | None = None,
    kernel_size_up: Kernels | None = None,
    padding: str = "valid",
) -> list[tuple[Shape, Shape]]:
    """Return the possible input shapes nearest to `input_shape`, with their output shapes, the smaller one first.

    Axes with a possible size keep it. The others are rounded down in the first shape and up in the second, or up in
    both if the network cannot take less.

    Returns:
        One or two pairs (input shape, output shape), in voxels.

    Raises:
        ValueError: the network cannot be built.
    """
    axes = _axes(len(input_shape), downsample_factors, kernel_size_down, kernel_size_up, padding)
    below, above = [], []
    for size, axis in zip(input_shape, axes, strict=True):
        larger = _possible_size_from(size, axis)
        smaller = larger - math.prod(axis.factors) * (larger > size)
        above.append(larger)
        below.append(smaller if _is_possible(smaller, axis) else larger)
    return [
        (shape, output_shape(shape, downsample_factors, kernel_size_down, kernel_size_up, padding))
        for shape in sorted({tuple(below), tuple(above)})
    ]


def equivariant_size(size: int, step: int, lost: int) -> int:
    """Return the length to crop an up-sampled feature map to, before its convolutions.

    Args:
        size: length of the feature map in voxels.
        step: product of the down-sampling factors from this level to the bottom. The length after the convolutions is
            a multiple of it.
        lost: voxels that the convolutions remove.
    """
    return (size - lost) // step * step + lost


def tile_context(
    downsample_factors: Factors,
    kernel_size_down: Kernels | None = None,
    kernel_size_up: Kernels | None = None,
    padding: str = "valid",
) -> Shape:
    """Return the voxels per axis and side that a tile needs around its output, so that tiles fit without a seam.

    With valid convolutions, this is what the network removes. With "same" padding the output is as large as the input,
    but padding affects it as far from the rim as the receptive field reaches. The context is then that reach, rounded
    up to a multiple of `total_factor`, because the max-pooling grid must lie the same way in every tile.

    Raises:
        ValueError: the network cannot be built.
    """
    total = total_factor(downsample_factors)
    if padding == "valid":
        shape, output = nearest_input_shapes((1,) * len(total), downsample_factors, kernel_size_down, kernel_size_up)[0]
        return tuple((i - o) // 2 for i, o in zip(shape, output, strict=True))
    sides = []
    for axis in _axes(len(total), downsample_factors, kernel_size_down, kernel_size_up, "valid"):
        scales = [math.prod(axis.factors[:level]) for level in range(len(axis.factors) + 1)]
        lost = sum(s * n for s, n in zip(scales, axis.lost_down, strict=True))
        lost += sum(s * n for s, n in zip(scales, axis.lost_up, strict=False))
        sides.append(math.ceil((lost / 2 + scales[-1] - 1) / scales[-1]) * scales[-1])
    return tuple(sides)


def total_factor(downsample_factors: Factors) -> Shape:
    """Return the product of the down-sampling factors per axis. Possible input sizes differ by multiples of it."""
    return tuple(math.prod(factors) for factors in zip(*downsample_factors, strict=True))


def _make_concentric(
    shape: Shape, direction: int, outer: Sequence[int], inner: Sequence[int], downsample_factors: Factors
) -> Shape:
    """Move `shape` to the next possible size along each axis where `inner` cannot be in the center of `outer`."""
    sizes = zip(shape, outer, inner, total_factor(downsample_factors), strict=True)
    # Possible sizes differ by `step`, so only an odd step turns an odd difference into an even one.
    return tuple(size + direction * step * ((o - i) * step % 2) for size, o, i, step in sizes)


def _axes(
    dims: int, factors: Factors, kernels_down: Kernels | None, kernels_up: Kernels | None, padding: str
) -> list[_Axis]:
    """Split a network into its axes, z (or y) first."""
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
                f"{name}: {len(factors)} down-sampling(s) need kernels for {levels} levels, got {len(kernels)}"
            )
        if any(len(kernel) != dims for level in kernels for kernel in level):
            raise ValueError(f"{name}: every kernel needs {dims} numbers, got {kernels}")
        lost = 0 if padding == "same" else 1
        losses.append([[lost * sum(k[axis] - 1 for k in level) for level in kernels] for axis in range(dims)])
    return [_Axis([factor[axis] for factor in factors], losses[0][axis], losses[1][axis]) for axis in range(dims)]


def _output_size(size: int, axis: _Axis) -> int:
    """Return the output length for an input length, or raise ValueError if the network cannot take it."""
    factors, lost_down, lost_up = axis
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


def _is_possible(size: int, axis: _Axis, least_output: int = 1) -> bool:
    """Return whether the network can take this input length and gives at least `least_output` voxels."""
    try:
        return _output_size(size, axis) >= least_output
    except ValueError:
        return False


def _possible_size_from(size: int, axis: _Axis, least_output: int = 1) -> int:
    """Return the smallest possible input length that is at least `size`.

    n voxels at the coarsest level come from one input length, `lost` + n * `total`. The more voxels, the longer the
    output, so a binary search finds the smallest n.
    """
    total = math.prod(axis.factors)
    lost = sum(math.prod(axis.factors[:level]) * axis.lost_down[level] for level in range(len(axis.factors)))
    first = max(1, -(-(size - lost) // total))
    # No level loses more voxels of the output than of its own times `total`, and cropping loses less than `total`.
    last = first + sum(axis.lost_down) + sum(axis.lost_up) + len(axis.factors) + least_output
    enough = bisect_left(range(first, last), True, key=lambda n: _is_possible(lost + n * total, axis, least_output))
    return lost + (first + enough) * total
