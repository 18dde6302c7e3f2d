"""Ground truth from a segmentation that somebody corrected in another program.

The corrected ids are placed on the voxels of the raw volume that was sent out, and get a mask: 1 where they are known
to be right. What comes back holds no more than ids, so the user says which region they cover if the file does not.
"""

import csv
import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.data_utils.convert import only_volume, target_paths
from lsdseg.data_utils.formats import Volume
from lsdseg.data_utils.labels import as_ids, is_labeled
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.placement import (
    Placement,
    checked_placement,
    nanometers,
    offset_nm,
    read_placement,
    voxel_size_nm,
)
from lsdseg.data_utils.preprocess import write_volume
from lsdseg.data_utils.records import Record, identity
from lsdseg.data_utils.regions import FORM, check_region, crop, parse_region, region_between, region_text
from lsdseg.data_utils.replace import array_folder, check_replaceable_array, write_zarr
from lsdseg.data_utils.volumes import create_array, has_array, open_array, rename_array, slabs
from lsdseg.data_utils.webknossos import open_annotation
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, room_on_disk

STEP = "data_utils/import_proofread.py"
STORED = ("zyx", "yxz", "xyz")  # orders in which programs store axes; Seg2Link's .npy is y, x, z


class Corrected(NamedTuple):
    """Corrected ids, and where they lie.

    Attributes:
        name: of the file, for messages.
        read: takes slices from the first voxel on, and gives uint64 ids, and bool: whether they are known.
        shape: in voxels.
        voxel_size: in nm.
        offset: in nm.
    """

    name: str
    read: Callable[[tuple[slice, ...]], tuple[NDArray[np.uint64], NDArray[np.bool_]]]
    shape: Sequence[int]
    voxel_size: Sequence[float]
    offset: Sequence[float]


def import_proofread(
    corrected: Path,
    target: Path,
    *,
    sample: Path,
    raw: str = RAW,
    dataset: str | None = None,
    region: str | None = None,
    before: Path | None = None,
    unknown: Sequence[int] = (),
    only: Path | None = None,
    axes: str | None = None,
    context: Sequence[int] = (0, 0, 0),
    overwrite: bool = False,
) -> None:
    """Make a volume to train on of raw and corrected labels, and print what was written.

    Args:
        corrected: ids in any format that `open_source` takes, or an annotation of webKnossos.
        target: the zarr: raw in the region and around it, labels and their mask in the region.
        sample: the zarr that was proofread.
        raw: its dataset of raw.
        dataset: the dataset of `corrected`, if it holds several.
        region: the part that was corrected, as `parse_region` takes it. None: as the file says, or all of raw.
        before: what was sent out, in any format: where an annotation stores nothing, it did not change. None: there
            nothing is known.
        unknown: ids of voxels that are not known to be right. CREMI's are unknown anyway.
        only: a table with the only ids that are right, see `read_ids`.
        axes: order in which the file stores its axes, one of STORED. None: z, y, x.
        context: voxels of raw to keep around the region along each axis, where there are any.
        overwrite: replace a zarr that exists.

    Raises:
        UserError: a file cannot be read; the region is unknown, or not on voxels of raw; the file holds another number
            of voxels; its numbers are no ids; no voxel is known; the zarr exists; there is no room on disk.
    """
    (checked,) = target_paths([corrected], target, overwrite)
    image = _open_image(sample, raw)
    select = _selection(unknown, only)
    with ExitStack() as files:
        volume = _ordered(_open_volume(files, corrected, dataset), axes, corrected)
        sent = None if before is None else (_open_volume(files, before), before)
        labels, roi = _placed(volume, corrected, sent, region, image, f"{raw} in {sample}")
        margin = Coordinate(context) * image.voxel_size
        kept = crop(image, roi.grow(margin, margin).intersect(image.roi))
        settings = {"region": region_text(roi, image), "unknown": list(map(int, unknown)), "only": only is not None}
        record = Record(STEP, {"raw": identity(image)}, settings)
        with room_on_disk(checked), write_zarr(checked, [sample, corrected, *([before] if before else [])]) as zarr:
            write_volume(zarr, RAW, kept)
            counted = write_labels(zarr, LABELS, LABELS_MASK, labels, select, record)
    print(f"{checked}: {RAW} {kept.dtype} {kept.shape}, {offset_nm(kept)} nm")
    print(f"{checked}: {counted}")


