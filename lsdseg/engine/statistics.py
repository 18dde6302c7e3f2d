"""Statistics of the data that a network was trained on, and whether a volume to predict looks like it.

A network is good at what it has seen. Other gray values, other voxels and inverted contrast spoil a prediction without
any error. Training therefore keeps statistics of its volumes in the checkpoint, and prediction compares them with those
of its volume. Both read a few boxes only, however large the volume is, and the same ones each time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, gaussian_filter
from yacs.config import CfgNode

from lsdseg.data_utils.gray import BOX, PERCENTILES, Window, own_window, place_box, to_unit
from lsdseg.data_utils.labels import grow_boundary, is_labeled, open_labels
from lsdseg.data_utils.placement import voxel_size_nm
from lsdseg.data_utils.volumes import has_array, open_array, read, source_defaults
from lsdseg.engine.intensity import raw_window
from lsdseg.engine.sample import Sample
from lsdseg.models.checkpoint import HISTOGRAM_BINS, MOST_STATISTICS, TRAINING_DATA, read_checkpoint

BOXES = 64  # read of a volume; of a volume that is mostly empty, up to four times as many are looked at
MOST_EQUAL = 0.2  # of the voxels of a box; with more, part of it was not imaged
LINE_SIGMA = 2.0  # voxels; membranes are lines about twice as wide

# Crops of FIB-25 and phantoms of other seeds stay well below these, halved contrast and a gamma of 0.7 well above.
MOST_SHIFT = 0.65  # distance of two histograms, as a share of the standard deviation in training
LEAST_SPREAD = 0.6  # ratio of the standard deviations
LEAST_LINES = 0.1  # with less, nobody can say whether lines are dark or bright
MOST_SCALE = 1.2  # ratio of voxel sizes


@dataclass(frozen=True)
class Statistics:
    """Statistics of a volume. Gray values are in 0..1.

    Attributes:
        histogram: share of the gray values in each of HISTOGRAM_BINS bins.
        voxel_size: in nm, along the axes of the network.
        lines: -1 to 1, negative if thin lines are dark, as membranes usually are; near 0 if there are none.
        contrast: mean gray value inside neurons minus that at their boundaries; None without labels.
    """

    histogram: list[float]
    voxel_size: list[float]
    lines: float
    contrast: float | None = None

    @property
    def median(self) -> float:
        """The median gray value."""
        return float(np.searchsorted(np.cumsum(self.histogram), 0.5)) / (HISTOGRAM_BINS - 1)

    @property
    def spread(self) -> float:
        """The standard deviation of the gray values."""
        values, shares = np.linspace(0, 1, HISTOGRAM_BINS), np.array(self.histogram)
        return float(np.sqrt(shares @ (values - shares @ values) ** 2))

    def inverted(self) -> Statistics:
        """Return the statistics of the negative."""
        contrast = None if self.contrast is None else -self.contrast
        return Statistics(self.histogram[::-1], self.voxel_size, -self.lines, contrast)

    def distance(self, other: Statistics) -> float:
        """Return how far gray values must be moved on average to turn one histogram into the other."""
        return float(np.abs(np.cumsum(self.histogram) - np.cumsum(other.histogram)).mean())


def statistics_of(
    boxes: Iterable[tuple[NDArray[np.float32], NDArray[Any] | None]], voxel_size: Sequence[float]
) -> Statistics | None:
    """Compute the statistics of boxes of a volume.

    Args:
        boxes: raw (z, y, x) in 0..1, and labels of the same shape, or None. Voxels with the label 0 are no neuron.
        voxel_size: in nm, along the axes of the network.

    Returns:
        The statistics, None if there is no box.
    """
    counts, lines = np.zeros(HISTOGRAM_BINS), np.zeros(2)
    sums, voxels = np.zeros(2), np.zeros(2, int)
    for raw, labels in boxes:
        bins = np.rint(raw * (HISTOGRAM_BINS - 1)).astype(int).clip(0, HISTOGRAM_BINS - 1)
        counts += np.bincount(bins.ravel(), minlength=HISTOGRAM_BINS)
        lines += _line_strengths(raw)
        if labels is not None:
            boundary = boundaries(labels)
            for part, chosen in enumerate(((labels > 0) & ~boundary, boundary)):
                sums[part] += raw[chosen].sum(dtype=float)
                voxels[part] += np.count_nonzero(chosen)
    if not counts.any():
        return None
    dark, bright = lines
    means = sums / np.maximum(voxels, 1)
    return Statistics(
        histogram=(counts / counts.sum()).tolist(),
        voxel_size=[float(size) for size in voxel_size],
        lines=float((bright - dark) / (bright + dark)) if lines.any() else 0.0,
        contrast=float(means[0] - means[1]) if voxels.all() else None,
    )


def prediction_window(raw: Array, cfg: CfgNode) -> Window:
    """Return the gray values of a volume that become 0 and 1 in a prediction with TRAIN.CHECKPOINT.

    Where a sample of the volume decides, the darkest and the brightest become what they were in training, if that is
    known: not all volumes fill the range from 0 to 1.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    known = (0.0, 1.0)
    if not (cfg.DATA.RAW_WINDOW or own_window(raw.dtype)) and (trained := statistics_in(cfg.TRAIN.CHECKPOINT)):
        shares = np.cumsum(np.mean([statistics.histogram for statistics in trained], axis=0))
        low, high = np.searchsorted(shares, np.divide(PERCENTILES, 100)) / (HISTOGRAM_BINS - 1)
        known = (float(low), float(high))
    return raw_window(raw, cfg, known)


