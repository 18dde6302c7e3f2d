"""CREMI-layout HDF5 files to the project's zarrs.

A volume is copied block by block under a temporary name beside its final one, so memory stays constant and
what carries the final name is whole. Sections are those of `volumes/raw`; the same region is cut out of the
other datasets, since CREMI's labels cover only a part of raw.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from funlib.geometry import Coordinate
from tqdm import tqdm

from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.placement import voxel_grid
from lsdseg.data_utils.volumes import create_array, slabs
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk, write_whole_folder


class Part(NamedTuple):
    """What is copied of an HDF5 dataset: its sections begin to end (axis z, the third from last)."""

    dataset: h5py.Dataset
    begin: int
    end: int
    voxel_size: Coordinate
    offset: Coordinate

    @property
    def name(self) -> str:
        """Name of the dataset, the same in the zarr."""
        return self.dataset.name.lstrip("/")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in voxels of what is copied, a channel axis first if there is one."""
        return (*self.dataset.shape[:-3], self.end - self.begin, *self.dataset.shape[-2:])

    @property
    def dtype(self) -> np.dtype:
        """As in the HDF5, but uint64 for signed labels: -1 to -3 become CREMI's ids for unlabelled voxels."""
        signed_labels = self.name.startswith("volumes/labels/") and self.dataset.dtype.kind == "i"
        return np.dtype(np.uint64) if signed_labels else self.dataset.dtype

    @property
    def stored_bytes(self) -> int:
        """What it takes in the HDF5, compressed if that is."""
        sections = self.dataset.shape[-3]
        return self.dataset.id.get_storage_size() * (self.end - self.begin) // sections

    def read(self, block: tuple[slice, ...]) -> np.ndarray:
        """Voxels of a block, given in voxels of `shape`."""
        *channels, z, y, x = block
        try:
            return self.dataset[*channels, slice(z.start + self.begin, z.stop + self.begin), y, x]
        except OSError as error:
            raise UserError(f"{self.name} in {self.dataset.file.filename} cannot be read: {error}") from error


def hdf_to_zarr(
    source: Path,
    target: Path,
    *,
    sections: tuple[int | None, int | None] = (None, None),
    resolution: Sequence[float] | None = None,
) -> None:
    """Copy every volume of an HDF5 file, with its attributes, into a zarr; make the labels mask if missing.

    Args:
        source: HDF5 file with `volumes/raw`; datasets that are not volumes (annotations) are left out.
        target: the zarr; one that exists is replaced when the new one is complete.
        sections: begin and end of what to copy, in sections of raw; None: from the first, to the last.
        resolution: z, y, x voxel size in nm of datasets without attribute `resolution`.

    Raises:
        UserError: the file cannot be read, or has no volumes/raw or no such sections; no room on disk.
    """
    with open_hdf(source) as file:
        parts = parts_of(file, sections, resolution)
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
                    attributes=json.loads(json.dumps(dict(part.dataset.attrs), default=_plain)),
                )
                for slab in slabs(array):
                    data = part.read(slab)
                    array[slab] = data.astype(part.dtype, copy=False)
                    bar.update(data.size)
            names = [part.name for part in parts]
            if LABELS in names and LABELS_MASK not in names:
                create_labels_mask(zarr)


def open_hdf(path: Path) -> h5py.File:
    """Open an HDF5 file to read; UserError if it does not exist, is something else, or is damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name an HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is no HDF5 file or damaged ({error}): name another one") from error


def parts_of(
    file: h5py.File, sections: tuple[int | None, int | None], resolution: Sequence[float] | None
) -> list[Part]:
    """What `hdf_to_zarr` copies of a file; raises its UserErrors."""
    if not _is_volume(file.get(RAW)):
        raise UserError(f"{file.filename} has no dataset {RAW} with the axes z, y, x: give yours that name")
    count = file[RAW].shape[-3]
    begin, end = sections[0] or 0, count if sections[1] is None else sections[1]
    if not 0 <= begin < end <= count:
        raise UserError(f"{file.filename} has the sections 0:{count}: choose a part of them with --sections")
    raw = _part(file[RAW], 0, count, resolution)
    world_begin, world_end = (raw.offset[0] + section * raw.voxel_size[0] for section in (begin, end))

    volumes = []
    file.visititems(lambda _, item: volumes.append(item) if _is_volume(item) else None)
    parts = []
    for volume in volumes:
        whole = _part(volume, 0, volume.shape[-3], resolution)
        first = max(0, math.ceil((world_begin - whole.offset[0]) / whole.voxel_size[0]))
        last = min(whole.end, math.floor((world_end - whole.offset[0]) / whole.voxel_size[0]))
        if first < last:
            parts.append(_part(volume, first, last, resolution))
    return parts


def left_out(file: h5py.File, parts: Sequence[Part]) -> list[str]:
    """Names of the datasets of a file that are not among the parts."""
    names = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(set(names) - {part.name for part in parts})


def _is_volume(item) -> bool:
    return isinstance(item, h5py.Dataset) and item.ndim in (3, 4) and item.size > 0 and item.dtype.kind in "buif"


def _part(volume: h5py.Dataset, begin: int, end: int, resolution: Sequence[float] | None) -> Part:
    where = f"{volume.name.lstrip('/')} in {volume.file.filename}"
    fallback = (resolution, (0, 0, 0)) if resolution else None
    voxel_size, offset = voxel_grid(dict(volume.attrs), where, fallback)
    if voxel_size.dims != 3 or offset.dims != 3:
        raise UserError(f"{where}: its attributes resolution and offset need three numbers each, z, y, x")
    return Part(volume, begin, end, voxel_size, offset + Coordinate(begin * voxel_size[0], 0, 0))


def _plain(value):
    """What JSON cannot hold of HDF5 attributes, as what it can."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def parse_sections(text: str) -> tuple[int | None, int | None]:
    """Two numbers from A:B, None for one left out; UserError for anything else."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise UserError(f"--sections {text} is not of the form A:B, as in 0:130")
    return tuple(int(number) if number else None for number in match.groups())


def targets_of(sources: Sequence[Path], output: Path, overwrite: bool) -> list[Path]:
    """One zarr per source: the output itself if it ends in .zarr, else a namesake in that folder.

    Raises UserError if two would be the same or one exists and is not to be overwritten.
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
