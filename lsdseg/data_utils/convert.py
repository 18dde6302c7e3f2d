"""Conversion of volumes in other formats to zarrs.

A volume is copied slab by slab under a temporary name, so memory stays constant and a zarr of the final name is
complete. Sections are counted in `volumes/raw`. The same region is cut out of the other datasets, because CREMI's
labels cover only part of raw.
"""

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.formats import FORMATS, Source, Volume, choose_volume, open_source
from lsdseg.data_utils.labels import as_ids, create_labels_mask
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.placement import offset_nm, read_placement, voxel_size_nm
from lsdseg.data_utils.replace import check_replaceable_zarr, write_zarr
from lsdseg.data_utils.volumes import create_array, list_arrays, open_array, slabs
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk

SLAB_BYTES = 2**27  # of what is copied at a time; some formats need it three times

# Begin and end in sections of raw. None: from the first, to the last.
Sections = tuple[int | None, int | None]


class Part(NamedTuple):
    """The sections of a volume that are copied.

    Attributes:
        volume: the volume.
        begin: its first section to copy.
        end: the section after the last one to copy.
        voxel_size: in nm.
        offset: of the part in nm.
    """

    volume: Volume
    begin: int
    end: int
    voxel_size: Sequence[float]
    offset: Sequence[float]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part in voxels, with the channel axis first if there is one."""
        *channels, _, height, width = self.volume.data.shape
        return (*channels, self.end - self.begin, height, width)

    @property
    def as_ids(self) -> bool:
        """Whether the voxels are labels that are not stored as unsigned integers, see `labels.as_ids`."""
        name, kind = self.volume.name, self.volume.data.dtype.kind
        return name.startswith("volumes/labels/") and (kind == "i" or (kind == "f" and name.endswith("_ids")))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type to write: as in the file, in the byte order of this machine, but uint64 for `as_ids`."""
        return np.dtype(np.uint64 if self.as_ids else self.volume.data.dtype.newbyteorder("="))

    @property
    def stored_bytes(self) -> int:
        """Size of the part in the file."""
        return self.volume.stored_bytes() * (self.end - self.begin) // self.volume.data.shape[-3]

    def read(self, slab: tuple[slice, ...]) -> NDArray[Any]:
        """Read a slab of the part; slices count the voxels of `shape`."""
        *channels, z, y, x = slab
        sections = slice(z.start + self.begin, z.stop + self.begin)
        values = np.asarray(self.volume.data[*channels, sections, y, x])
        return as_ids(values, self.volume.name) if self.as_ids else values.astype(self.dtype, copy=False)


def convert_files(
    sources: Sequence[Path], output: Path, *, sections: str, resolution: Sequence[float] | None, overwrite: bool
) -> None:
    """Convert files to zarrs, and print what was written and what was left out.

    Args:
        sources: files of any of the FORMATS.
        output: the zarr for a single file, or the folder for the zarrs of several.
        sections: "A:B" for sections A to B - 1 of raw; either number may be missing.
        resolution: as for `convert`.
        overwrite: replace zarrs that exist.

    Raises:
        UserError: `sections` is not of that form; a zarr exists or two would be the same; or as for `convert`. All
            files are checked before the first is converted.
    """
    wanted = parse_sections(sections)
    targets = target_paths(sources, output, overwrite)
    for path in sources:
        with open_source(path) as source:
            for name in select_parts(source, path, wanted, resolution)[1]:
                print(f"{path}: left out {name}: it is not a volume, or outside the sections")
    for path, target in zip(sources, targets, strict=True):
        convert(path, target, sections=wanted, resolution=resolution)
        for name in list_arrays(target):
            array = open_array(target, name)
            print(f"{target}: {name} {array.dtype} {array.shape}, {offset_nm(array)} nm")


def convert_folder(folder: Path, output: Path, **options: Any) -> None:
    """Convert every HDF5 file in a folder to a zarr in another one, as `convert_files` does.

    Raises:
        UserError: there is none, or as for `convert_files`.
    """
    suffixes = [suffix for suffix, function in FORMATS.items() if function == FORMATS[".hdf"]]
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{folder} holds no file that ends in {' or '.join(suffixes)}: give the folder with -d")
    convert_files(files, output, **options)