def add_ground_truth(
    corrected: Path,
    target: Path,
    *,
    dataset: str = LABELS,
    resolution: Sequence[float] | None = None,
    offset: Sequence[float] | None = None,
    only: Path | None = None,
    axes: str | None = None,
) -> None:
    """Write corrected labels and their mask to a zarr, beside what it holds, and print what was written.

    Args:
        corrected: ids, as for `import_proofread`.
        target: the zarr. It is created if it does not exist; labels and mask that this suite wrote are replaced.
        dataset: dataset of the labels.
        resolution: z, y, x in nm. None: as raw in the zarr.
        offset: z, y, x in nm. None: as raw in the zarr, 0 if there is none.
        only: as for `import_proofread`.
        axes: as for `import_proofread`. None: y, x, z in a .npy, as Seg2Link stores them.

    Raises:
        UserError: as for `import_proofread`; the zarr has no raw, and there is no resolution; it has, and the labels do
            not lie on its voxels.
    """
    axes = axes or ("yxz" if corrected.suffix.lower() == ".npy" else None)
    for name in (dataset, LABELS_MASK):
        check_replaceable_array(target, name)
    select = _selection((), only)
    placed = open_array(target, RAW) if has_array(target, RAW) else None
    if resolution is None and placed is None:
        raise UserError(f"{target} holds no {RAW} that says where the labels lie: give -res Z,Y,X and -off Z,Y,X")
    as_raw: Placement = (voxel_size_nm(placed), offset_nm(placed)) if placed else ((), (0, 0, 0))
    with ExitStack() as files:
        volume = _ordered(_open_volume(files, corrected), axes, corrected)
        size, begin = checked_placement(resolution or as_raw[0], offset or as_raw[1], f"-res and -off of {corrected}")
        shape = tuple(map(int, volume.data.shape))
        if placed is not None:
            end = [b + n * v for b, n, v in zip(begin, shape, size, strict=True)]
            where = f"{RAW} in {target}"
            check_region(region_between(begin, end, placed, where), placed, where)
        labels = Corrected(str(corrected), _reader(volume, (0, 0, 0), None, str(corrected)), shape, size, begin)
        settings = {"shape": list(shape), "voxel size": list(size), "offset": list(begin)}
        record = Record("data_utils/make_gt_from_seg2link_vols.py", {}, settings)
        with room_on_disk(target):
            counted = write_labels(target, dataset, LABELS_MASK, labels, select, record)
    print(f"{target}: {counted}")


