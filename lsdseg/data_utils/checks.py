"""What a volume must be before hours of work are spent on it.

Every rule that the scripts rely on is checked here, headers first and voxels last, so that each mistake ends
in one line that names the dataset and the remedy, and not in a crash or a network that never learns.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from funlib.persistence import Array
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.model_types import label_keys
from lsdseg.data_utils.labels import is_labeled
from lsdseg.data_utils.volumes import has_array, list_arrays, open_array, read, slabs, source_defaults
from lsdseg.errors import UserError


def check_raw(path: Path | str, cfg: CfgNode) -> None:
    """Check that a volume can be predicted.

    Raises UserError if raw is missing, not (z, y, x) of uint8 or float, of another voxel size than
    MODEL.VOXEL_SIZE, or as float holds NaN or values outside 0..1.
    """
    _check_values(_checked_raw(path, cfg), f"{cfg.DATA.RAW} in {path}")


def check_training_volumes(paths: Sequence[Path], cfg: CfgNode) -> None:
    """Check that volumes can be trained on together: each by itself, and that their voxels have one size.

    Raises UserError as `check_training_volume`, and if sizes differ: in 2D, MODEL.VOXEL_SIZE leaves z open.
    """
    voxel_sizes = [tuple(_checked_raw(path, cfg).voxel_size) for path in paths]
    for path, voxel_size in zip(paths, voxel_sizes, strict=True):
        if voxel_size != voxel_sizes[0]:
            raise UserError(
                f"{cfg.DATA.RAW} in {path} has voxel size {voxel_size} nm, in {paths[0]} {voxel_sizes[0]}: leave one "
                "out, or export both as sections (preprocess_data.py), which have no thickness"
            )
    for path in paths:
        check_training_volume(path, cfg)


def check_training_volume(path: Path | str, cfg: CfgNode) -> None:
    """Check that a volume can be trained on; labels masks may be missing, they are made then.

    Raises UserError as `check_raw`, and if raw is smaller than MODEL.RAW_SHAPE, if labels that the model type needs are
    missing, not unsigned integers, or not inside raw on the same voxels, or if nothing is labelled.
    """
    raw = _checked_raw(path, cfg)
    needed = cfg.MODEL.RAW_SHAPE
    if any(size < least for size, least in zip(raw.shape[-len(needed) :], needed, strict=True)):
        raise UserError(
            f"{cfg.DATA.RAW} in {path} has shape {raw.shape}, smaller than the network's input "
            f"{tuple(needed)}: lower {_section(cfg)}.INPUT_SHAPE{'_2D' * cfg.DATA.DIM_2D} or use a larger volume"
        )
    for dataset, mask in label_datasets(cfg):
        if not has_array(path, dataset):
            raise UserError(
                f"no dataset {dataset} in {path}, and {cfg.TRAIN.MODEL_TYPE} is trained on it; it holds "
                f"{', '.join(list_arrays(path))}: name the labels in DATA, or choose another TRAIN.MODEL_TYPE"
            )
        labels = _checked_labels(path, dataset, cfg, raw)
        _check_labeled(path, dataset, mask, cfg, labels)
    _check_values(raw, f"{cfg.DATA.RAW} in {path}")


def label_datasets(cfg: CfgNode) -> list[tuple[str, str]]:
    """The datasets (labels, mask of what is labelled) that the configured model type is trained on."""
    return [(cfg.DATA[key], cfg.DATA[f"{key}_MASK"]) for key in label_keys(cfg)]


def _checked_raw(path, cfg) -> Array:
    where = f"{cfg.DATA.RAW} in {path}"
    raw = open_array(path, cfg.DATA.RAW, **source_defaults(cfg))
    if raw.dims != 3 or raw.voxel_size.dims != 3:
        raise UserError(f"{where} has shape {raw.shape}: store it with the axes z, y, x")
    if raw.dtype != np.uint8 and not np.issubdtype(raw.dtype, np.floating):
        raise UserError(f"{where} is {raw.dtype}: store it as uint8, or as float with values in 0..1")
    expected = tuple(cfg.MODEL.VOXEL_SIZE)
    if tuple(raw.voxel_size)[-len(expected) :] != expected:
        raise UserError(
            f"{where} has voxel size {tuple(raw.voxel_size)} nm, the config has {expected}: "
            f"change {_section(cfg)}.VOXEL_SIZE{'_2D' * cfg.DATA.DIM_2D} or resample the volume"
        )
    return raw


def _checked_labels(path, dataset, cfg, raw: Array) -> Array:
    where = f"{dataset} in {path}"
    labels = open_array(path, dataset, **source_defaults(cfg))
    if labels.dtype.kind != "u":
        raise UserError(f"{where} is {labels.dtype}: store labels as unsigned integers, e.g. uint64")
    if labels.voxel_size != raw.voxel_size:
        raise UserError(
            f"{where} has voxel size {tuple(labels.voxel_size)} nm, {cfg.DATA.RAW} has "
            f"{tuple(raw.voxel_size)}: correct its attribute resolution or resample the labels"
        )
    if not raw.roi.contains(labels.roi):
        raise UserError(
            f"{where} has shape {labels.shape} at {tuple(labels.offset)} nm, not inside {cfg.DATA.RAW} with "
            f"{raw.shape} at {tuple(raw.offset)}: crop the labels or correct their attribute offset"
        )
    if any((labels.offset - raw.offset) % raw.voxel_size):
        raise UserError(
            f"{where} has offset {tuple(labels.offset)} nm, between the voxels of {cfg.DATA.RAW} at "
            f"{tuple(raw.offset)}: correct its attribute offset"
        )
    return labels


def _check_labeled(path, dataset, mask_dataset, cfg, labels: Array) -> None:
    """Labels mask: on the labels, with at least one voxel; a missing one would be made from the labels."""
    where = f"{mask_dataset} in {path}"
    if not has_array(path, mask_dataset):
        if not _any(is_labeled(read(labels, slab)) for slab in slabs(labels)):
            raise UserError(f"{dataset} in {path} has no labelled voxel: leave the volume out")
        return
    mask = open_array(path, mask_dataset, **source_defaults(cfg))
    if mask.roi != labels.roi or mask.voxel_size != labels.voxel_size:
        raise UserError(
            f"{where} has shape {mask.shape} at {tuple(mask.offset)} nm, other than {dataset} "
            f"with {labels.shape} at {tuple(labels.offset)}: correct it, or delete it and it is made anew"
        )
    if not _any(read(mask, slab) for slab in slabs(mask)):
        raise UserError(f"{where} is zero everywhere: correct it, or delete it and it is made anew")


def _any(arrays: Iterable[np.ndarray]) -> bool:
    return any(array.any() for array in arrays)


def _check_values(raw: Array, where: str) -> None:
    if raw.dtype == np.uint8:
        return
    for slab in tqdm(slabs(raw), desc=f"checking {where}", unit="slab", delay=2, leave=False):
        values = read(raw, slab)
        good = (values >= 0) & (values <= 1)  # NaN is neither
        if good.all():
            continue
        inside = np.unravel_index(good.argmin(), good.shape)
        voxel = tuple(int(i) + along.start for i, along in zip(inside, slab, strict=True))
        if np.isfinite(values[inside]):
            raise UserError(
                f"{where} is {raw.dtype} and {values[inside]} at voxel {voxel}, outside 0..1: bring it to 0..1 "
                "(8-bit values: divide by 255), or store it as uint8"
            )
        raise UserError(f"{where} holds NaN or infinite values, the first at voxel {voxel}: replace them, e.g. by 0")


def _section(cfg) -> str:
    return "MODEL_ISO" if cfg.DATA.FIB else "MODEL_ANISO"
