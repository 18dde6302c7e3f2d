"""2D networks work on stacks: all arrays keep their axes z, y, x, and only the network, its targets and offsets lose z.

So what reads, augments, tiles and writes volumes serves sections, too.
"""

from collections.abc import Sequence

import numpy as np


def along_zyx(values: Sequence, z) -> tuple:
    """Values of a 2D config along y, x with `z` in front; three values as they are."""
    return tuple(values) if len(values) == 3 else (z, *values)


def affinity_offsets(cfg) -> list[list[int]]:
    """Offsets (z, y, x) in voxels of the affinities' channels."""
    return [list(along_zyx(offset, 0)) for offset in cfg.TRAIN.NEIGHBORHOOD]


def scored_by_section(cfg) -> bool:
    """Whether segments end at their section, so that a neuron is another object in each section."""
    return cfg.DATA.DIM_2D and cfg.INS_SEGMENT.LINK_SECTIONS is None


def ids_by_section(labels: np.ndarray, first_section: int, numbers: dict[int, int]) -> np.ndarray:
    """Give what has one id another one in every section.

    Args:
        labels: (z, y, x), a block of a volume, unsigned ids.
        first_section: the block's first section in the volume.
        numbers: empty for the first block of a volume, and passed on to the others: numbers that it gave to ids.

    Returns:
        uint64 (z, y, x), no id 0.
    """
    found, inverse = np.unique(labels, return_inverse=True)
    known = np.array([numbers.setdefault(label, len(numbers) + 1) for label in found.tolist()], np.uint64)
    sections = np.arange(first_section, first_section + len(labels), dtype=np.uint64)
    return (known[inverse].reshape(labels.shape) << np.uint64(32)) + sections[:, None, None]
