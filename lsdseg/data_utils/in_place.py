"""Volumes that are read where they are, in any of the formats, on disk or behind a URL.

Any file or folder of a format stands for a zarr wherever one is only read. So does a small text file NAME.volume, which
holds a location, or in YAML:

    location: https://example.org/em    # or a path, from the folder of this file
    dataset: em/s0                      # which one is raw, if the location holds several
    voxel_size: [8, 8, 8]               # z, y, x in nm, if the volume does not say or is wrong
    offset: [0, 0, 0]                   # in nm
    begin: [100, 0, 0]                  # a box of the volume, in voxels
    shape: [512, 512, 512]
"""

import atexit
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.config.implementations import resolve
from lsdseg.data_utils.formats import PLACE, Source, Volume, choose_volume, is_volume, open_source
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.placement import Placement, multiscales_of, place_array, read_placement
from lsdseg.data_utils.stored import ZARR_VERSION
from lsdseg.errors import DamagedError, UserError
from lsdseg.files import write_whole

REMOTE = re.compile(r"(https?|gs|s3)://")
OPEN_REMOTE = "lsdseg.data_utils.remote:open_remote"
MAX_BYTES = 10_000  # of a file NAME.volume


class Place(NamedTuple):
    """Where a volume is, and what of it is taken; the keys of a file NAME.volume.

    Attributes:
        location: a URL, or a path.
        dataset: which one is raw. None: the only one.
        voxel_size: z, y, x in nm. None: what the volume says.
        offset: z, y, x in nm. None: what the volume says.
        begin: first voxel of a box, z, y, x. None: the first of all.
        shape: voxels of the box. None: up to the end.
    """

    location: str
    dataset: str | None = None
    voxel_size: Sequence[float] | None = None
    offset: Sequence[float] | None = None
    begin: Sequence[int] | None = None
    shape: Sequence[int] | None = None


