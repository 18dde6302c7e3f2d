"""Affinities are read by their offsets: what a channel says is written with the array, never implied by its place.

A channel with the offset (z, y, x) holds, for every voxel, how likely it and the voxel at that offset are one neurite.
Networks predict the channels in the order of their TRAIN.NEIGHBORHOOD, with long-range ones or, in 2D, without z.
"""

from collections.abc import Sequence

from funlib.persistence import Array

Offset = tuple[int, ...]  # z, y, x

# The channels that waterz takes, in its order.
DIRECT_NEIGHBORS: list[Offset] = [(-1, 0, 0), (0, -1, 0), (0, 0, -1)]


def offsets_of(array: Array) -> list[Offset]:
    """The offset of each channel of an array, by its attribute `offsets`; without it, the direct neighbors."""
    return [tuple(offset) for offset in array.attrs.get("offsets", DIRECT_NEIGHBORS)]


def is_direct(offset: Offset) -> bool:
    """Whether an offset leads to a voxel that shares a face."""
    return sum(map(abs, offset)) == 1


def spans_sections(offsets: Sequence[Offset]) -> bool:
    """Whether any offset leads to another section."""
    return any(z for z, _, _ in offsets)
