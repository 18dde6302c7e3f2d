"""What is probably wrong with labeled volumes, although a network can be trained on them.

Nothing of this stops a run: all of it can be meant so. A network that learns from shifted labels only gets worse. A few
boxes of each volume are read, so that a run can say so at its start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from scipy.fft import irfftn, rfftn
from scipy.ndimage import gaussian_filter
from yacs.config import CfgNode

from lsdseg.data_utils.gray import gray_percentiles, own_window, place_box
from lsdseg.data_utils.labels import open_labels
from lsdseg.data_utils.volumes import open_array, read, source_defaults
from lsdseg.engine.statistics import LEAST_LINES, Statistics, boundaries, read_boxes

BOX = (16, 128, 128)  # voxels along z, y, x
FEW_BOXES = 8  # enough to see a shift of two voxels in a second
SAMPLES, SAMPLE = 32, (4, 32, 32)  # boxes to recognize raw by, and their voxels along z, y, x
REACH = (3, 8, 8)  # the largest shift that is looked for, in voxels along z, y, x
WIDE = 6.0  # standard deviation in voxels of the brightness around a membrane
# FIB-25 and phantoms stay well below these with their own labels, and well above with labels shifted by two voxels.
LEAST_SHIFT, LEAST_GAIN, LEAST_CORRELATION = 2, 1.15, 0.05


class Alignment(NamedTuple):
    """How well raw and the boundaries of labels fit at each shift between them.

    Attributes:
        correlation: (z, y, x), of raw moved by the shift and boundaries; a shift of 0 is in the middle. It is negative
            where membranes are dark.
    """

    correlation: NDArray[np.float64]

    @property
    def middle(self) -> tuple[int, ...]:
        """Index of the shift 0."""
        return tuple(size // 2 for size in self.correlation.shape)

    @property
    def best(self) -> tuple[int, ...]:
        """The shift at which they fit best: by how many voxels z, y, x labels would have to move."""
        index = np.unravel_index(np.abs(self.correlation).argmax(), self.correlation.shape)
        return tuple(int(i) - m for i, m in zip(index, self.middle, strict=True))

    @property
    def is_shifted(self) -> bool:
        """Whether labels fit raw clearly better elsewhere."""
        best, here = np.abs(self.correlation).max(), abs(self.correlation[self.middle])
        return bool(max(map(abs, self.best)) >= LEAST_SHIFT and best > LEAST_GAIN * here and best > LEAST_CORRELATION)


def alignment_of(raw: Array, labels: Array, boxes: int = FEW_BOXES) -> Alignment | None:
    """Compare raw with the boundaries of labels in a few boxes; None if none of them holds both.

    Args:
        raw: (z, y, x).
        labels: (z, y, x), on the voxels of raw.
        boxes: how many to read.
    """
    found = [
        correlation
        for values, ids in read_boxes(raw, labels, boxes, own_window(raw.dtype) or gray_percentiles(raw), BOX)
        if ids is not None and (correlation := boundary_correlation(values, ids)) is not None
    ]
    if not found:
        return None
    # Boxes at the rim of small volumes may be smaller; all know the smallest shifts.
    least = [min(sizes) for sizes in zip(*(array.shape for array in found), strict=True)]
    cut = [
        array[tuple(slice((size - s) // 2, (size + s) // 2) for size, s in zip(array.shape, least, strict=True))]
        for array in found
    ]
    return Alignment(np.mean(cut, axis=0))


def boundary_correlation(raw: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.float64] | None:
    """Correlate raw with the boundaries of labels at all shifts up to REACH, or to a quarter of the box.

    Args:
        raw: (z, y, x).
        labels: (z, y, x), 0 where there is no neuron.

    Returns:
        Pearson's correlation, as `Alignment` holds it; None if there are no boundaries or raw is flat.
    """
    # What is bright or dark on a large scale says nothing about membranes.
    detail = raw - gaussian_filter(raw, (0, WIDE, WIDE))
    edges = boundaries(labels).astype(np.float32)
    spread = detail.std() * edges.std()
    if spread < 1e-6:
        return None
    spectrum = rfftn(detail - detail.mean()) * np.conj(rfftn(edges - edges.mean()))
    correlation = irfftn(spectrum, raw.shape) / (raw.size * spread)
    for axis, (size, reach) in enumerate(zip(raw.shape, REACH, strict=True)):
        shifts = np.arange(-min(reach, size // 4), min(reach, size // 4) + 1)
        # What a shift moves across the end of the box meets other voxels, with which it does not correlate.
        overlap = np.expand_dims(1 - np.abs(shifts) / size, tuple({0, 1, 2} - {axis}))
        correlation = np.take(correlation, shifts, axis=axis, mode="wrap") / overlap
    return np.asarray(correlation, np.float64)


def training_warnings(paths: Sequence[Path], statistics: Sequence[Statistics], cfg: CfgNode) -> list[str]:
    """Return what is suspicious about volumes to train on, each in one line.

    Args:
        paths: the volumes.
        statistics: those of the volumes, in any order.
        cfg: the config.

    Raises:
        UserError: a volume cannot be read.
    """
    boxes = max(1, min(FEW_BOXES, 8 * FEW_BOXES // max(1, len(paths))))
    defaults, found = source_defaults(cfg), set_warnings(paths, statistics, cfg)
    for path in paths:
        raw, labels = open_array(path, cfg.DATA.RAW, **defaults), open_labels(path, cfg.DATA.NEURON_LABELS, **defaults)
        alignment = alignment_of(raw, labels, boxes)
        if alignment and alignment.is_shifted:
            found.append(shift_warning(f"{cfg.DATA.NEURON_LABELS} in {path}", alignment))
    return found


def set_warnings(paths: Sequence[Path], statistics: Sequence[Statistics], cfg: CfgNode) -> list[str]:
    """Return what is suspicious about volumes as a set: the same raw twice, or both signs of contrast.

    Args and errors are those of `training_warnings`.
    """
    found: list[str] = []
    seen: dict[bytes, Path] = {}
    for path in paths:
        other = seen.setdefault(_sample(open_array(path, cfg.DATA.RAW, **source_defaults(cfg))), path)
        if other != path:
            found.append(f"{path} has the same {cfg.DATA.RAW} as {other}: leave one of them out")
    dark, bright = (sum(sign * one.lines > LEAST_LINES for one in statistics) for sign in (-1, 1))
    if dark and bright:
        found.append(
            f"membranes look dark in {dark} volume(s) and bright in {bright}: invert the gray values of one kind"
        )
    return found


def _sample(raw: Array) -> bytes:
    """Return a hash of the shape and of the voxels of some boxes, the same in every format, place and chunking."""
    places = (place_box(number, raw.shape, raw.shape, SAMPLE) for number in range(SAMPLES))
    boxes = [read(raw, tuple(slice(b, b + s) for b, s in zip(*place, strict=True))) for place in places]
    return hashlib.blake2b(b"".join([str(raw.shape).encode(), *(box.tobytes() for box in boxes)])).digest()


def shift_warning(where: str, alignment: Alignment) -> str:
    """Say in one line that labels are shifted, and what to do."""
    here, best = alignment.correlation[alignment.middle], np.abs(alignment.correlation).max()
    return (
        f"{where} fit raw better if moved by {alignment.best} voxels (z, y, x; correlation of their boundaries with "
        f"raw {best:.2f} instead of {abs(here):.2f}): look at them, and correct their offset"
    )
