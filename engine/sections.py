"""2D networks work on stacks: all arrays keep their axes z, y, x, and only the network, its targets and offsets lose z.

So what reads, augments, tiles and writes volumes serves sections, too.
"""

from collections.abc import Sequence


def along_zyx(values: Sequence, z) -> tuple:
    """Values of a 2D config along y, x with `z` in front; three values as they are."""
    return tuple(values) if len(values) == 3 else (z, *values)


def affinity_offsets(cfg) -> list[list[int]]:
    """Offsets (z, y, x) in voxels of the affinities' channels."""
    return [list(along_zyx(offset, 0)) for offset in cfg.TRAIN.NEIGHBORHOOD]
