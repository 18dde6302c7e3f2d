"""New volumes from those of a data set, as the section PREPROCESS of a config says: sections, or other gray values.

All sources are checked before the first result is written, and they are not changed. A result replaces an existing one
of its name once it is complete.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fastremap
import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.gray import LARGEST_RAW
from lsdseg.data_utils.labels import labels_mask, open_labels
from lsdseg.data_utils.layout import SPLITS, data_folder, volumes_at, volumes_in
from lsdseg.data_utils.placement import in_picometers, offset_nm, voxel_size_nm
from lsdseg.data_utils.regions import region_text
from lsdseg.data_utils.replace import write_zarr
from lsdseg.data_utils.volumes import create_array, list_arrays, open_array, read, slabs, source_defaults
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk

# From the voxels of a slab to those to write, perhaps of another type.
Convert = Callable[[NDArray[Any]], NDArray[Any]]
# Values that occur, sorted, and how often each does.
Counts = tuple[NDArray[Any], NDArray[np.int64]]
SLAB_BYTES = 2**25  # of what is changed at a time, which may need ten times as much memory
MOST_VALUES = 2**24  # different gray values of a volume, so that a table of them fits into memory


def preprocess(cfg: CfgNode, unlabeled: int | None = None) -> None:
    """Do what PREPROCESS.HISTOGRAM_MATCH and PREPROCESS.EXPORT_2D_FROM_3D say.

    Args:
        cfg: the config.
        unlabeled: as for `export_sections`.

    Raises:
        UserError: neither is set; a volume or dataset is missing or cannot be used; there is no room on disk.
    """
    match, export = cfg.PREPROCESS.HISTOGRAM_MATCH, cfg.PREPROCESS.EXPORT_2D_FROM_3D
    if not match and not export:
        raise UserError("nothing to do: set PREPROCESS.EXPORT_2D_FROM_3D True, or PREPROCESS.HISTOGRAM_MATCH")
    if unlabeled is not None and not export:
        raise UserError("--background_value is for exported sections: set PREPROCESS.EXPORT_2D_FROM_3D True")
    if match:
        match_histograms(cfg, *match)
    if export:
        export_sections(cfg, unlabeled)


def export_sections(cfg: CfgNode, unlabeled: int | None = None) -> None:
    """Write every volume of DATA.BRAIN_VOL as sections: data_3d/SPLIT/NAME.zarr becomes data_2d/SPLIT/NAME.zarr.

    DATA.RAW, labels and their masks become 2D datasets DATASET/0 ... DATASET/n with `resolution` and `offset` (y, x) in
    nm. All of them are numbered as the sections of raw. Labels and their masks are 0 in sections that they do not
    cover. Other PREPROCESS.DATASETS_TO_COPY are copied as volumes.

    Args:
        cfg: the config.
        unlabeled: another id of voxels that nobody has labeled, which become 0, also in the mask. None: only CREMI's,
            which are kept.

    Raises:
        UserError: as for `preprocess`; or `unlabeled` is given, and there is a mask that says what is labeled.
    """
    sources = _volumes(cfg, cfg.DATA.BRAIN_VOL)
    copied = _arrays_to_copy(cfg, sources)
    sections = {path: _arrays_with_sections(path, cfg) for _, path in sources}
    for path, arrays in sections.items():
        if unlabeled is not None and (masks := arrays.keys() & set(_labels_and_masks(cfg).values())):
            raise UserError(f"{path} holds {min(masks)}: leave out --background_value, or delete that mask")
    for split, path in sources:
        target = data_folder(_with_data(cfg, DIM_2D=True), split) / f"{path.stem}.zarr"
        raw = sections[path][cfg.DATA.RAW]
        with room_on_disk(target), write_zarr(target, [path]) as zarr:
            ids = partial(_without, unlabeled=unlabeled)
            for name, array in sections[path].items():
                _write_sections(zarr, name, array, raw, ids if name in _labels_and_masks(cfg) else np.asarray)
            for labels, mask in _labels_and_masks(cfg).items():
                if labels in sections[path] and mask not in sections[path]:
                    _write_sections(zarr, mask, sections[path][labels], raw, partial(labels_mask, unlabeled=unlabeled))
            for name in copied[path].keys() - sections[path].keys():
                write_volume(zarr, name, copied[path][name])
        print(f"{target}: {raw.shape[0]} sections of {', '.join(sections[path])}")


def match_histograms(cfg: CfgNode, source: str, target: str) -> None:
    """Write every volume of the data set `source` with the gray values of `target`, as data set SOURCE_matched.

    Raw must be integers. Each volume gets the histogram of all volumes of `target` together, and their type.
    PREPROCESS.DATASETS_TO_COPY are copied along.

    Raises:
        UserError: as for `preprocess`; or the volumes of `target` are of several types.
    """
    sources = _volumes(cfg, source)
    copied = _arrays_to_copy(cfg, sources)
    raw, reference = (
        {path: _open_volume(path, cfg.DATA.RAW, cfg) for _, path in volumes}
        for volumes in (sources, _volumes(cfg, target))
    )
    for path, array in (raw | reference).items():
        check_gray_values(array, f"{cfg.DATA.RAW} in {path}")
    if len(dtypes := {array.dtype for array in reference.values()}) > 1:
        raise UserError(f"volumes of {target} are {' and '.join(sorted(map(str, dtypes)))}: store them as one type")
    wanted = merged_counts([gray_value_counts(array) for array in reference.values()])
    for split, path in sources:
        matched = data_folder(_with_data(cfg, DIM_2D=False, BRAIN_VOL=f"{source}_matched"), split) / f"{path.stem}.zarr"
        convert = matching(gray_value_counts(raw[path]), wanted, *dtypes)
        with room_on_disk(matched), write_zarr(matched, [path]) as zarr:
            write_volume(zarr, cfg.DATA.RAW, raw[path], convert)
            for name in copied[path].keys() - {cfg.DATA.RAW}:
                write_volume(zarr, name, copied[path][name])
        print(f"{matched}: {path.name} with the gray values of {target}")


def check_gray_values(raw: Array, where: str) -> None:
    """Raise UserError if the gray values of a volume cannot be counted: they are no integers, or too wide for raw."""
    if raw.dtype.kind not in "iu" or raw.dtype.itemsize > LARGEST_RAW:
        raise UserError(f"{where} is {raw.dtype}: store it as integers, such as uint8, to match its gray values")


def gray_value_counts(raw: Array) -> Counts:
    """Return the gray values that occur in a volume of integers, and how often.

    Raises:
        UserError: there are more than MOST_VALUES different ones.
    """
    counts: Counts = np.empty(0, raw.dtype), np.empty(0, np.int64)
    for slab in slabs(raw).with_progress("gray values"):
        counts = merged_counts([counts, fastremap.unique(read(raw, slab), return_counts=True)])
        if len(counts[0]) > MOST_VALUES:
            raise UserError(f"raw has more than {MOST_VALUES} different gray values: store it as uint16 to match them")
    return counts


def merged_counts(several: Sequence[Counts]) -> Counts:
    """Return the values that occur in several volumes of one type, and how often in all of them together."""
    values, place = np.unique(np.concatenate([values for values, _ in several]), return_inverse=True)
    total = np.zeros(len(values), np.int64)
    np.add.at(total, place.ravel(), np.concatenate([counts for _, counts in several]).astype(np.int64))
    return values, total


def matching(counts: Counts, wanted: Counts, dtype: np.dtype[Any]) -> Convert:
    """Return a function that maps gray values such that their histogram becomes the wanted one.

    A value is mapped to the value with the same share of values below it. Shares are interpolated between the values
    that occur, as in scikit-image's `match_histograms`.

    Args:
        counts: sorted values of a volume, and how often each occurs. The function takes no other values.
        wanted: the same for the wanted histogram.
        dtype: integer type that the function gives.
    """
    shares, wanted_shares = (np.cumsum(number) / number.sum() for _, number in (counts, wanted))
    table = np.rint(np.interp(shares, wanted_shares, wanted[0])).astype(dtype)
    return lambda values: table[np.searchsorted(counts[0], values)]


def _with_data(cfg: CfgNode, **values: Any) -> CfgNode:
    """Return a copy of the config with other values in DATA."""
    changed = cfg.clone()
    changed.defrost()
    changed.DATA.update(values)
    return changed


def _volumes(cfg: CfgNode, data_set: str) -> list[tuple[str, Path]]:
    """Return (split, path) of the 3D volumes of a data set, or raise UserError if there are none."""
    cfg = _with_data(cfg, DIM_2D=False, BRAIN_VOL=data_set)
    splits = [split for split in SPLITS if volumes_at(data_folder(cfg, split))]
    found = [(split, path) for split in splits or SPLITS for path in volumes_in(cfg, split)]
    named = {(split, path.stem): path for split, path in found}
    for split, path in found:
        if (other := named[split, path.stem]) != path:
            raise UserError(f"{path} and {other.name} would become the same zarr: rename one")
    return found


def _labels_and_masks(cfg: CfgNode) -> dict[str, str]:
    """Return dataset of labels -> dataset of their mask."""
    data = cfg.DATA
    return {data.NEURON_LABELS: data.NEURON_LABELS_MASK, data.MITO_LABELS: data.MITO_LABELS_MASK}


def _open_volume(path: Path, dataset: str, cfg: CfgNode) -> Array:
    """Open a dataset, labels as unsigned integers, or raise UserError if its axes are not z, y, x."""
    opened = open_labels if dataset in _labels_and_masks(cfg) else open_array
    array = opened(path, dataset, **source_defaults(cfg))
    if not len(array.shape) == array.voxel_size.dims == 3:
        raise UserError(f"{dataset} in {path} has shape {array.shape}: store it with the axes z, y, x")
    return array


def _arrays_with_sections(path: Path, cfg: CfgNode) -> dict[str, Array]:
    """Return raw and the labels and masks that exist, or raise UserError if their sections are not sections of raw."""
    raw = _open_volume(path, cfg.DATA.RAW, cfg)
    pairs = _labels_and_masks(cfg)
    names = [name for name in (*pairs, *pairs.values()) if name in list_arrays(path)]
    arrays = {name: _open_volume(path, name, cfg) for name in names}
    for name, array in arrays.items():
        own, whole = in_picometers(array), in_picometers(raw)
        thickness, depth = whole.voxel_size[0], own.offset[0] - whole.offset[0]
        inside = 0 <= depth <= whole.roi.shape[0] - own.roi.shape[0]
        if own.voxel_size[0] != thickness or depth % thickness or not inside:
            raise UserError(
                f"{name} in {path} has other sections than {cfg.DATA.RAW} ({region_text(own.roi, own)} and "
                f"{region_text(whole.roi, whole)} nm): correct its attributes resolution and offset"
            )
    return {cfg.DATA.RAW: raw, **arrays}


def _arrays_to_copy(cfg: CfgNode, sources: list[tuple[str, Path]]) -> dict[Path, dict[str, Array]]:
    """Return the PREPROCESS.DATASETS_TO_COPY of each volume, or raise UserError if no volume has one of them."""
    present = {path: list_arrays(path) for _, path in sources}
    names = cfg.PREPROCESS.DATASETS_TO_COPY or []
    for name in names:
        if not any(name in datasets for datasets in present.values()):
            where = sources[0][1].parents[1]
            raise UserError(f"PREPROCESS.DATASETS_TO_COPY: no volume in {where} has {name}: correct the name")
    return {
        path: {name: open_array(path, name, **source_defaults(cfg)) for name in names if name in datasets}
        for path, datasets in present.items()
    }


def _without(labels: NDArray[Any], unlabeled: int | None) -> NDArray[Any]:
    return labels if unlabeled is None else np.where(labels == unlabeled, np.zeros(1, labels.dtype), labels)


def _write_sections(zarr: Path, name: str, array: Array, raw: Array, convert: Convert = np.asarray) -> None:
    """Write the sections of an array, numbered as in raw, and zeros for sections that it does not have."""
    voxel_size, offset = voxel_size_nm(array)[1:], offset_nm(array)[1:]
    dtype = convert(np.empty(0, array.dtype)).dtype
    sections = [
        create_array(zarr, f"{name}/{z}", array.shape[1:], voxel_size=voxel_size, offset=offset, dtype=dtype)
        for z in range(raw.shape[0])
    ]
    first = (array.offset[0] - raw.offset[0]) // raw.voxel_size[0]
    for slab in slabs(array).with_progress(f"{name} of {zarr.stem}"):
        for z, values in enumerate(convert(read(array, slab)), start=first + slab[0].start):
            sections[z][slab[1:]] = values


def write_volume(zarr: Path, name: str, array: Array, convert: Convert = np.asarray, **attributes: Any) -> None:
    """Copy an array with its attributes and others, each voxel as `convert` says."""
    dtype = convert(np.empty(0, array.dtype)).dtype
    written = create_array(
        zarr,
        name,
        array.shape,
        voxel_size=voxel_size_nm(array),
        offset=offset_nm(array),
        dtype=dtype,
        attributes=dict(array.attrs) | attributes,
    )
    for slab in slabs(array, SLAB_BYTES).with_progress(f"{name} of {zarr.stem}"):
        written[slab] = convert(read(array, slab))
