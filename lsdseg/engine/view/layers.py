"""What a page shows: every array that is found in a volume and in its output, each as a layer of the right kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from funlib.persistence import Array
from yacs.config import CfgNode

from lsdseg.data_utils.layout import FRAGMENTS, SEGMENTATIONS, prediction_name
from lsdseg.data_utils.placement import in_picometers
from lsdseg.data_utils.regions import region_text
from lsdseg.data_utils.volumes import list_arrays, name_arrays, open_array, read, source_defaults
from lsdseg.engine.offsets import offsets_of
from lsdseg.engine.sample import best_segmentation
from lsdseg.engine.view.shaders import affinities_shader, channels_shader, gray_shader, lsds_shader
from lsdseg.errors import UserError, quoted
from lsdseg.files import PARTIAL

# Names of layers whose dataset has another.
NAMES = {prediction_name("affs"): "affinities", prediction_name("lsds"): "LSDs"}
SAMPLED = 64  # voxels along each axis of the box that says how bright raw is


@dataclass
class Layer:
    """One layer of a page.

    Attributes:
        name: its name on the page; no two layers of a page have the same.
        dataset: the dataset that it shows.
        array: (z, y, x), or (c, z, y, x).
        shader: how to color an image. Empty: the layer shows ids, each in a color of its own.
        visible: whether the page shows it at first.
    """

    name: str
    dataset: str
    array: Array
    shader: str = ""
    visible: bool = False

    @property
    def kind(self) -> Literal["image", "segmentation"]:
        """What Neuroglancer calls it."""
        return "image" if self.shader else "segmentation"


def layers_of(cfg: CfgNode, volume: Path | None, output: Path | None) -> list[Layer]:
    """Find what can be shown: raw first, then labels, predictions, fragments and segmentations.

    Args:
        cfg: names the datasets of the volume.
        volume: the zarr with raw and labels, None if it is not known.
        output: the zarr with predictions and segmentations, None to show the volume alone.

    Returns:
        The layers. Raw and one segmentation are visible, or else the first layer that there is. What cannot be shown is
        printed, with the reason.

    Raises:
        UserError: a zarr does not exist; there is nothing to show; something lies elsewhere than raw.
    """
    paths = [path for path in dict.fromkeys((volume, output)) if path is not None]
    layers: list[Layer] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} does not exist or is not a zarr folder: check the path, or run predicter.py first")
        layers += _layers_in(path, cfg)
    if not layers:
        named = " and ".join(map(str, paths))
        raise UserError(f"nothing to show in {named}: no dataset with the axes z, y, x ({name_arrays(paths[-1])})")
    if not any(layer.dataset == cfg.DATA.RAW for layer in layers):
        print(f"there is no {cfg.DATA.RAW} to show: name the zarr that has it with --volume")
    layers.sort(key=lambda layer: _rank(layer, cfg))
    _require_overlap(layers, cfg)
    _make_unique(layers)
    for layer in (layers[0], _best_segmentation(layers, output)):
        layer.visible = True
    return layers


def find_layer(layers: Sequence[Layer], name: str) -> Layer:
    """Find a segmentation by its name on the page, its dataset, or the last part of that.

    Raises:
        UserError: there is none, or there are several.
    """
    ids = [layer for layer in layers if layer.kind == "segmentation"]
    found = [layer for layer in ids if name in (layer.name, layer.dataset, layer.dataset.rpartition("/")[2])]
    if len(found) != 1:
        names = ", ".join(layer.dataset for layer in ids)
        raise UserError(f"there is no segmentation {quoted(name)} to compare: choose from {names or 'none'}")
    return found[0]


def _layers_in(path: Path, cfg: CfgNode) -> list[Layer]:
    """Open all that a zarr holds. Print what cannot be shown."""
    layers = []
    for dataset in _datasets_in(path):
        try:
            layers.append(_layer(dataset, open_array(path, dataset, **source_defaults(cfg)), cfg))
        except UserError as error:
            print(f"left out: {error}")
    return layers


def _datasets_in(path: Path) -> list[str]:
    """Names of datasets: of sections DATASET/0 ... DATASET/n that of the stack, of a pyramid its finest level."""
    groups: dict[str, list[str]] = {}
    for name in list_arrays(path):
        if name.endswith(PARTIAL):
            continue
        parent, _, last = name.rpartition("/")
        groups.setdefault(parent if parent and last.isdecimal() else name, []).append(name)
    return [_stack_or_finest(path, group, names) for group, names in groups.items()]


def _stack_or_finest(path: Path, group: str, names: list[str]) -> str:
    if names == [group]:
        return group
    first = min(names, key=lambda name: int(name.rpartition("/")[2]))
    try:
        return group if len(open_array(path, first).shape) == 2 else first
    except UserError:  # sections may say nothing about their voxels
        return group


def _layer(dataset: str, array: Array, cfg: CfgNode) -> Layer:
    """Choose how to show an array.

    Raises:
        UserError: it has other axes than z, y, x, perhaps after channels, or no numbers that can be shown.
    """
    if array.voxel_size.dims != 3 or len(array.shape) > 4:
        raise UserError(f"{dataset} has shape {array.shape}, not the axes z, y, x")
    if array.dtype.kind not in ("b", "u", "i", "f"):
        raise UserError(f"{dataset} is {array.dtype}, which cannot be shown")
    return Layer(_name(dataset, array, cfg), dataset, array, _shader(dataset, array, cfg))


def _shader(dataset: str, array: Array, cfg: CfgNode) -> str:
    """How to color an array, empty if it holds ids."""
    if len(array.shape) == 4:
        count = array.shape[0]
        if dataset == prediction_name("lsds") and count in (6, 10):
            return lsds_shader(count)
        offsets = offsets_of(array)
        names_channels = "offsets" in array.attrs or dataset == prediction_name("affs")
        if names_channels and len(offsets) == count and all(len(offset) == 3 for offset in offsets):
            return affinities_shader(offsets)
        return channels_shader(count)
    whole = array.dtype.kind != "f"
    wide = array.dtype.itemsize > 1
    if dataset != cfg.DATA.RAW and whole and (wide or "labels/" in dataset or "mask" in dataset):
        return ""
    return gray_shader(*_brightness(array))


def _brightness(array: Array) -> tuple[float, float]:
    """What is black and what is white: the 1st and the 99th percentile in the middle of the volume."""
    starts = [max(0, (size - SAMPLED) // 2) for size in array.shape]
    try:
        voxels = read(array, tuple(slice(start, start + SAMPLED) for start in starts)).astype(np.float64)
    except UserError as error:
        print(f"too bright or too dark, perhaps: {error}")
        voxels = np.array([0, 255 if array.dtype.kind != "f" else 1], np.float64)
    voxels = voxels[np.isfinite(voxels)]
    lowest, highest = np.percentile(voxels, (1, 99)) if voxels.size else (0.0, 1.0)
    return (float(lowest), float(highest)) if highest > lowest else (float(lowest) - 1, float(lowest) + 1)


def _name(dataset: str, array: Array, cfg: CfgNode) -> str:
    """Name a layer: segmentations by how they were made, others by their dataset."""
    last = dataset.removeprefix("volumes/").removeprefix("labels/").removeprefix("pred_")
    if dataset == cfg.DATA.RAW:
        return "raw"
    threshold = array.attrs.get("threshold")
    if not SEGMENTATIONS.fullmatch(dataset) or not isinstance(threshold, int | float):
        return NAMES.get(dataset, last)
    how = array.attrs.get("merge_function") or array.attrs.get("method") or ""
    kind = "final segmentation" if "final_" in dataset else "segmentation"
    return " ".join(f"{kind} {how} {threshold:g}".split())


def _rank(layer: Layer, cfg: CfgNode) -> tuple[int, str]:
    """Order of the layers, first those below."""
    if layer.dataset == cfg.DATA.RAW:
        return 0, layer.name
    if SEGMENTATIONS.fullmatch(layer.dataset):
        return 5, layer.name
    if layer.dataset == FRAGMENTS:
        return 4, layer.name
    if layer.dataset.startswith(prediction_name("")):
        return 3, layer.name
    return 1 if layer.kind == "image" else 2, layer.name


def _make_unique(layers: Iterable[Layer]) -> None:
    """Add the dataset to names that several layers have."""
    seen: dict[str, int] = {}
    for layer in layers:
        seen[layer.name] = seen.get(layer.name, 0) + 1
        if seen[layer.name] > 1:
            layer.name = f"{layer.name} ({layer.dataset}, {seen[layer.name]})"


def _require_overlap(layers: Sequence[Layer], cfg: CfgNode) -> None:
    """Check that everything lies where raw is.

    Raises:
        UserError: something does not.
    """
    raws = [in_picometers(layer.array) for layer in layers if layer.dataset == cfg.DATA.RAW]
    for layer in layers if raws else ():
        array = in_picometers(layer.array)
        if raws[0].roi.intersect(array.roi).empty:
            raise UserError(
                f"{layer.dataset} at {region_text(array.roi, array)} nm and {cfg.DATA.RAW} at "
                f"{region_text(raws[0].roi, raws[0])} nm share no voxel: they are of different volumes, or one has a "
                "wrong attribute offset or resolution"
            )


def _best_segmentation(layers: Sequence[Layer], output: Path | None) -> Layer:
    """The segmentation that scored best; without scores, the middle one; without one, the last layer that shows ids."""
    segmentations = [layer for layer in layers if SEGMENTATIONS.fullmatch(layer.dataset)]
    best = best_segmentation(output) if output else None
    for layer in segmentations:
        if layer.dataset == best:
            return layer
    ids = [layer for layer in layers if layer.kind == "segmentation"]
    return segmentations[len(segmentations) // 2] if segmentations else (ids or list(layers[:1]))[-1]