def sample_statistics(
    raw: Array, cfg: CfgNode, labels: Array | None = None, boxes: int = BOXES, window: Window | None = None
) -> Statistics | None:
    """Compute the statistics of a volume from a few boxes, the same ones each time.

    Args:
        raw: (z, y, x).
        cfg: the config.
        labels: (z, y, x), on the voxels of raw. Only boxes with known labels are taken. None: boxes are anywhere.
        boxes: how many to read. Boxes without an image are left out.
        window: the gray values that become 0 and 1. None: those of `raw_window`.

    Returns:
        The statistics, None if no box holds an image.
    """
    voxel_size = voxel_size_nm(raw)[-len(cfg.MODEL.VOXEL_SIZE) :]
    return statistics_of(read_boxes(raw, labels, boxes, window or raw_window(raw, cfg)), voxel_size)


def training_statistics(paths: Sequence[Path], cfg: CfgNode) -> list[dict[str, Any]]:
    """Compute the statistics of the volumes to train on, to store them as TRAINING_DATA in a checkpoint.

    Args:
        paths: the volumes. Of many, MOST_STATISTICS are taken.
        cfg: the config.

    Returns:
        The fields of `Statistics` of each volume that holds an image.

    Raises:
        UserError: a volume cannot be read.
    """
    taken = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MOST_STATISTICS)).astype(int))]
    found = []
    for path in taken:
        raw = open_array(path, cfg.DATA.RAW, **source_defaults(cfg))
        labels = None
        if has_array(path, cfg.DATA.NEURON_LABELS):
            labels = open_labels(path, cfg.DATA.NEURON_LABELS, **source_defaults(cfg))
        found.append(sample_statistics(raw, cfg, labels, boxes=max(1, min(BOXES, 4 * BOXES // len(taken)))))
    return [asdict(statistics) for statistics in found if statistics]


def statistics_in(checkpoint: Path | str) -> list[Statistics]:
    """Return the statistics of the training data that a checkpoint keeps; published checkpoints have none.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    names = [field.name for field in fields(Statistics)]
    entries = read_checkpoint(checkpoint).get(TRAINING_DATA, [])
    return [Statistics(**{name: entry[name] for name in names}) for entry in entries]


def warn_if_unlike(samples: Sequence[Sample]) -> None:
    """Print a line on stderr for each volume that does not look like the training data of TRAIN.CHECKPOINT.

    Nothing is printed if the checkpoint has no statistics, as published ones and those of earlier versions.

    Args:
        samples: those to predict, of one config.

    Raises:
        UserError: the checkpoint or a volume cannot be read.
    """
    if not samples:
        return
    cfg = samples[0].cfg
    trained = statistics_in(cfg.TRAIN.CHECKPOINT)
    for sample in samples if trained else []:
        own = sample_statistics(sample.raw, cfg, window=prediction_window(sample.raw, cfg))
        if own and (reasons := differences(own, trained)):
            print(
                f"warning: {cfg.DATA.RAW} in {sample.volume} does not look like the training data of "
                f"{Path(cfg.TRAIN.CHECKPOINT).name}: {'; '.join(reasons)}",
                file=sys.stderr,
            )


def differences(own: Statistics, trained: Sequence[Statistics]) -> list[str]:
    """Compare a volume with the volumes of a training run. It need only be like one of them.

    Args:
        own: the statistics of the volume.
        trained: those of the training run, one or more.

    Returns:
        What differs and what to do, each in a few words with both numbers; empty if they are alike.
    """
    reasons = []
    near = min(trained, key=lambda other: _scale(own, other))
    if _scale(own, near) > MOST_SCALE:
        sizes = " ".join(f"{size:g}" for size in near.voxel_size)
        reasons.append(
            f"its voxels are {' x '.join(f'{size:g}' for size in own.voxel_size)} nm, in training "
            f"{sizes.replace(' ', ' x ')} (rescale it: data_utils/rescale.py --voxel-size {sizes})"
        )
    clear = [min(abs(own.lines), abs(other.lines)) > LEAST_LINES and own.lines * other.lines < 0 for other in trained]
    if inverted := all(clear):
        one = trained[0]
        reasons.append(
            f"its contrast is inverted, membranes look {_tone(own)} ({own.lines:+.2f}), in training {_tone(one)} "
            f"({one.lines:+.2f}{_contrast(one)}) (replace each gray value v by 255 - v, or by 1 - v if it is float)"
        )
        own = own.inverted()
    near = min(trained, key=own.distance)
    spread = own.spread / max(near.spread, 1e-6)
    if own.distance(near) > MOST_SHIFT * near.spread or not LEAST_SPREAD <= spread <= 1 / LEAST_SPREAD:
        reasons.append(
            f"its gray values{' once inverted' * inverted} have median {own.median:.2f} and standard deviation "
            f"{own.spread:.2f}, in training {near.median:.2f} and {near.spread:.2f} "
            "(match them: preprocess_data.py PREPROCESS.HISTOGRAM_MATCH)"
        )
    return reasons


def _contrast(statistics: Statistics) -> str:
    """Say how boundaries differ from the inside of neurons, where that is known."""
    if statistics.contrast is None:
        return ""
    side = "below" if statistics.contrast > 0 else "above"
    return f", boundaries {abs(statistics.contrast):.2f} {side} the inside of neurons"


def _tone(statistics: Statistics) -> str:
    return "dark" if statistics.lines < 0 else "bright"


def _scale(own: Statistics, other: Statistics) -> float:
    """Return by how much voxel sizes differ, the largest ratio of all axes, at least 1."""
    pairs = zip(own.voxel_size[::-1], other.voxel_size[::-1], strict=False)
    return max(max(a / b, b / a) for a, b in pairs)


def read_boxes(
    raw: Array, labels: Array | None, boxes: int, window: Window, box: Sequence[int] = BOX
) -> Iterator[tuple[NDArray[np.float32], NDArray[Any] | None]]:
    """Read boxes with an image from all over a volume, the same ones each time.

    Args:
        raw: (z, y, x).
        labels: (z, y, x), on the voxels of raw. Only boxes with known labels are taken. None: boxes are anywhere.
        boxes: how many to read, at most.
        window: the gray values that become 0 and 1.
        box: their size in voxels; they are smaller where chunks are.

    Yields:
        Raw, float32 in 0..1, and labels with 0 where they are not known, or None.
    """
    where = raw if labels is None else labels
    shift = (where.offset - raw.offset) / raw.voxel_size
    seen, taken = set(), 0
    for number in range(4 * boxes):
        begin, shape = place_box(number, where.shape[-3:], where.chunk_shape[-3:], box)
        if taken == boxes or begin in seen:
            continue
        seen.add(begin)
        known = None
        if labels is not None:
            ids = read(labels, tuple(slice(b, b + s) for b, s in zip(begin, shape, strict=True)))
            known = np.where(is_labeled(ids), ids, 0)
            if not known.any():
                continue
        values = read(raw, tuple(slice(b + o, b + o + s) for b, o, s in zip(begin, shift, shape, strict=True)))
        _, counts = np.unique(values, return_counts=True)
        if counts.max() > MOST_EQUAL * values.size:
            continue
        taken += 1
        yield to_unit(values, window), known


def _line_strengths(raw: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sum up how much the sections of a box look like dark lines, and like bright ones.

    Across a line, the second derivative is large, along it is small: positive for a dark line, negative for a bright
    one. The third power lets the few voxels on sharp lines count more than texture, which is dark and bright alike.

    Args:
        raw: (z, y, x) in 0..1.

    Returns:
        Two numbers from 0, without a unit: dark, bright.
    """
    # Differences, because the kernels of scipy's derivatives do not add up to 0: a bright area would look like lines.
    smooth, second, first = gaussian_filter(raw, (0, LINE_SIGMA, LINE_SIGMA)), (1.0, -2.0, 1.0), (-0.5, 0.0, 0.5)
    yy, xx = correlate1d(smooth, second, axis=1), correlate1d(smooth, second, axis=2)
    xy = correlate1d(correlate1d(smooth, first, axis=1), first, axis=2)
    mean, radius = (yy + xx) / 2, np.hypot((yy - xx) / 2, xy)
    high, low = mean + radius, mean - radius
    strengths = np.clip(high - np.abs(low), 0, None), np.clip(-low - np.abs(high), 0, None)
    return np.array([(strength**3).sum(dtype=float) for strength in strengths])


def boundaries(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the voxels of neurons that touch another neuron, or none, in y or x."""
    return (grow_boundary(labels, 1, axes=(1, 2)) == 0) & (labels > 0)
