"""What 2D needs beside 3D. All arrays keep their axes z, y, x; only the network, its targets and offsets lose z.

A 2D network works on stacks of sections. The code that reads, augments, tiles and writes volumes therefore works on
sections too.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from yacs.config import CfgNode

T = TypeVar("T")


def along_zyx(values: Sequence[T], z: T) -> tuple[T, ...]:
    """Put `z` in front of two values y, x from a 2D config. Three values are returned unchanged."""
    return tuple(values) if len(values) == 3 else (z, *values)


def scored_by_section(cfg: CfgNode) -> bool:
    """Return whether segments end at their section, so that a neuron counts as a new object in each section."""
    return bool(cfg.DATA.DIM_2D and cfg.INS_SEGMENT.LINK_SECTIONS is None)


def ids_by_section(labels: NDArray[Any], first_section: int, numbers: dict[int, int]) -> NDArray[np.uint64]:
    """Give every label a different id in each section.

    Args:
        labels: (z, y, x) unsigned ids, a slab of a volume.
        first_section: the position of the first section of the slab in the volume.
        numbers: id -> number, shared by all slabs of a volume. It starts empty and is filled here.

    Returns:
        uint64 (z, y, x). No id is 0.
    """
    found, inverse = np.unique(labels, return_inverse=True)
    known = np.array([numbers.setdefault(label, len(numbers) + 1) for label in found.tolist()], np.uint64)
    sections = np.arange(first_section, first_section + len(labels), dtype=np.uint64)
    return (known[inverse].reshape(labels.shape) << np.uint64(32)) + sections[:, None, None]
