"""Conversion of HDF5 files in CREMI's layout to zarrs.

A volume is copied slab by slab under a temporary name, so memory stays constant and a zarr of the final name is
complete. Sections are counted in `volumes/raw`. The same region is cut out of the other datasets, because CREMI's
labels cover only part of raw.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from funlib.geometry import Coordinate
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.placement import read_placement
from lsdseg.data_utils.volumes import create_array, list_arrays, open_array, slabs
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk, write_whole_folder

# Begin and end in sections of raw. None: from the first, to the last.
Sections = tuple[int | None, int | None]


class Part(NamedTuple):
    """The part of an HDF5 dataset to copy.

    Attributes:
        dataset: the dataset, ([channel,] z, y, x).
        begin: its first section to copy.
        end: the section after the last one to copy.
        voxel_size: in nm.
        offset: offset of the part in nm.
    """

    dataset: h5py.Dataset
    begin: int
    end: int
    voxel_size: Coordinate
    offset: Coordinate

    @property
    def name(self) -> str:
        """Name of the dataset, in the HDF5 file and in the zarr."""
        return str(self.dataset.name.lstrip("/"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part in voxels, with the channel axis first if there is one."""
        return (*self.dataset.shape[:-3], self.end - self.begin, *self.dataset.shape[-2:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type to write: as in the HDF5 file, but uint64 for signed labels.

        -1 to -3 then become CREMI's ids for unlabeled voxels.
        """
        signed_labels = self.name.startswith("volumes/labels/") and self.dataset.dtype.kind == "i"
        return np.dtype(np.uint64 if signed_labels else self.dataset.dtype)

    @property
    def stored_bytes(self) -> int:
        """Size of the part in the HDF5 file, compressed if it is compressed there."""
        sections = self.dataset.shape[-3]
        return int(self.dataset.id.get_storage_size() * (self.end - self.begin) // sections)

    def read(self, slab: tuple[slice, ...]) -> NDArray[Any]:
        """Read a slab of the part; slices count the voxels of `shape`.

        Raises:
            UserError: the file is damaged there.
        """
        *channels, z, y, x = slab
        try:
            return np.asarray(self.dataset[*channels, slice(z.start + self.begin, z.stop + self.begin), y, x])
        except OSError as error:
            raise UserError(f"{self.name} in {self.dataset.file.filename} cannot be read: {error}") from error


def convert_files(
    sources: Sequence[Path], output: Path, *, sections: str, resolution: Sequence[float] | None, overwrite: bool
) -> None:
    """Convert HDF5 files to zarrs, and print what was written and what was left out.

    Args:
        sources: HDF5 files.
        output: the zarr for a single file, or the folder for the zarrs of several.
        sections: "A:B" for sections A to B - 1 of raw; either number may be missing.
        resolution: as for `hdf_to_zarr`.
        overwrite: replace zarrs that exist.

    Raises:
        UserError: `sections` is not of that form; a zarr exists or two would be the same; or as for `hdf_to_zarr`. All
            files are checked before the first is converted.
    """
    wanted = parse_sections(sections)
    targets = target_paths(sources, output, overwrite)
    for source in sources:
        with open_hdf(source) as file:
            for name in skipped_datasets(file, select_parts(file, wanted, resolution)):
                print(f"{source}: left out {name}: it is not a volume, or outside the sections")
    for source, target in zip(sources, targets, strict=True):
        hdf_to_zarr(source, target, sections=wanted, resolution=resolution)
        for name in list_arrays(target):
            array = open_array(target, name)
            print(f"{target}: {name} {array.dtype} {array.shape}, {tuple(array.offset)} nm")


def hdf_to_zarr(
    source: Path,
    target: Path,
    *,
    sections: Sections = (None, None),
    resolution: Sequence[float] | None = None,
) -> None:
    """Copy every volume of an HDF5 file with its attributes to a zarr, and create the labels mask if it is missing.

    Args:
        source: HDF5 file with `volumes/raw`. Datasets that are not volumes (annotations) are left out.
        target: the zarr. An existing one is replaced once the new one is complete.
        sections: which sections of raw to copy.
        resolution: z, y, x voxel size in nm of datasets without the attribute `resolution`.

    Raises:
        UserError: the file cannot be read; it has no volumes/raw, or not these sections; there is no room on disk.
    """
    with open_hdf(source) as file:
        parts = select_parts(file, sections, resolution)
        voxels = sum(math.prod(part.shape) for part in parts)
        with (
            room_on_disk(target, sum(part.stored_bytes for part in parts)),
            write_whole_folder(target) as zarr,
            tqdm(total=voxels, desc=source.name, unit="voxel", unit_scale=True) as bar,
        ):
            for part in parts:
                array = create_array(
                    zarr,
                    part.name,
                    part.shape,
                    voxel_size=part.voxel_size,
                    offset=part.offset,
                    dtype=part.dtype,
                    attributes=json.loads(json.dumps(dict(part.dataset.attrs), default=_to_json)),
                )
                for slab in slabs(array):
                    data = part.read(slab)
                    array[slab] = data.astype(part.dtype, copy=False)
                    bar.update(data.size)
            names = [part.name for part in parts]
            if LABELS in names and LABELS_MASK not in names:
                create_labels_mask(zarr)


def open_hdf(path: Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises:
        UserError: the file does not exist, is damaged, or is not HDF5.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of an HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is no HDF5 file or damaged ({error}): use another file") from error


def select_parts(file: h5py.File, sections: Sections, resolution: Sequence[float] | None) -> list[Part]:
    """Return the parts of a file that `hdf_to_zarr` copies.

    Raises:
        UserError: the file has no volumes/raw, or not these sections; the placement of a dataset is unknown.
    """
    if not _is_volume(file.get(RAW)):
        raise UserError(f"{file.filename} has no dataset {RAW} with the axes z, y, x: rename yours to that")
    count = file[RAW].shape[-3]
    begin, end = sections[0] or 0, count if sections[1] is None else sections[1]
    if not 0 <= begin < end <= count:
        raise UserError(f"{file.filename} has the sections 0:{count}: choose some of them with --sections")
    raw = _part(file[RAW], 0, count, resolution)
    world_begin, world_end = (raw.offset[0] + section * raw.voxel_size[0] for section in (begin, end))

    volumes: list[h5py.Dataset] = []
    file.visititems(lambda _, item: volumes.append(item) if _is_volume(item) else None)
    parts = []
    for volume in volumes:
        whole = _part(volume, 0, volume.shape[-3], resolution)
        first = max(0, math.ceil((world_begin - whole.offset[0]) / whole.voxel_size[0]))
        last = min(whole.end, math.floor((world_end - whole.offset[0]) / whole.voxel_size[0]))
        if first < last:
            parts.append(_part(volume, first, last, resolution))
    return parts


def skipped_datasets(file: h5py.File, parts: Sequence[Part]) -> list[str]:
    """Return the sorted names of the datasets of a file that are not among the parts."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(set(names) - {part.name for part in parts})


def _is_volume(item: Any) -> bool:
    return isinstance(item, h5py.Dataset) and item.ndim in (3, 4) and item.size > 0 and item.dtype.kind in "buif"


def _part(volume: h5py.Dataset, begin: int, end: int, resolution: Sequence[float] | None) -> Part:
    """Return sections begin to end of a dataset as a part, with their placement."""
    where = f"{volume.name.lstrip('/')} in {volume.file.filename}"
    fallback = (resolution, (0, 0, 0)) if resolution else None
    voxel_size, offset = read_placement(dict(volume.attrs), where, fallback)
    if voxel_size.dims != 3 or offset.dims != 3:
        raise UserError(f"{where}: its attributes resolution and offset need three numbers each, z, y, x")
    return Part(volume, begin, end, voxel_size, offset + Coordinate(begin * voxel_size[0], 0, 0))


def _to_json(value: Any) -> Any:
    """Convert the value of an HDF5 attribute that JSON cannot hold."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def parse_sections(text: str) -> Sections:
    """Return the two numbers of A:B, None for one that is left out.

    Raises:
        UserError: the text is not of that form.
    """
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise UserError(f"--sections {text} is not of the form A:B, as in 0:130")
    begin, end = (int(number) if number else None for number in match.groups())
    return begin, end


def target_paths(sources: Sequence[Path], output: Path, overwrite: bool) -> list[Path]:
    """Return one zarr for each source: the output itself if it ends in .zarr, else NAME.zarr in that folder.

    Raises:
        UserError: two sources would become the same zarr, or a zarr exists and `overwrite` is False.
    """
    if output.suffix == ".zarr":
        targets = [output] * len(sources)
    else:
        targets = [output / f"{source.stem}.zarr" for source in sources]
    if len(set(targets)) < len(targets):
        raise UserError(f"several inputs would become the same zarr in {output}: convert them one by one")
    if existing := [target for target in targets if target.exists() and not overwrite]:
        raise UserError(f"{existing[0]} exists: add --overwrite, or write elsewhere")
    return targets