def convert_volume(
    source: Path,
    target: Path,
    *,
    labels: Path | None,
    dataset: str | None,
    sections: str,
    resolution: Sequence[float] | None,
    overwrite: bool,
) -> None:
    """Convert one volume in any format, and perhaps its labels, to a zarr, and print what was written.

    Args:
        source: a file or folder of any of the FORMATS or FOLDERS.
        target: the zarr.
        labels: another one with the neuron labels.
        dataset: name of the dataset in `source` that is raw. None: volumes/raw, or its only one.
        sections: "A:B" for sections A to B - 1 of raw; either number may be missing.
        resolution: as for `convert`.
        overwrite: replace a zarr that exists.

    Raises:
        UserError: the zarr exists; or as for `convert`.
    """
    wanted = parse_sections(sections)
    (checked,) = target_paths([source], target, overwrite)
    with ExitStack() as files:
        volumes = [only_volume(source, RAW, dataset, files)]
        if labels is not None:
            volumes.append(only_volume(labels, LABELS, None, files))
        convert_source(Source(volumes, []), source, checked, wanted, resolution)
    print_arrays(checked)


def print_arrays(zarr: Path) -> None:
    """Print what a zarr holds."""
    for name in list_arrays(zarr):
        array = open_array(zarr, name)
        print(f"{zarr}: {name} {array.dtype} {array.shape}, {voxel_size_nm(array)} nm")


def only_volume(path: Path, name: str, dataset: str | None, files: ExitStack) -> Volume:
    """Open a file until `files` are closed, and return its volume of that dataset, or its only one, under a new name.

    Raises:
        UserError: there are several, and none is chosen; or none of that name.
    """
    chosen = choose_volume(files.enter_context(open_source(path)), name, dataset, path, "with --dataset")
    return chosen._replace(name=name)


def convert(
    path: Path, target: Path, *, sections: Sections = (None, None), resolution: Sequence[float] | None = None
) -> None:
    """Copy every volume of a file with its attributes to a zarr, and create the labels mask if it is missing.

    Args:
        path: a file of one of the FORMATS with `volumes/raw`. Datasets that are not volumes are left out.
        target: the zarr. An existing one that this suite wrote is replaced once the new one is complete.
        sections: which sections of raw to copy.
        resolution: z, y, x voxel size in nm of volumes without the attribute `resolution`.

    Raises:
        UserError: the file cannot be read; it has no volumes/raw, or not these sections; there is no room on disk.
    """
    with open_source(path) as source:
        convert_source(source, path, target, sections, resolution)


def convert_source(
    source: Source, path: Path, target: Path, sections: Sections, resolution: Sequence[float] | None
) -> None:
    """Do what `convert` says with what `open_source` gave; `path` is its name in messages."""
    parts, _ = select_parts(source, path, sections, resolution)
    voxels = sum(math.prod(part.shape) for part in parts)
    with (
        room_on_disk(target, sum(part.stored_bytes for part in parts)),
        write_zarr(target, [path]) as zarr,
        tqdm(total=voxels, desc=path.name, unit="voxel", unit_scale=True) as bar,
    ):
        for part in parts:
            _copy(part, path, zarr, bar)
        names = [part.volume.name for part in parts]
        if LABELS in names and LABELS_MASK not in names:
            create_labels_mask(zarr)


def _copy(part: Part, path: Path, zarr: Path, bar: tqdm) -> None:
    array = create_array(
        zarr,
        part.volume.name,
        part.shape,
        voxel_size=part.voxel_size,
        offset=part.offset,
        dtype=part.dtype,
        attributes=part.volume.attributes,
    )
    for slab in slabs(array, SLAB_BYTES):
        array[slab] = _read(part, slab, path)  # without a name, which would keep it in memory beside the next one
        bar.update(math.prod(along.stop - along.start for along in slab))


