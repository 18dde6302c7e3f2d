"""Volumes that are read where they are, in any of the formats, on disk or behind a URL.

Any file or folder of a format stands for a zarr wherever one is only read. So does a file NAME.volume, see
`place_files`.
"""

import atexit
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.config.implementations import resolve
from lsdseg.data_utils.formats import PLACE, Source, Volume, choose_volume, is_volume, open_source
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.place_files import BESIDE, REMOTE, Place, read_place
from lsdseg.data_utils.placement import (
    Placement,
    in_picometers,
    multiscales_of,
    nanometers,
    offset_nm,
    place_array,
    place_like,
    read_placement,
)
from lsdseg.data_utils.stored import ZARR_VERSION
from lsdseg.errors import DamagedError, UserError

OPEN_REMOTE = "lsdseg.data_utils.remote:open_remote"


def is_in_place(path: Path) -> bool:
    """Return whether there is a volume to read in place: not a zarr of ours, but in another format, or of OME."""
    return bool(multiscales_of(path)) if is_zarr(path) else is_volume(path)


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a zarr that the installed zarr library opens."""
    headers = (".zgroup", ".zarray", *(("zarr.json",) if ZARR_VERSION >= 3 else ()))
    return any((path / name).is_file() for name in headers)


def has_other_axes(path: Path) -> bool:
    """Return whether a zarr is a pyramid of OME with axes other than [channel,] z, y, x."""
    try:
        axes = [axis["name"] for multiscale in multiscales_of(path) for axis in multiscale["axes"]]
    except (KeyError, TypeError):  # damaged: whoever reads it says so
        return False
    return "z" in axes and axes not in (["z", "y", "x"], ["c", "z", "y", "x"])


def names_in_place(path: Path, dataset: str = RAW) -> list[str]:
    """Return the names of the volumes that there are where a dataset is.

    Args:
        path: as for `open_in_place`.
        dataset: what is looked for. Behind a URL, little else is found.

    Raises:
        UserError: it cannot be read.
    """
    return sorted(volume.name for volume in _source(read_place(path), dataset)[1].volumes)


def open_in_place(path: Path, dataset: str, fallback: Placement | None, or_set: str) -> Array:
    """Open a volume where it is. It can only be read.

    Args:
        path: a file or folder of any of the formats, or NAME.volume.
        dataset: name of the volume; volumes/raw also stands for the only one.
        fallback: voxel size and offset in nm if neither the volume nor NAME.volume says.
        or_set: key that gives a fallback, for the message.

    Raises:
        UserError: it cannot be read; has several volumes and none is chosen; or has no voxel size.
    """
    all_of_it = read_place(path)
    place = all_of_it.of(dataset)
    files, source = _source(all_of_it, dataset)
    named = all_of_it.name_of(dataset, {volume.name for volume in source.volumes}.__contains__)
    key = f"dataset of {BESIDE[dataset].key}" if dataset in BESIDE else "dataset"
    remedy = f"{'' if dataset in BESIDE else 'with DATA.RAW, or '}as {key} in a file NAME{PLACE}"
    volume = choose_volume(source, dataset, named, place.location, remedy)
    or_set = or_set or f"voxel_size in a file NAME{PLACE}"
    return open_box(volume, place, files, fallback=place.fallback(fallback), or_set=or_set)


def open_box(
    volume: Volume, place: Place, files: ExitStack | None = None, *, fallback: Placement | None, or_set: str
) -> Array:
    """Open the box of a volume that a place says.

    Args:
        volume: the volume.
        place: says which box, and where it lies if the volume does not.
        files: what has to stay open.
        fallback: voxel size and offset in nm if neither the volume nor the place says.
        or_set: see `open_in_place`.

    Raises:
        UserError: the box reaches out of the volume, or there is no voxel size.
    """
    where = f"{volume.name} in {place.location}"
    attributes, given = volume.attributes, place.offset
    if given is None and "offset" not in attributes and {"resolution", "voxel_size"} & attributes.keys():
        given = place.default_offset
    if place.voxel_size is not None:
        attributes = {"resolution": place.voxel_size, "offset": attributes.get("offset", [0, 0, 0])}
    voxel_size, offset = (values[-3:] for values in read_placement(attributes, where, fallback, or_set))
    if given is not None:
        _, offset = read_placement({"resolution": voxel_size, "offset": given}, where)
    box = Box(volume, place, where, files)
    begin = [o + first * size for o, first, size in zip(offset, box.begin[-3:], voxel_size, strict=True)]
    return place_array(box, voxel_size, begin)


def cut(array: Array, other: Array, where: str, to: str) -> Array:
    """Return the part of an array that lies inside another one. It can only be read.

    Args:
        array: (z, y, x).
        other: (z, y, x).
        where: names the array, for messages.
        to: names the other one.

    Raises:
        UserError: they have no voxel in common.
    """
    placed, roi = in_picometers(array), in_picometers(other).roi
    inside = placed.roi.intersect(roi)
    begin = -((placed.offset - inside.begin) // placed.voxel_size)  # rounded up
    shape = (inside.end - placed.offset) // placed.voxel_size - begin
    if inside.empty or min(shape) <= 0:
        raise UserError(
            f"{where} has shape {array.shape} at {offset_nm(array)} nm, which does not overlap {to}, "
            f"{nanometers(other.roi.shape, other)} nm at {offset_nm(other)} nm: correct begin, shape or offset in the "
            f"file NAME{PLACE}"
        )
    volume = Volume(where, array._source_data, {}, lambda: 0, array.chunk_shape)
    box = Box(volume, Place("", begin=begin, shape=shape), where, None)
    return place_like(array, box, array.offset + begin * array.voxel_size)


class Box:
    """A box of a volume, ([channel,] z, y, x), which is read when it is sliced.

    Args:
        volume: the volume.
        place: says which box.
        where: names the volume, for messages.
        files: what has to stay open.

    Raises:
        UserError: the box reaches out of the volume.
    """

    def __init__(self, volume: Volume, place: Place, where: str, files: ExitStack | None) -> None:
        self.volume, self.where, self.files = volume, where, files
        whole = tuple(volume.data.shape)
        before = (0,) * (len(whole) - 3)
        self.begin = (*before, *(place.begin or (0, 0, 0)))
        rest = tuple(size - b for size, b in zip(whole, self.begin, strict=True))
        self.shape = rest[:-3] + tuple(place.shape or rest[-3:])
        if any(b < 0 or not 0 < n <= r for b, n, r in zip(self.begin, self.shape, rest, strict=True)):
            raise UserError(
                f"{where} has {whole} voxels, but the box begins at {self.begin} and has {self.shape}: correct begin "
                f"and shape in the file NAME{PLACE}"
            )
        self.dtype = np.dtype(volume.data.dtype).newbyteorder("=")
        self.ndim = len(self.shape)
        self.chunks = tuple(min(chunk, size) for chunk, size in zip(volume.chunks, self.shape, strict=True))

    def __getitem__(self, where: Any) -> NDArray[Any]:
        """Read what slices, numbers and `...` choose."""
        parts = self._parts(where if isinstance(where, tuple) else (where,))
        slices = tuple(self._slices(parts))
        try:
            values = np.asarray(self.volume.data[slices]).astype(self.dtype, copy=False)
        except UserError:
            raise
        except Exception as error:  # every format's library raises what it likes
            box = ", ".join(f"{s.start}:{s.stop}" for s in slices)
            again = "when it can be reached again, give the same command" if REMOTE.search(self.where) else ""
            raise DamagedError(
                f"{self.where} cannot be read at the voxels {box} ({' '.join(str(error).split())[:150]}): "
                f"{again or 'use another copy'}"
            ) from error
        return values[tuple(slice(None) if isinstance(part, slice) else 0 for part in parts)]

    def _parts(self, where: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return a slice or a number for each axis."""
        missing = (slice(None),) * (self.ndim - sum(part is not Ellipsis for part in where))
        parts = [part for given in where for part in (missing if given is Ellipsis else (given,))]
        return (*parts, *missing)[: self.ndim]

    def _slices(self, parts: tuple[Any, ...]) -> Iterator[slice]:
        """Yield the slices of the volume for those of the box, which are one voxel wide for numbers."""
        for part, first, size in zip(parts, self.begin, self.shape, strict=True):
            along = part if isinstance(part, slice) else slice(part, part + 1 or None)
            start, stop, step = along.indices(size)
            yield slice(first + start, first + max(start, stop), step)


def _source(place: Place, dataset: str) -> tuple[ExitStack, Source]:
    """Open what is where a dataset is, or take what is open already."""
    location = place.of(dataset).location
    if REMOTE.match(location):
        # Raw is looked for, too: if only the dataset is missing, the volume is there.
        names = {dataset, place.of(dataset).dataset, *((place.dataset, RAW) if location == place.location else ())}
        return _opened(location, 0, tuple(sorted(filter(None, names))))
    path = Path(location)
    return _opened(location, path.stat().st_mtime_ns if path.exists() else 0, ())


@lru_cache(maxsize=32)
def _opened(location: str, _changed: int, datasets: tuple[str, ...]) -> tuple[ExitStack, Source]:
    files = ExitStack()
    atexit.register(files.close)  # while the modules that this needs are still there
    source = resolve(OPEN_REMOTE)(location, datasets) if datasets else open_source(Path(location))
    return files, files.enter_context(source)
