"""Formats of volumes that are read: what a file or folder holds, whatever its format.

A format is a module with one function and an entry in FORMATS or FOLDERS.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from lsdseg.config.implementations import resolve
from lsdseg.errors import UserError

# Suffix of a file -> "module:function", a context manager that takes the file's path and gives a `Source`, or raises
# UserError if the file cannot be used. The first one is for files of any other suffix.
FORMATS = {
    ".hdf": "lsdseg.data_utils.hdf:open_hdf",
    ".hdf5": "lsdseg.data_utils.hdf:open_hdf",
    ".h5": "lsdseg.data_utils.hdf:open_hdf",
    ".tif": "lsdseg.data_utils.tiff:open_tiff",
    ".tiff": "lsdseg.data_utils.tiff:open_tiff",
    ".npy": "lsdseg.data_utils.npy:open_npy",
}
# The same for folders, by a file that they hold: what the format is called, and its function. A folder without any of
# these files may be one of TIFFs.
FOLDERS = {
    "info": ("Neuroglancer precomputed", "lsdseg.data_utils.tensorstores:open_precomputed"),
    "attributes.json": ("N5", "lsdseg.data_utils.tensorstores:open_n5"),
    "zarr.json": ("zarr 3", "lsdseg.data_utils.tensorstores:open_zarr"),
    ".zgroup": ("zarr 2", "lsdseg.data_utils.tensorstores:open_zarr"),
    ".zarray": ("zarr 2", "lsdseg.data_utils.tensorstores:open_zarr"),
}
# Suffix of a text file that says where a volume is, see `in_place`.
PLACE = ".volume"


class Volume(NamedTuple):
    """One volume of a file.

    Attributes:
        name: name of its dataset in the zarr, such as volumes/raw.
        data: the voxels, ([channel,] z, y, x): anything with shape and dtype whose slices are numpy arrays.
        attributes: attributes for the zarr, of types that JSON can hold; `resolution` and `offset` (nm) are among them
            if the file says so.
        stored_bytes: returns the size in the file, compressed if it is compressed there.
        chunks: shape of what is stored in one piece, one number for each axis.
    """

    name: str
    data: Any
    attributes: dict[str, Any]
    stored_bytes: Callable[[], int]
    chunks: tuple[int, ...]


class Source(NamedTuple):
    """What a file holds: its volumes, and the names of datasets that are none."""

    volumes: list[Volume]
    others: list[str]


def total_bytes(files: Iterable[Path]) -> int:
    """Return the size of files; folders among them do not count."""
    return sum(file.stat().st_size for file in files if file.is_file())


def open_source(path: Path) -> AbstractContextManager[Source]:
    """Open a file of any of the FORMATS, by its suffix, or a folder of any of the FOLDERS.

    Raises:
        UserError: it does not exist, is damaged, or is of another format.
    """
    source: AbstractContextManager[Source]
    if path.is_dir():
        formats = formats_of(path)
        if not formats:
            others = ", ".join(f"no {name} of {format_name}" for name, (format_name, _) in FOLDERS.items())
            raise UserError(f"{path} is a folder of none of the formats: it holds no TIFFs, {others}")
        source = resolve(formats[0])(path)
        return source
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a file ({', '.join(FORMATS)})")
    source = resolve(FORMATS.get(path.suffix.lower(), next(iter(FORMATS.values()))))(path)
    return source


def is_volume(path: Path) -> bool:
    """Return whether a file or folder looks like a volume in any of the formats, or says where one is."""
    if path.is_file():
        return path.suffix.lower() in {PLACE, *FORMATS}
    return path.is_dir() and bool(formats_of(path))


def formats_of(folder: Path) -> list[str]:
    """Return the functions that may open a folder, by what it holds: the likeliest one first."""
    if formats := [function for name, (_, function) in FOLDERS.items() if (folder / name).is_file()]:
        return formats
    tiff = FORMATS[".tif"]
    return [tiff] if any(FORMATS.get(file.suffix.lower()) == tiff for file in folder.iterdir()) else []


def choose_volume(source: Source, name: str, dataset: str | None, where: object, remedy: str) -> Volume:
    """Return the volume of a source that is called `dataset`, or `name`, or its only one.

    Raises:
        UserError: there are several, and none is chosen; or none of that name.
    """
    wanted = [volume for volume in source.volumes if volume.name == (dataset or name)]
    found = wanted or ([] if dataset else source.volumes)
    if len(found) != 1:
        raise UserError(
            f"{where} holds {', '.join(volume.name for volume in source.volumes) or 'no volume'}: name the one to take "
            f"{remedy}"
        )
    return found[0]