def _read(part: Part, slab: tuple[slice, ...], path: Path) -> NDArray[Any]:
    try:
        return part.read(slab)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        reason = str(error)[:200]
        raise UserError(f"{part.volume.name} in {path} cannot be read ({reason}): use another copy") from error


def select_parts(
    source: Source, path: Path, sections: Sections, resolution: Sequence[float] | None
) -> tuple[list[Part], list[str]]:
    """Choose what is copied of a file: the parts, and the sorted names of the datasets that are left out.

    Raises:
        UserError: the file has no volumes/raw, or not these sections; raw or labels have channels; the placement of a
            volume is unknown.
    """
    volumes = {volume.name: volume for volume in source.volumes}
    if RAW not in volumes:
        raise UserError(f"{path} has no dataset {RAW} with the axes z, y, x: rename yours to that")
    for name in {RAW, LABELS} & volumes.keys():
        if len(shape := tuple(volumes[name].data.shape)) != 3:
            raise UserError(f"{name} in {path} has shape {shape}: store one channel of it, with the axes z, y, x")
    count = volumes[RAW].data.shape[-3]
    begin, end = sections[0] or 0, count if sections[1] is None else sections[1]
    if not 0 <= begin < end <= count:
        raise UserError(f"{path} has the sections 0:{count}: choose some of them with --sections")
    raw = _part(volumes[RAW], path, 0, count, resolution)
    world_begin, world_end = (raw.offset[0] + section * raw.voxel_size[0] for section in (begin, end))

    parts, left_out = [], list(source.others)
    for volume in source.volumes:
        whole = _part(volume, path, 0, volume.data.shape[-3], resolution)
        first, last = (round((z - whole.offset[0]) / whole.voxel_size[0], 6) for z in (world_begin, world_end))
        first, last = max(0, math.ceil(first)), min(whole.end, math.floor(last))
        if first < last:
            parts.append(_part(volume, path, first, last, resolution))
        else:
            left_out.append(volume.name)
    return parts, sorted(left_out)


def _part(volume: Volume, path: Path, begin: int, end: int, resolution: Sequence[float] | None) -> Part:
    """Return sections begin to end of a volume as a part, with their placement."""
    where = f"{volume.name} in {path}"
    fallback = (resolution, (0, 0, 0)) if resolution else None
    voxel_size, offset = read_placement(volume.attributes, where, fallback, "--resolution Z Y X")
    if not len(voxel_size) == len(offset) == 3:
        raise UserError(f"{where}: its attributes resolution and offset need three numbers each, z, y, x")
    return Part(volume, begin, end, voxel_size, (offset[0] + begin * voxel_size[0], *offset[1:]))


def parse_sections(text: str) -> Sections:
    """Return the two numbers of A:B, None for one that is left out.

    Raises:
        UserError: the text is not of that form.
    """
    match = re.fullmatch(r"([0-9]{0,9}):([0-9]{0,9})", text)
    if not match:
        raise UserError(f"--sections {text} is not of the form A:B, as in 0:130")
    begin, end = (int(number) if number else None for number in match.groups())
    return begin, end


def target_paths(sources: Sequence[Path], output: Path, overwrite: bool) -> list[Path]:
    """Return one zarr for each source: the output itself if it ends in .zarr, else NAME.zarr in that folder.

    Raises:
        UserError: two sources would become the same zarr; a zarr exists and `overwrite` is False; or as for
            `check_replaceable_zarr`.
    """
    if output.suffix == ".zarr":
        targets = [output] * len(sources)
    else:
        targets = [output / f"{source.stem}.zarr" for source in sources]
    if len(set(targets)) < len(targets):
        raise UserError(f"several inputs would become the same zarr in {output}: convert them one by one")
    if existing := [target for target in targets if target.exists() and not overwrite]:
        raise UserError(f"{existing[0]} exists: add --overwrite, or write elsewhere")
    for target in targets:
        check_replaceable_zarr(target, sources)
    return targets
