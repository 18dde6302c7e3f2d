"""Views of a volume: mirrored and transposed copies that a network predicts, and how their predictions are turned back.

A network gives each view of the same voxels slightly different values, and the differences are mostly its errors. What
is predicted says something about directions, so it has to be turned back by more than its voxels: an affinity of a
voxel and the one before it is, in the mirrored volume, the affinity of that voxel and the one behind it. It therefore
belongs one voxel farther.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.config.model_types import affinity_offsets, placement_offsets, tasks_of
from lsdseg.engine.offsets import Offset
from lsdseg.errors import UserError

# Voxels before and behind a box, along z, y, x.
Margins = tuple[tuple[int, int], ...]

OFFSETS: dict[str, Callable[[CfgNode], list[list[int]]]] = {"affs": affinity_offsets, "placement": placement_offsets}


@dataclass(frozen=True)
class View:
    """A mirrored and transposed copy of a volume.

    Attributes:
        mirrored: whether z, y, x are reversed.
        transposed: whether y and x are exchanged, after that.
    """

    mirrored: tuple[bool, bool, bool]
    transposed: bool

    @property
    def axes(self) -> tuple[int, int, int]:
        """The axis of the volume that each axis of the view shows."""
        return (0, 2, 1) if self.transposed else (0, 1, 2)

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Return the view of an array (..., z, y, x)."""
        turned = self._mirror(volume)
        return np.swapaxes(turned, -2, -1) if self.transposed else turned

    def back(self, view: NDArray[Any]) -> NDArray[Any]:
        """Return the array (..., z, y, x) of which `view` is the view."""
        return self._mirror(np.swapaxes(view, -2, -1) if self.transposed else view)

    def _mirror(self, volume: NDArray[Any]) -> NDArray[Any]:
        z, y, x = (slice(None, None, -1 if mirrored else 1) for mirrored in self.mirrored)
        return volume[..., z, y, x]

    def offset_back(self, offset: Sequence[int]) -> Offset:
        """Return, in the volume, an offset that a channel has in the view."""
        straight = [offset[axis] for axis in self.axes]
        return tuple(-o if mirrored else o for o, mirrored in zip(straight, self.mirrored, strict=True))

    def box(self, ends: Sequence[tuple[int, int]], shape: Sequence[int]) -> Margins:
        """Return, in the view, begin and end of a box in a volume of a shape."""
        turned = [
            (size - end, size - begin) if mirrored else (begin, end)
            for (begin, end), size, mirrored in zip(ends, shape, self.mirrored, strict=True)
        ]
        return tuple(turned[axis] for axis in self.axes)


def views_of(cfg: CfgNode) -> list[View]:
    """Return the DATA.VIEWS views to predict, first the volume as it is.

    The first four mirror y and x, the first eight z as well, and 16 transpose y and x, too. A 2D network knows no z:
    four views mirror, and eight transpose.

    Raises:
        UserError: the network has no such views, or no channel for what one of its affinities becomes in one of them.
    """
    count, flat = cfg.DATA.VIEWS, cfg.DATA.DIM_2D
    if flat and count > 8:
        raise UserError(f"DATA.VIEWS is {count}, but a network for sections (DATA.DIM_2D) has 8 views: set it to 8")
    both = (False, True)
    flips = [(z, y, x) for z, y, x in product(both, both, both) if not (z and flat)]
    views = [View(mirrored, transposed) for transposed in both for mirrored in flips][:count]
    if views[-1].transposed:
        model = cfg.MODEL
        per_axis = {"VOXEL_SIZE": model.VOXEL_SIZE, "CONTEXT": model.CONTEXT}
        per_axis |= {"DOWNSAMPLE_FACTORS": tuple(np.prod(model.DOWNSAMPLE_FACTORS, axis=0).tolist())}
        for key, values in per_axis.items():
            if values[-2] != values[-1]:
                raise UserError(
                    f"DATA.VIEWS {count} exchanges y and x, but they differ in {key} {tuple(values)} of the network: "
                    f"set DATA.VIEWS to {count // 2}"
                )
    for task in set(tasks_of(cfg)) & OFFSETS.keys():
        for view in views:
            _channels_of_view(view, OFFSETS[task](cfg))
    return views


def margins(view: View, cfg: CfgNode) -> Margins:
    """Return how many voxels around a box a view must predict, so that the box is complete when it is turned back."""
    shifts: list[Offset] = [(0, 0, 0)]
    for task in set(tasks_of(cfg)) & OFFSETS.keys():
        shifts += [shift for _, shift in _channels_of_view(view, OFFSETS[task](cfg))]
    along = np.array(shifts)
    return tuple((int(-low), int(high)) for low, high in zip(along.min(axis=0), along.max(axis=0), strict=True))