def read_ids(path: Path) -> NDArray[np.uint64]:
    """Read ids from a table: those in columns whose name begins with "ID", or all numbers if there are no such names.

    Args:
        path: text with commas, semicolons or tabs between cells. Lines before the names are skipped, and so are empty
            cells.

    Returns:
        uint64, sorted, each id once.

    Raises:
        UserError: the file cannot be read, a cell is no id, or there are no ids.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(text.replace(";", ",").replace("\t", ",").splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no table of ids ({error}): save it as CSV") from error
    header = next((n for n, row in enumerate(rows) if any(_is_name(cell) for cell in row)), -1)
    columns = [n for n, cell in enumerate(rows[header]) if _is_name(cell)] if header >= 0 else None
    ids = set()
    for number, row in enumerate(rows[header + 1 :], start=header + 2):
        for cell in row if columns is None else [row[n] for n in columns if n < len(row)]:
            # Programs write 12.0 where a column has empty cells.
            match = re.fullmatch(r"([0-9]{1,20})(\.0*)?", cell.strip())
            if match and int(match[1]) < 2**64:
                ids.add(int(match[1]))
            elif cell.strip():
                raise UserError(f"{path}, line {number}: {cell.strip()[:40]!r} is no id: correct or empty that cell")
    if not ids:
        raise UserError(f"{path} holds no ids: name their column ID, or write one in each line")
    return np.array(sorted(ids), np.uint64)


def _is_name(cell: str) -> bool:
    return cell.strip().upper().startswith("ID")


def _selection(unknown: Sequence[int], only: Path | None) -> Callable[[NDArray[np.uint64]], NDArray[np.bool_]]:
    """Return a function that says which ids are right."""
    wrong = np.array(sorted(unknown), np.uint64)
    right = read_ids(only) if only is not None else None

    def known(ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        among = is_labeled(ids) if right is None else np.isin(ids, right)
        return among & ~np.isin(ids, wrong)

    return known


def _open_image(sample: Path, raw: str) -> Array:
    """Open raw, or raise UserError if its axes are not z, y, x."""
    image = open_array(sample, raw)
    if not len(image.shape) == image.voxel_size.dims == 3:
        raise UserError(f"{raw} in {sample} has shape {image.shape}: name a dataset with the axes z, y, x (--raw)")
    return image


def _placed(
    volume: Volume, path: Path, sent: tuple[Volume, Path] | None, region: str | None, image: Array, where: str
) -> tuple[Corrected, Roi]:
    """Find the place of what was corrected on the voxels of `image`, which is called `where`, and its ROI there.

    Args:
        volume: the ids.
        path: their file.
        sent: what was sent out and its file. None: as for `before` of `import_proofread`.
        region: as for `import_proofread`.
        image: raw.
        where: names raw, for messages.
    """
    roi, first = _place(volume, path, region, image, where)
    earlier = None
    if sent is not None:
        _, begin = _place(*sent, region_text(roi, image), image, where)
        earlier = _reader(sent[0], begin, None, str(sent[1]))
    reader, shape = _reader(volume, first, earlier, str(path)), roi.shape / image.voxel_size
    return Corrected(str(path), reader, shape, voxel_size_nm(image), nanometers(roi.begin, image)), roi


def _open_volume(files: ExitStack, path: Path, dataset: str | None = None) -> Volume:
    """Open a volume of a file, or its only one, or its labels, until `files` is closed."""
    if path.suffix.lower() == ".zip":
        return files.enter_context(open_annotation(path))
    return only_volume(path, LABELS, dataset, files)


class _Reordered:
    """An array whose axes are stored in another order than z, y, x.

    Args:
        data: anything with shape and dtype whose slices are numpy arrays.
        axes: the order in which it stores them.
    """

    def __init__(self, data: Any, axes: str) -> None:
        self.data = data
        self.order = [axes.index(axis) for axis in "zyx"]
        self.shape = tuple(data.shape[n] for n in self.order)
        self.dtype = data.dtype

    def __getitem__(self, voxels: tuple[slice, ...]) -> NDArray[Any]:
        stored = tuple(voxels[self.order.index(n)] for n in range(3))
        return np.transpose(self.data[stored], self.order)


def _ordered(volume: Volume, axes: str | None, path: Path) -> Volume:
    """Return a volume of ids with the axes z, y, x.

    Raises:
        UserError: it has others; or it is a cube that numpy stored, so that nothing but `axes` can tell them apart.
    """
    shape = tuple(volume.data.shape)
    if len(shape) != 3:
        raise UserError(f"{path} has shape {shape}: corrected ids need the axes z, y, x")
    if axes is None and path.suffix.lower() == ".npy" and len(set(shape)) == 1:
        raise UserError(
            f"{path} does not say which axis is which: add --axes yxz if Seg2Link wrote it, else --axes zyx"
        )
    if axes in (None, STORED[0]):
        return volume
    if hasattr(volume.data, "stored"):
        raise UserError(f"{path} says which axis is which: omit --axes")
    return volume._replace(data=_Reordered(volume.data, axes))


def _place(volume: Volume, path: Path, region: str | None, image: Array, where: str) -> tuple[Roi, tuple[int, ...]]:
    """Find where a file lies.

    Args:
        volume: what the file holds, (z, y, x).
        path: the file.
        region: where the user says that it lies, or which part of it to take. None: nothing is said.
        image: raw.
        where: names raw, for messages.

    Returns:
        The region of `image` to take, and its first voxel in the file.

    Raises:
        UserError: the file does not say, holds another number of voxels, or has other voxels than raw.
    """
    shape, size = tuple(map(int, volume.data.shape)), image.voxel_size
    own = _own_roi(volume, path, image, where)
    if region is not None:
        roi = parse_region(region, image, where)
    elif own is None and shape != tuple(image.shape):
        raise UserError(f"{path} does not say where it lies in {where}: add --region {FORM}, as it was exported")
    else:
        roi = own or image.roi
    check_region(roi, image, where)
    wanted = tuple(roi.shape / size)
    if own is not None and own.contains(roi) and not any((roi.begin - own.begin) % size):
        return roi, tuple((roi.begin - own.begin) / size)
    if own is not None and any(own.begin):  # programs that know of no offset write 0
        covered, wrong = region_text(own, image), region_text(roi, image)
        raise UserError(f"{path} covers {covered} nm, not region {wrong}: correct or omit --region")
    if shape == wanted:
        return roi, (0, 0, 0)
    turned = [axes for axes in STORED if tuple(shape[axes.index(axis)] for axis in "zyx") == wanted]
    remedy = f"add --axes {turned[0]}" if turned else "give the --region that was exported"
    raise UserError(f"{path} holds {shape} voxels, but region {region_text(roi, image)} has {wanted}: {remedy}")


def _own_roi(volume: Volume, path: Path, image: Array, where: str) -> Roi | None:
    """Return where in `image` a file says that it lies, None if it says nothing of an offset.

    Raises:
        UserError: it has other voxels than raw, or lies between them.
    """
    attributes = volume.attributes
    if "offset" not in attributes or not attributes.keys() & {"resolution", "voxel_size"}:
        return None
    own_size, begin = read_placement(attributes, str(path))
    if own_size != voxel_size_nm(image):
        raise UserError(
            f"{path} has voxels of {own_size} nm, but {where} of {voxel_size_nm(image)}: import the finest level"
        )
    end = [b + n * v for b, n, v in zip(begin, volume.data.shape, own_size, strict=True)]
    return region_between(begin, end, image, where)


def _reader(
    volume: Volume, first: Sequence[int], earlier: Callable[[tuple[slice, ...]], Any] | None, name: str
) -> Callable[[tuple[slice, ...]], tuple[NDArray[np.uint64], NDArray[np.bool_]]]:
    """Return the function that reads ids; see `Corrected`. It counts voxels from `first`.

    Args:
        volume: the ids.
        first: first voxel to read.
        earlier: reads what was there before; it fills voxels that the volume does not store.
        name: of the file, for messages.
    """

    def read_part(voxels: tuple[slice, ...]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        part = tuple(slice(v.start + f, v.stop + f) for v, f in zip(voxels, first, strict=True))
        try:
            values = np.asarray(volume.data[part])
        except Exception as error:
            raise UserError(f"{name} cannot be read ({str(error)[:200]}): use another copy") from error
        ids = as_ids(values, name)
        if not hasattr(volume.data, "stored"):
            return ids, np.ones(ids.shape, bool)
        stored = volume.data.stored(part)
        if earlier is None:
            return ids, stored
        filled, known = earlier(voxels)
        return np.where(stored, ids, filled), stored | known

    return read_part


def write_labels(
    zarr: Path,
    dataset: str,
    mask_dataset: str,
    labels: Corrected,
    select: Callable[[NDArray[np.uint64]], NDArray[np.bool_]],
    record: Record,
) -> str:
    """Write labels and mask, and say what they hold. Voxels that are not known are 0 in both.

    Raises:
        UserError: no voxel is known. Labels and mask of these names are not replaced then.
    """
    names = [f"{name}{PARTIAL}" for name in (dataset, mask_dataset)]
    neurons, count = np.zeros(0, np.uint64), 0
    try:
        ids_array, mask = (
            create_array(
                zarr,
                name,
                labels.shape,
                voxel_size=labels.voxel_size,
                offset=labels.offset,
                dtype=dtype,
                attributes=record.attributes,
            )
            for name, dtype in zip(names, (np.uint64, np.uint8), strict=True)
        )
        for slab in slabs(ids_array).with_progress("labels"):
            ids, known = labels.read(slab)
            known &= select(ids)
            ids = np.where(known, ids, np.uint64(0))
            ids_array[slab], mask[slab] = ids, known.astype(np.uint8)
            neurons, count = np.union1d(neurons, ids), count + int(known.sum())
        if not count:
            raise UserError(f"no voxel of {labels.name} is known to be right: correct --unknown, --only or the region")
        for name in names:
            rename_array(zarr, name, name.removesuffix(PARTIAL))
    finally:
        for name in names:
            shutil.rmtree(array_folder(zarr, name), ignore_errors=True)
    return (
        f"{dataset} uint64 {tuple(labels.shape)}, {tuple(labels.offset)} nm, {np.count_nonzero(neurons)} neurons, "
        f"{count / math.prod(labels.shape):.1%} of the voxels known"
    )
