"""Export of one dataset of a zarr to other formats, for other programs to read.

Voxels are read, converted and written block by block, so memory stays constant. A file or folder gets its final name
when it is complete. One that exists is replaced only with `overwrite`, and only if this suite wrote all of it.

`export_formats` lists the formats.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.config.implementations import resolve
from lsdseg.data_utils.export_formats import FORMATS
from lsdseg.data_utils.labels import renumber
from lsdseg.data_utils.layout import FRAGMENTS, SEGMENTATIONS
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.records import Record, identity
from lsdseg.data_utils.regions import check_region, crop, parse_region
from lsdseg.data_utils.replace import check_apart, write_folder
from lsdseg.data_utils.segment_tables import find_tables
from lsdseg.data_utils.volumes import list_arrays, name_arrays, open_array, read, require_whole
from lsdseg.errors import UserError
from lsdseg.files import cannot_write, room_on_disk, write_whole

STEP = "data_utils/export.py"  # named in what is written, so that it is recognized


class Export(NamedTuple):
    """What is exported.

    Attributes:
        dataset: its name in the zarr.
        array: ([channel,] z, y, x).
        labels: whether it holds ids, not gray values or affinities.
        record: what is written along: what the export was made from.
        mesh: write meshes of the segments, too.
        skeletons: write skeletons of the segments, too.
        segments: folder with the tables of the segments, see `require_tables`. None: there are none.
    """

    dataset: str
    array: Array
    labels: bool
    record: Record
    mesh: bool
    skeletons: bool
    segments: Path | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in voxels, z, y, x."""
        return tuple(map(int, self.array.shape[-3:]))

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of channels, () if there is no channel axis."""
        return tuple(map(int, self.array.shape[:-3]))

    @property
    def voxel_size(self) -> tuple[float, ...]:
        """In nm, z, y, x."""
        return voxel_size_nm(self.array)

    @property
    def offset(self) -> tuple[float, ...]:
        """In nm, z, y, x."""
        return offset_nm(self.array)

    def stored_type(self, held: Sequence[str], title: str) -> np.dtype[Any]:
        """Return the type to write.

        Args:
            held: types that the format holds, small ones first.
            title: name of the format, for the message.

        Returns:
            The first one that holds every value of the array's type; for ids of another type the last unsigned one, and
            `read_as` refuses ids that it does not hold.

        Raises:
            UserError: there is none.
        """
        dtype = np.dtype(np.uint8) if self.array.dtype == bool else self.array.dtype
        types = [np.dtype(name) for name in held]
        fitting = [t for t in types if (t.kind == "f") == (dtype.kind == "f") and np.can_cast(dtype, t, "safe")]
        unsigned = [t for t in types if t.kind == "u"] if self.labels else []
        if not fitting and not unsigned:
            raise UserError(f"{self.dataset} is {dtype}, which {title} cannot hold: export it --to hdf5")
        return fitting[0] if fitting else unsigned[-1]

    def read_as(self, dtype: np.dtype[Any], voxels: tuple[slice, ...]) -> NDArray[Any]:
        """Read some voxels as another type.

        Raises:
            UserError: there are ids among them that the type does not hold.
        """
        values = read(self.array, voxels)
        if dtype.kind == "u" and not np.can_cast(values.dtype, dtype, "safe"):
            least, most = int(values.min()), int(values.max())
            if least < 0 or most > np.iinfo(dtype).max:
                wrong = least if least < 0 else most
                raise UserError(
                    f"{self.dataset} holds the id {wrong}, which is no {dtype} and cannot be written in this format: "
                    "export it with --renumber or --to hdf5"
                )
        return values.astype(dtype, copy=False)


def export_dataset(
    source: Path,
    target: Path,
    *,
    to: str,
    dataset: str | None,
    overwrite: bool,
    mesh: bool = False,
    skeletons: bool = False,
    region: str | None = None,
    renumbered: bool = False,
) -> None:
    """Export one dataset of a zarr, and print what was written.

    Args:
        source: the zarr.
        target: file or folder to write.
        to: name of one of the FORMATS.
        dataset: its name. None: the segmentation, if there is only one.
        overwrite: replace a target that exists.
        mesh: write meshes of the segments, too.
        skeletons: write skeletons of the segments, too.
        region: the part to export, as `parse_region` takes it. None: all.
        renumbered: give the segments the ids 1, 2, 3 ...

    Raises:
        UserError: there is no such dataset, or none is chosen; it has other axes than z, y, x and a channel; the region
            is not in it; the target exists, or was not written by this suite; the format cannot hold the dataset; there
            is no room on disk.
    """
    written_as, name = FORMATS[to], dataset or only_segmentation(source)
    array = _open_volume(source, name)
    _check_options(name, array, to, mesh=mesh, skeletons=skeletons, renumbered=renumbered)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: add --overwrite, or write elsewhere")

    def check() -> None:
        check_apart(target, [source])
        if target.exists() and (target.is_dir() != written_as.folder or not resolve(written_as.is_own)(target)):
            raise UserError(
                f"{target} is not replaced, because it is no {written_as.title} that {STEP} wrote alone: "
                "write elsewhere, or move it away"
            )

    check()
    settings = {"dataset": name, "format": to, "region": region, "renumbered": renumbered}
    labels, record = is_labels(name, array), Record(STEP, {"the dataset": identity(array)}, settings)
    segments = find_tables(source, name) if to == "precomputed" and region is None and not renumbered else None
    array = _part(array, f"{name} in {source}", region, renumbered)
    with ExitStack() as opened:
        opened.enter_context(room_on_disk(target))
        path = opened.enter_context(write_folder(target, check) if written_as.folder else write_whole(target))
        opened.enter_context(_explain_library_errors(target))
        resolve(written_as.write)(Export(name, array, labels, record, mesh, skeletons, segments), path)
    print(f"{target}: {written_as.title} of {name}, {array.shape}, {voxel_size_nm(array)} nm")


def _open_volume(source: Path, name: str) -> Array:
    """Open a dataset, or raise UserError if chunks are missing or it has other axes than z, y, x and a channel."""
    array = open_array(source, name)
    if array.voxel_size.dims != 3 or len(array.shape) > 4:
        raise UserError(f"{name} in {source} has shape {array.shape}: only ([channel,] z, y, x) can be exported")
    require_whole(source, name)
    return array


def _check_options(name: str, array: Array, to: str, *, mesh: bool, skeletons: bool, renumbered: bool) -> None:
    """Raise UserError if an array has no ids to renumber, or no segments to describe in this format."""
    labels = is_labels(name, array)
    if renumbered and not labels:
        raise UserError(f"--renumber is for ids, but {name} is {array.dtype}: leave it out")
    beside = [option for option, wanted in (("--mesh", mesh), ("--skeletons", skeletons)) if wanted]
    if beside and not (labels and to == "precomputed" and len(array.shape) == 3):
        raise UserError(f"{beside[0]} is for a segmentation that is written --to precomputed: leave it out for {name}")


def _part(array: Array, where: str, region: str | None, renumbered: bool) -> Array:
    """Return what is exported of an array, which is called `where`; arguments as for `export_dataset`."""
    if region is not None:
        roi = parse_region(region, array, where)
        check_region(roi, array, where)
        array = crop(array, roi)
    return renumber(array, where) if renumbered else array


@contextmanager
def _explain_library_errors(target: Path) -> Iterator[None]:
    """Turn the body's errors that tensorstore and HDF5 raise where a file cannot be written into a UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        found = re.search(r"(os_error_code='|errno = )(\d+)", str(error))
        if found is None:
            raise
        code = int(found[2])
        raise cannot_write(target, OSError(code, os.strerror(code))) from error


def only_segmentation(source: Path) -> str:
    """Return the name of the segmentation in a zarr; sections of one are one.

    Raises:
        UserError: there is none, or several.
    """
    names = {name.rsplit("/", 1)[0] if name.rsplit("/", 1)[-1].isdecimal() else name for name in list_arrays(source)}
    found = sorted(name for name in names if SEGMENTATIONS.fullmatch(name))
    if len(found) != 1:
        held = ", ".join(found[:10]) or name_arrays(source)
        raise UserError(f"{source} holds {held}: name the one to export with --dataset")
    return found[0]


def is_labels(name: str, array: Array) -> bool:
    """Return whether a dataset holds ids: integers of 32 bits or more, or what is called like labels."""
    if array.dtype.kind not in "ui":
        return False
    named = name == FRAGMENTS or SEGMENTATIONS.fullmatch(name) is not None or name.endswith("_ids")
    return named or array.dtype.itemsize >= 4