def turned_back(
    task: str, predicted: NDArray[np.float32], view: View, around: Margins, cfg: CfgNode
) -> NDArray[np.float32]:
    """Return the prediction of a box from that of a view of it.

    Args:
        task: what was predicted.
        predicted: (channels, z, y, x) of the view, in 0..1: the box and `around`.
        view: the view.
        around: voxels around the box.
        cfg: the config of the network.

    Returns:
        (channels, *shape of the box) in the volume's own directions.
    """
    values = view.back(predicted)
    box = [slice(low, size - high) for (low, high), size in zip(around, values.shape[1:], strict=True)]
    if task in OFFSETS:
        channels = _channels_of_view(view, OFFSETS[task](cfg))
        return np.stack([values[source][_shifted(box, shift)] for source, shift in channels])
    values = values[:, *box]
    return _lsds_back(values, view) if task == "lsds" else values


def _shifted(box: Sequence[slice], shift: Offset) -> tuple[slice, ...]:
    return tuple(slice(along.start + voxels, along.stop + voxels) for along, voxels in zip(box, shift, strict=True))


def _channels_of_view(view: View, offsets: Sequence[Sequence[int]]) -> list[tuple[int, Offset]]:
    """Return, for each channel, the one of a view that holds its values, and how many voxels farther they lie there.

    A channel whose offset becomes its own opposite holds, at a voxel, what belongs to the voxel at the other end.

    Raises:
        UserError: no channel of the view holds the values of one.
    """
    in_volume = [view.offset_back(offset) for offset in offsets]
    channels: list[tuple[int, Offset]] = []
    for offset in map(tuple, offsets):
        opposite = tuple(-o for o in offset)
        if offset in in_volume:
            channels.append((in_volume.index(offset), (0, 0, 0)))
        elif opposite in in_volume:
            channels.append((in_volume.index(opposite), offset))
        else:
            raise UserError(
                f"DATA.VIEWS mirrors or transposes, and TRAIN.NEIGHBORHOOD has no offset that becomes {list(offset)} "
                "by that: set DATA.VIEWS to 1"
            )
    return channels


def _lsds_back(values: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    """Turn LSDs back: offsets and variances per axis, correlations per pair of axes, and the mass."""
    dims = 3 if len(values) == 10 else 2
    axes = [axis - (3 - dims) for axis in view.axes[3 - dims :]]
    mirrored = view.mirrored[3 - dims :]
    pairs = list(combinations(range(dims), 2))
    sources = [*axes, *(dims + axis for axis in axes)]
    signs = [*mirrored, *(False for _ in axes)]
    for first, second in pairs:
        low, high = sorted((axes[first], axes[second]))
        sources.append(2 * dims + pairs.index((low, high)))
        signs.append(mirrored[first] != mirrored[second])
    turned = values[[*sources, len(values) - 1]]
    turned[:-1][signs] = 1 - turned[:-1][signs]
    return turned


# What is kept of the views that were seen so far, when one more is seen.
RUNNING = {"mean": np.add, "min": np.minimum, "max": np.maximum}


class Combination:
    """The predictions of several views in one.

    Affinities are combined as DATA.COMBINE_VIEWS says, everything else by its mean. With DATA.DISAGREEMENT, there is
    one more result, "disagreement": the largest minus the smallest affinity of a voxel, on average over its channels.

    Args:
        cfg: the config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.how, self.disagreement = cfg.DATA.COMBINE_VIEWS, cfg.DATA.DISAGREEMENT
        self.count = 0
        self._running: dict[tuple[str, str], NDArray[np.float32]] = {}
        self._all: list[NDArray[np.float32]] = []

    def add(self, predicted: dict[str, NDArray[np.float32]]) -> None:
        """Take what one more view predicts, turned back: task -> (channels, z, y, x)."""
        self.count += 1
        for task, values in predicted.items():
            kinds = {self.how} if task == "affs" else {"mean"}
            if task == "affs" and self.disagreement:
                kinds |= {"min", "max"}
            for kind in kinds & RUNNING.keys():
                known = self._running.get((task, kind))
                self._running[task, kind] = values if known is None else RUNNING[kind](known, values)
            if "median" in kinds:  # it needs all of them
                self._all.append(values)

    def results(self) -> dict[str, NDArray[np.float32]]:
        """Return task -> float32 (channels, z, y, x) of all views together."""
        results = {task: total / np.float32(self.count) for task, total in self._of_kind("mean").items()}
        if self.how == "min":
            results |= self._of_kind("min")
        if self._all:
            results["affs"] = np.median(self._all, axis=0).astype(np.float32, copy=False)
        if self.disagreement:
            difference = self._running["affs", "max"] - self._running["affs", "min"]
            results["disagreement"] = difference.mean(axis=0, keepdims=True)
        return results

    def _of_kind(self, kind: str) -> dict[str, NDArray[np.float32]]:
        return {task: values for (task, kept), values in self._running.items() if kept == kind}
