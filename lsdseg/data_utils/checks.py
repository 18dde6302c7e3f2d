"""Checks of a volume before hours of work are spent on it.

Everything that the scripts assume about volumes is checked here, headers first and voxels last. A mistake then ends in
one line that names the dataset and the remedy, not in a crash or in a network that never learns.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from funlib.persistence import Array
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.model_types import label_keys
from lsdseg.data_utils.formats import PLACE
from lsdseg.data_utils.gray import LARGEST_RAW
from lsdseg.data_utils.in_place import is_in_place
from lsdseg.data_utils.labels import check_ids, is_labeled, open_labels
from lsdseg.data_utils.place_files import BESIDE
from lsdseg.data_utils.placement import in_picometers, offset_nm, voxel_size_nm
from lsdseg.data_utils.volumes import has_array, name_arrays, open_array, read, slabs, source_defaults
from lsdseg.errors import UserError


def check_raw(path: Path | str, cfg: CfgNode) -> None:
    """Check that a volume can be predicted.

    Raises:
        UserError: raw is missing, is not (z, y, x) of integers or float, has another voxel size than
            MODEL.VOXEL_SIZE, or is float and holds NaN or, without DATA.RAW_WINDOW, values outside 0..1.
    """
    _check_values(_open_raw(path, cfg), f"{cfg.DATA.RAW} in {path}", cfg)


def check_training_volumes(paths: Sequence[Path], cfg: CfgNode) -> None:
    """Check that each volume can be trained on, and that all of them can be trained on together.

    Raises:
        UserError: as for `check_training_volume`, or voxel sizes differ. They can in 2D, where MODEL.VOXEL_SIZE leaves
            z open.
    """
    voxel_sizes = [voxel_size_nm(_open_raw(path, cfg)) for path in paths]
    for path, voxel_size in zip(paths, voxel_sizes, strict=True):
        if voxel_size != voxel_sizes[0]:
            raise UserError(
                f"{cfg.DATA.RAW} in {path} has voxel size {voxel_size} nm, in {paths[0]} {voxel_sizes[0]}: leave one "
                "out, or export both as sections (preprocess_data.py), which have no thickness"
            )
    for path in paths:
        check_training_volume(path, cfg)


def check_training_volume(path: Path | str, cfg: CfgNode) -> None:
    """Check that a volume can be trained on. Masks of the labels may be missing: training creates them.

    Raises:
        UserError: as for `check_raw`; or raw is smaller than MODEL.RAW_SHAPE; or labels that the model type needs are
            missing, are not (z, y, x) of exact ids, do not lie inside raw on the voxels of raw, or label nothing.
    """
    raw = _open_raw(path, cfg)
    needed = cfg.MODEL.RAW_SHAPE
    if any(size < least for size, least in zip(raw.shape[-len(needed) :], needed, strict=True)):
        raise UserError(
            f"{cfg.DATA.RAW} in {path} has shape {raw.shape}, smaller than the network's input "
            f"{tuple(needed)}: lower {_model_section(cfg)}.INPUT_SHAPE{'_2D' * cfg.DATA.DIM_2D} or use a larger volume"
        )
    for dataset, mask in label_datasets(cfg):
        if not has_array(path, dataset):
            raise UserError(
                f"no dataset {dataset} in {path}, but {cfg.TRAIN.MODEL_TYPE} is trained on it; it holds "
                f"{name_arrays(path)}: name the labels in DATA or in a file NAME{PLACE}, or choose another "
                "TRAIN.MODEL_TYPE"
            )
        labels = _open_labels(path, dataset, cfg, raw)
        check_ids(labels)
        _check_mask(path, dataset, mask, cfg, labels)
    _check_values(raw, f"{cfg.DATA.RAW} in {path}", cfg)


def label_datasets(cfg: CfgNode) -> list[tuple[str, str]]:
    """Return the datasets (labels, their mask) that the configured model type is trained on."""
    return [(cfg.DATA[key], cfg.DATA[f"{key}_MASK"]) for key in label_keys(cfg)]


def check_labels(labels: Array, where: str) -> None:
    """Check that an array can hold labels of voxels: ground truth, fragments or segments.

    Args:
        labels: the array.
        where: its name, for the message.

    Raises:
        UserError: it is not (z, y, x) of unsigned integers.
    """
    if labels.dims != 3 or labels.voxel_size.dims != 3:
        raise UserError(f"{where} has shape {labels.shape}: store labels with the axes z, y, x")
    if labels.dtype.kind != "u":
        raise UserError(f"{where} is {labels.dtype}: store labels as unsigned integers, e.g. uint64")


def _open_raw(path: Path | str, cfg: CfgNode) -> Array:
    """Open raw and check its header."""
    where = f"{cfg.DATA.RAW} in {path}"
    raw = open_array(path, cfg.DATA.RAW, **source_defaults(cfg))
    if raw.dims != 3 or raw.voxel_size.dims != 3:
        raise UserError(f"{where} has shape {raw.shape}: store it with the axes z, y, x")
    if raw.dtype.kind != "f" and raw.dtype.itemsize > LARGEST_RAW:
        raise UserError(f"{where} is {raw.dtype}, as labels are: name raw in DATA.RAW, or store it as uint8 or uint16")
    expected = tuple(cfg.MODEL.VOXEL_SIZE)
    if voxel_size_nm(raw)[-len(expected) :] != expected:
        raise UserError(
            f"{where} has voxel size {voxel_size_nm(raw)} nm, the config has {expected}: "
            f"change {_model_section(cfg)}.VOXEL_SIZE{'_2D' * cfg.DATA.DIM_2D} or resample the volume"
        )
    return raw


def _open_labels(path: Path | str, dataset: str, cfg: CfgNode, raw: Array) -> Array:
    """Open labels and check their header."""
    where = f"{dataset} in {path}"
    labels = open_labels(path, dataset, **source_defaults(cfg))
    check_labels(labels, where)
    if voxel_size_nm(labels) != voxel_size_nm(raw):
        raise UserError(
            f"{where} has voxel size {voxel_size_nm(labels)} nm, {cfg.DATA.RAW} has "
            f"{voxel_size_nm(raw)}: correct its {_place_key(path, dataset, 'resolution')}, or resample the labels"
        )
    own, whole = in_picometers(labels), in_picometers(raw)
    if not whole.roi.contains(own.roi):
        raise UserError(
            f"{where} has shape {labels.shape} at {offset_nm(labels)} nm, which is not inside {cfg.DATA.RAW} with "
            f"{raw.shape} at {offset_nm(raw)}: crop the labels, or correct their "
            f"{_place_key(path, dataset, 'offset')}"
        )
    if any((own.offset - whole.offset) % whole.voxel_size):
        raise UserError(
            f"{where} has offset {offset_nm(labels)} nm, which is between the voxels of {cfg.DATA.RAW} at "
            f"{offset_nm(raw)}: correct its {_place_key(path, dataset, 'offset')}"
        )
    return labels


def _check_mask(path: Path | str, dataset: str, mask_dataset: str, cfg: CfgNode, labels: Array) -> None:
    """Check that the mask fits the labels, and that it, or the labels if there is no mask, has at least one voxel."""
    where = f"{mask_dataset} in {path}"
    if not has_array(path, mask_dataset):
        if not any(is_labeled(read(labels, slab)).any() for slab in slabs(labels)):
            raise UserError(f"{dataset} in {path} has no labeled voxel: leave the volume out")
        return
    mask = open_array(path, mask_dataset, **source_defaults(cfg))
    if mask.shape != labels.shape or mask.roi != labels.roi or mask.voxel_size != labels.voxel_size:
        raise UserError(
            f"{where} has shape {mask.shape} at {offset_nm(mask)} nm, but {dataset} has {labels.shape} at "
            f"{offset_nm(labels)}: correct it, or delete it and it is created again"
        )
    if not any(read(mask, slab).any() for slab in slabs(mask)):
        raise UserError(f"{where} is zero everywhere: correct it, or delete it and it is created again")


def _check_values(raw: Array, where: str, cfg: CfgNode) -> None:
    """Check that float raw is within 0..1, or only that it is finite if DATA.RAW_WINDOW says what becomes of it."""
    if raw.dtype.kind != "f":
        return
    least, largest = (-np.inf, np.inf) if cfg.DATA.RAW_WINDOW else (0, 1)
    for slab in tqdm(slabs(raw), desc=f"checking {where}", unit="slab", delay=2, leave=False):
        values = read(raw, slab)
        good = np.isfinite(values) & (values >= least) & (values <= largest)
        if good.all():
            continue
        inside = np.unravel_index(good.argmin(), good.shape)
        voxel = tuple(int(i) + along.start for i, along in zip(inside, slab, strict=True))
        if np.isfinite(values[inside]):
            raise UserError(
                f"{where} is {raw.dtype} and {values[inside]} at voxel {voxel}, outside 0..1: say which "
                "gray values become 0 and 1 (DATA.RAW_WINDOW)"
            )
        raise UserError(f"{where} holds NaN or infinite values, the first at voxel {voxel}: replace them, e.g. by 0")


def _place_key(path: Path | str, dataset: str, attribute: str) -> str:
    """Say where the placement of labels is corrected: in their attributes, or beside a volume that is only read."""
    if not is_in_place(Path(path)):
        return f"attribute {attribute}"
    key = {"resolution": "voxel_size"}.get(attribute, attribute)
    return f"{key}{f' of {BESIDE[dataset].key}' if dataset in BESIDE else ''} in a file NAME{PLACE}"


def _model_section(cfg: CfgNode) -> str:
    return "MODEL_ISO" if cfg.DATA.FIB else "MODEL_ANISO"