def is_in_place(path: Path) -> bool:
    """Return whether there is a volume to read in place: not a zarr of ours, but in another format, or of OME."""
    return bool(multiscales_of(path)) if is_zarr(path) else is_volume(path)


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a zarr that the installed zarr library opens."""
    headers = (".zgroup", ".zarray", *(("zarr.json",) if ZARR_VERSION >= 3 else ()))
    return any((path / name).is_file() for name in headers)


def write_place(path: Path, place: Place) -> None:
    """Write a file NAME.volume."""
    given = {key: value for key, value in place._asdict().items() if value is not None}
    with write_whole(path) as partial:
        partial.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")


def place_of(path: Path, dataset: str) -> Place:
    """Return where a volume is, for another file NAME.volume; volumes/raw also stands for its only dataset."""
    place = read_place(path)
    named = place.dataset or (None if dataset == RAW else dataset)
    location = place.location if REMOTE.match(place.location) else str(Path(place.location).absolute())
    return place._replace(location=location, dataset=named)


def read_place(path: Path) -> Place:
    """Return what a file NAME.volume holds; of any other path, the place of that volume.

    Raises:
        UserError: the file is damaged, or has a key or a value that it cannot have.
    """
    if path.suffix.lower() != PLACE:
        return Place(str(path))
    try:
        content = yaml.safe_load(path.read_bytes()[:MAX_BYTES])
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({str(error)[:150]}): write a location in it, or YAML") from error
    place = {"location": content} if isinstance(content, str) else content
    if not isinstance(place, dict) or not isinstance(place.get("location"), str):
        raise UserError(f"{path} names no volume: write its location in it, a path or a URL")
    if unknown := sorted(map(str, set(place) - set(Place._fields))):
        raise UserError(f"{path} has the key {unknown[0]}: use {', '.join(Place._fields)}")
    for key, kinds in {"voxel_size": (int, float), "offset": (int, float), "begin": (int,), "shape": (int,)}.items():
        values: Any = place.get(key, [0, 0, 0])
        if not isinstance(values, list) or len(values) != 3 or any(type(n) not in kinds for n in values):
            raise UserError(f"{path} has {key} {str(values)[:80]}: give three numbers, z, y, x")
    location = place["location"].strip().removeprefix("file://")
    if not REMOTE.match(location):
        location = str(path.parent / Path(location).expanduser())
    return Place(**place | {"location": location})


def names_in_place(path: Path) -> list[str]:
    """Return the names of the volumes that there are at a place.

    Raises:
        UserError: it cannot be read.
    """
    place = read_place(path)
    return sorted(volume.name for volume in _source(place, place.dataset or RAW)[1].volumes)


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
    place = read_place(path)
    files, source = _source(place, dataset)
    named = dataset if dataset in {volume.name for volume in source.volumes} else place.dataset
    remedy = f"with DATA.RAW, or as dataset in a file NAME{PLACE}"
    volume = choose_volume(source, RAW, named or (None if dataset == RAW else dataset), place.location, remedy)
    or_set = or_set or f"voxel_size in a file NAME{PLACE}"
    return open_box(volume, place, files, fallback=fallback, or_set=or_set)


def open_box(
    volume: Volume, place: Place, files: ExitStack | None = None, *, fallback: Placement | None, or_set: str
) -> Array:
    """Open the box of a volume that a place says.

    Args:
        volume: the volume.
        place: says which box, and where it lies if the volume does not.
        files: what has to stay open.
        fallback: see `open_in_place`.
        or_set: see `open_in_place`.

    Raises:
        UserError: the box reaches out of the volume, or there is no voxel size.
    """
    where = f"{volume.name} in {place.location}"
    attributes = volume.attributes
    if place.voxel_size is not None:
        attributes = {"resolution": place.voxel_size, "offset": place.offset or attributes.get("offset", [0, 0, 0])}
    elif place.offset is not None:
        attributes = {**attributes, "offset": place.offset}
    voxel_size, offset = (values[-3:] for values in read_placement(attributes, where, fallback, or_set))
    box = Box(volume, place, where, files)
    begin = [o + first * size for o, first, size in zip(offset, box.begin[-3:], voxel_size, strict=True)]
    return place_array(box, voxel_size, begin)


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
        """Read what slices and `...` choose."""
        slices = tuple(self._slices(where if isinstance(where, tuple) else (where,)))
        try:
            return np.asarray(self.volume.data[slices]).astype(self.dtype, copy=False)
        except Exception as error:  # every format's library raises what it likes
            box = ", ".join(f"{s.start}:{s.stop}" for s in slices)
            again = "when it can be reached again, give the same command" if REMOTE.search(self.where) else ""
            raise DamagedError(
                f"{self.where} cannot be read at the voxels {box} ({' '.join(str(error).split())[:150]}): "
                f"{again or 'use another copy'}"
            ) from error

    def _slices(self, where: tuple[Any, ...]) -> Iterator[slice]:
        missing = (slice(None),) * (self.ndim - sum(part is not Ellipsis for part in where))
        parts = [part for given in where for part in (missing if given is Ellipsis else (given,))]
        for part, first, size in zip((*parts, *missing)[: self.ndim], self.begin, self.shape, strict=True):
            start, stop, step = part.indices(size)
            yield slice(first + start, first + max(start, stop), step)


def _source(place: Place, dataset: str) -> tuple[ExitStack, Source]:
    """Open what is at a place, or take what is open already."""
    if REMOTE.match(place.location):
        return _opened(place.location, 0, tuple(sorted({place.dataset or dataset, dataset})))
    path = Path(place.location)
    return _opened(place.location, path.stat().st_mtime_ns if path.exists() else 0, ())


@lru_cache(maxsize=32)
def _opened(location: str, _changed: int, datasets: tuple[str, ...]) -> tuple[ExitStack, Source]:
    files = ExitStack()
    atexit.register(files.close)  # while the modules that this needs are still there
    source = resolve(OPEN_REMOTE)(location, datasets) if datasets else open_source(Path(location))
    return files, files.enter_context(source)
