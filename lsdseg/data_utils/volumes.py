"""Arrays on disk with a voxel size and an offset.

Only this module opens and creates zarr arrays, because there are three conventions for voxel sizes and two versions of
zarr. New zarrs are in format 2 whichever version is installed, so every viewer and older script can open them. Axis
order is z, y, x. ROIs are in nanometers, or in picometers where those are not whole (see `placement`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import dask
import dask.array
import numpy as np
import zarr
from funlib.geometry import Roi
from funlib.persistence import Array
from numpy.typing import DTypeLike, NDArray
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.data_utils.formats import Volume
from lsdseg.data_utils.in_place import (
    cut,
    has_other_axes,
    is_in_place,
    is_zarr,
    names_in_place,
    open_box,
    open_in_place,
)
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.place_files import BESIDE, REMOTE, Place, is_place, read_place
from lsdseg.data_utils.placement import (
    Placement,
    checked_placement,
    offset_nm,
    place_array,
    read_ome_placement,
    read_placement,
    voxel_size_nm,
)
from lsdseg.data_utils.replace import (
    array_folder,
    check_replaceable_array,
    is_array,
    replace_folder,
    replacing_array,
)
from lsdseg.data_utils.stored import (
    ZARR_VERSION,
    CheckedArray,
    ChecksumZstd,
    count_chunks,
    open_checked,
    read_header,
    read_json,
)
from lsdseg.errors import UserError

# Indexing a funlib Array computes a dask graph. Dask's thread pool hangs in a process that is forked after the pool was
# first used, and gunpowder's PreCache forks.
dask.config.set(scheduler="synchronous")

CHUNKS = "stored_chunks"  # attribute of a complete array: how many chunks it has on disk
# Names of sections in zarrs that the published scripts wrote, where they are not those of volumes.
PUBLISHED_SECTIONS = {LABELS: "volumes/labels", LABELS_MASK: "volumes/labels_mask"}
MISSING = "missing_blocks"  # begin and shape in nm of the blocks of an array that could not be made
MAX_GROUPS = 10_000  # a folder with more is no zarr but half a disk
# Higher levels save a few percent on labels and read several times slower.
COMPRESSOR = ChecksumZstd(level=1)
CODECS_3 = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
]


def open_array(
    path: Path | str,
    dataset: str,
    mode: str = "r",
    *,
    default_voxel_size: Sequence[float] | None = None,
    default_offset: Sequence[float] | None = None,
    default_key: str = "",
) -> Array:
    """Open an existing array of a zarr. `array[slices]` and `array[roi]` give and take numpy arrays.

    Arrays in other formats are opened to read, see `in_place`, and so is what a file NAME.volume names, see
    `place_files`.

    The voxel size comes from the array's attribute `resolution` (CREMI) or `voxel_size` (funlib), together with
    `offset`; otherwise from the OME-NGFF scale in the group above; otherwise from the defaults. At most the last three
    axes are spatial. Axes before them are channels, named `c^`.

    A dataset of sections, DATASET/m ... DATASET/n, opens as one stack (z, y, x) that can only be read. Sections have no
    thickness of their own, so the voxel size in z is that in x. Section 0 is at 0 nm, wherever the stack begins. Labels
    and their mask are also found under the names of the published scripts, volumes/labels/n and volumes/labels_mask/n.

    Args:
        path: the zarr.
        dataset: name of the array in it.
        mode: "r" to read, "r+" to write.
        default_voxel_size: voxel size in nm of an array that does not say.
        default_offset: offset in nm of such an array. None: 0.
        default_key: key that sets the default voxel size, for the message if there is none.

    Raises:
        UserError: there is no such array; its voxel size is unknown; a section in between is missing, or differs from
            the first one.
    """
    defaults = SourceDefaults(
        default_voxel_size=default_voxel_size, default_offset=default_offset, default_key=default_key
    )
    array = _open_whole(path, dataset, mode, **defaults)
    within = read_place(Path(path)).cut_to(dataset) if is_place(Path(path)) and array.dims == 3 else None
    if within:
        return cut(array, open_array(path, within, **defaults), f"{dataset} in {path}", within)
    return array


def _open_whole(
    path: Path | str,
    dataset: str,
    mode: str,
    *,
    default_voxel_size: Sequence[float] | None,
    default_offset: Sequence[float] | None,
    default_key: str,
) -> Array:
    """Open an array that is not cut to another one, as `open_array` does."""
    path, dataset, place = _followed(path, dataset)
    where = f"{dataset} in {path}"
    if sections := _section_names(array_folder(path, dataset)):
        defaults = SourceDefaults(
            default_voxel_size=default_voxel_size, default_offset=default_offset, default_key=default_key
        )
        return _stack({int(name): open_array(path, f"{dataset}/{name}", mode, **defaults) for name in sections}, where)
    given: Placement | None = None
    if default_voxel_size is not None:
        given = default_voxel_size, default_offset or (0,) * len(default_voxel_size)
    if _is_elsewhere(path, dataset):
        return open_in_place(path, dataset, given, default_key)
    source = _open_zarr(path, dataset, mode)
    fallback = read_ome_placement(path / dataset, where)
    if place is not None:
        volume = Volume(dataset, source, dict(source.attrs), lambda: 0, source.chunks)
        return open_box(volume, place, fallback=fallback or place.fallback(given), or_set=default_key)
    fallback = fallback or given
    voxel_size, offset = read_placement(source.attrs, where, fallback, default_key)
    dims = min(len(voxel_size), source.ndim, 3)
    if dims < 2:
        raise UserError(f"{where} has voxel size {tuple(voxel_size)} nm: its attribute resolution needs z, y, x")
    return place_array(source, voxel_size[-dims:], offset[-dims:])


def has_array(path: Path | str, dataset: str) -> bool:
    """Return whether a zarr holds what `open_array` can open: an array or sections of that name.

    What a file NAME.volume names is taken to be there.
    """
    if is_place(Path(path)) and dataset in read_place(Path(path)).beside:
        return True
    there, name, _ = _followed(path, dataset)
    if name != dataset and dataset not in (RAW, *BESIDE):
        return False  # raw, which may have any name
    folder = array_folder(there, name)
    if _is_elsewhere(there, name):
        return name in names_in_place(there, name)
    return is_array(folder) or bool(_section_names(folder))


def create_array(
    path: Path | str,
    dataset: str,
    shape: Sequence[int],
    *,
    voxel_size: Sequence[float],
    offset: Sequence[float],
    dtype: DTypeLike,
    chunk_shape: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Array:
    """Create an array of zeros, compressed with zstd. An array of that name is replaced if this suite wrote it.

    Args:
        path: the zarr. It is created if it does not exist.
        dataset: name of the array in it.
        shape: in voxels, with the channel axis if there is one.
        voxel_size: in nm, spatial axes only.
        offset: in nm, spatial axes only.
        dtype: type of the voxels.
        chunk_shape: in voxels, with the channel axis. None: 64 voxels wide (512 for sections), with all channels.
        attributes: more attributes, anything that JSON can hold.

    Returns:
        The array, open for writing.

    Raises:
        UserError: voxel size or offset are no lengths; something else has that name, or the name without PARTIAL that
            the array will get.
    """
    shape, dims = tuple(map(int, shape)), len(voxel_size)
    where = f"{dataset} in {path}"
    voxel_size, offset = checked_placement(voxel_size, offset, where)
    if chunk_shape is None:
        edge = 64 if dims == 3 else 512
        chunk_shape = (*shape[:-dims], *(min(edge, size) for size in shape[-dims:]))
    dtype = np.dtype(np.dtype(dtype).str)  # numpy has two types of 64 bits that are alike, and zarr 3 knows only one
    copied = {key: value for key, value in (attributes or {}).items() if key != CHUNKS}
    with replacing_array(path, dataset) as new:
        source = zarr.open_array(
            store=str(path),
            path=new,
            mode="w",
            shape=shape,
            chunks=tuple(map(int, chunk_shape)),
            dtype=dtype,
            fill_value=0,
            **_format(Path(path)),
        )
        source.attrs.update({**copied, **_placement_attributes(voxel_size, offset, len(shape) - dims)})
    return open_array(path, dataset, "r+")


def _placement_attributes(voxel_size: Sequence[float], offset: Sequence[float], channels: int) -> dict[str, Any]:
    """Return the attributes that place an array: `resolution` for this project, the others for funlib's open_ds."""
    dims = len(voxel_size)
    return {
        "resolution": list(voxel_size),
        "offset": list(offset),
        "voxel_size": list(voxel_size),
        "axis_names": ["c^"] * channels + ["z", "y", "x"][-dims:],
        "units": ["nm"] * dims,
    }


def write_array(
    path: Path | str,
    dataset: str,
    data: NDArray[Any],
    *,
    voxel_size: Sequence[float],
    offset: Sequence[float],
    attributes: Mapping[str, Any] | None = None,
) -> Array:
    """Store a numpy array as `create_array` does."""
    array = create_array(
        path,
        dataset,
        data.shape,
        voxel_size=voxel_size,
        offset=offset,
        dtype=data.dtype,
        attributes=attributes,
    )
    array[:] = data
    return array


class SourceDefaults(TypedDict, total=False):
    """Arguments of `open_array` for arrays without attributes.

    Attributes:
        default_voxel_size: in nm.
        default_offset: in nm.
        default_key: the key of the voxel size.
    """

    default_voxel_size: Sequence[float] | None
    default_offset: Sequence[float] | None
    default_key: str


def source_defaults(cfg: CfgNode) -> SourceDefaults:
    """Return the arguments of `open_array` for the user's volumes, from the section PREPROCESS of a config."""
    preprocess = cfg.PREPROCESS
    return SourceDefaults(
        default_voxel_size=preprocess.SOURCE_DATA_RESOLUTION,
        default_offset=preprocess.SOURCE_DATA_OFFSET,
        default_key="PREPROCESS.SOURCE_DATA_RESOLUTION",
    )


def chunk_shape(tile_shape: Sequence[int], volume_shape: Sequence[int], largest: int = 96) -> tuple[int, ...]:
    """Return a chunk shape such that no chunk is shared by two tiles.

    Args:
        tile_shape: in voxels.
        volume_shape: in voxels; chunks are not larger.
        largest: width of a chunk in voxels that is not exceeded.

    Returns:
        The largest divisor of the tile along each axis.
    """
    return tuple(
        min(size, max(n for n in range(1, min(tile, largest) + 1) if tile % n == 0))
        for tile, size in zip(tile_shape, volume_shape, strict=True)
    )


def rename_array(path: Path | str, dataset: str, new_name: str, missing: Sequence[Any] = ()) -> None:
    """Rename a complete array within its zarr. An array of the new name is replaced if this suite wrote it.

    Args:
        path: zarr.
        dataset: name of the array.
        new_name: its name from now on.
        missing: see `seal_array`.

    Raises:
        UserError: something else has the new name.
    """
    check_replaceable_array(path, new_name)
    seal_array(path, dataset, missing)
    replace_folder(array_folder(path, dataset), array_folder(path, new_name))


def seal_array(path: Path | str, dataset: str, missing: Sequence[Any] = ()) -> None:
    """Record how many chunks a complete array has. If that is recorded already, check it as `require_whole` does.

    Args:
        path: zarr.
        dataset: name of the array.
        missing: begin and shape in nm of blocks that could not be made, for the attribute MISSING.
    """
    array = _open_zarr(Path(path), dataset, "r+")
    if missing:
        array.attrs[MISSING] = list(missing)
    if CHUNKS in array.attrs:
        require_whole(path, dataset)
    else:
        array.attrs[CHUNKS] = count_chunks(array.header)


def require_whole(path: Path | str, dataset: str) -> None:
    """Check that no chunk of an array was lost after `seal_array`. Other arrays, and missing ones, pass.

    A lost chunk reads as zeros. All chunks are listed, so this is for the process that starts a step, not for workers.

    Raises:
        UserError: chunks are missing.
    """
    if not is_array(array_folder(path, dataset)):
        return
    array = _open_zarr(Path(path), dataset, "r")
    expected = array.attrs.get(CHUNKS)
    if isinstance(expected, int) and (found := count_chunks(array.header)) < expected:
        raise UserError(
            f"{expected - found} of {expected} chunks of {dataset} in {path} are missing: restore them from a copy, or "
            "make it anew (in blocks: with DATA.DROP_DS_MONGOTABLE True)"
        )


def read(array: Array, slices: Any = ...) -> NDArray[Any]:
    """Read voxels straight from zarr: `array[slices]` without the few milliseconds that its dask graph takes."""
    return np.asarray(array._source_data[slices])


def voxels_of(array: Array, roi: Roi) -> tuple[slice, ...]:
    """Return the slices of the voxels in a ROI, along the spatial axes. The ROI must lie inside the array's."""
    begin, shape = (roi.begin - array.offset) / array.voxel_size, roi.shape / array.voxel_size
    return tuple(slice(b, b + s) for b, s in zip(begin, shape, strict=True))


def list_arrays(path: Path | str) -> list[str]:
    """Return the sorted names of the datasets in a zarr or another volume. There are none if it does not exist.

    Links are followed to arrays and groups, but to no plain folders. A group that links reach several times is listed
    once, so links that form a loop end.

    Raises:
        UserError: a folder cannot be read, or there are more folders than a zarr can have groups.
    """
    path = Path(path)
    if is_place(path):
        place, (there, _, _) = read_place(path), _followed(path, RAW)
        return sorted({*(names_in_place(path) if there == path else list_arrays(there)), *place.beside})
    if (not is_zarr(path) or has_other_axes(path)) and is_in_place(path):
        return names_in_place(path)
    names, folders, seen = [], [path], set()
    while folders:
        folder = folders.pop()
        if is_array(folder):
            names.append(folder.relative_to(path).as_posix())
        elif folder.is_dir() and (identity := _identity(folder)) not in seen:
            seen.add(identity)
            if len(seen) > MAX_GROUPS:
                raise UserError(f"{path} holds more than {MAX_GROUPS} folders that are no arrays: name a zarr in it")
            try:
                for child in sorted(folder.iterdir()):
                    if child.is_symlink() and _is_node(child):
                        folders.insert(0, child)  # links come last
                    elif not child.is_symlink() and not child.name.startswith("."):
                        folders.append(child)
            except OSError as error:
                raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
    return sorted(names)


def name_arrays(path: Path | str, most: int = 10) -> str:
    """Return what a zarr holds, for a message: the names of its first datasets."""
    names = list_arrays(path)
    shown = names[:most]
    while len(", ".join(shown)) > 300:
        shown.pop()
    more = [f"{len(names) - len(shown)} more"] * (len(names) > len(shown))
    return ", ".join([*shown, *more]) or "no datasets"


def is_stored(path: Path | str, dataset: str, voxels: Sequence[slice]) -> bool:
    """Return whether any chunk of a box of voxels was ever written. Voxels of other chunks have the fill value.

    Of a volume that is no zarr, nobody knows, so it is.
    """
    path, dataset, place = _followed(path, dataset)
    folder = array_folder(path, dataset)
    if place is not None or _is_elsewhere(path, dataset):
        return True
    if sections := _section_names(folder):
        return any(is_stored(path, f"{dataset}/{name}", voxels[1:]) for name in sections[voxels[0]])
    header = read_header(folder)
    return any(header.chunk_file(index).is_file() for index in header.chunks_of(tuple(voxels)))


class Slabs(Sequence[tuple[slice, ...]]):
    """Slices along all axes that cover an array once, made when they are asked for: see `slabs`."""

    def __init__(self, shape: Sequence[int], step: Sequence[int]):
        self.shape, self.step = tuple(shape), tuple(step)
        self.grid = tuple(-(-size // width) for size, width in zip(self.shape, self.step, strict=True))

    def with_progress(self, description: str, delay: float = 2) -> Iterator[tuple[slice, ...]]:
        """Yield every slab, and show how many voxels are done and their rate, from `delay` seconds on."""
        with tqdm(total=math.prod(self.shape), desc=description, unit="voxel", unit_scale=True, delay=delay) as bar:
            for slab in self:
                yield slab
                bar.update(math.prod(along.stop - along.start for along in slab))

    def __len__(self) -> int:
        """Return the number of slabs."""
        return math.prod(self.grid)

    def __getitem__(self, number: int) -> tuple[slice, ...]:  # type: ignore[override]
        """Return one slab."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        starts = [int(i) * n for i, n in zip(np.unravel_index(number, self.grid), self.step, strict=True)]
        return tuple(slice(a, min(a + n, size)) for a, n, size in zip(starts, self.step, self.shape, strict=True))


def slabs(array: Array, max_bytes: int = 2**28) -> Slabs:
    """Split an array into slabs, to read one at a time.

    Returns:
        Slices along all axes. Together they cover the array once. Each is aligned with the chunks and has at most
        `max_bytes`, but at least one chunk.
    """
    step = list(array.chunk_shape)
    for axis in reversed(range(array.dims)):
        chunks_that_fit = max_bytes // (math.prod(step) * array.dtype.itemsize)
        step[axis] *= min(max(1, chunks_that_fit), math.ceil(array.shape[axis] / step[axis]))
    return Slabs(array.shape, step)


def _followed(path: Path | str, dataset: str) -> tuple[Path, str, Place | None]:
    """Return the zarr and dataset that a file NAME.volume names, and what else it says; any other path as it is."""
    path = Path(path)
    if not is_place(path):
        return path, _stored_name(path, dataset), None
    all_of_it = read_place(path)
    place = all_of_it.of(dataset)
    there = Path(place.location)
    if REMOTE.match(place.location) or not there.is_dir() or is_in_place(there):
        return path, dataset, None
    named = all_of_it.name_of(dataset, lambda name: is_array(array_folder(there, name)))
    says_more = place != Place(place.location, place.dataset)
    return there, _stored_name(there, named or dataset), place if says_more else None


def _is_elsewhere(path: Path, dataset: str) -> bool:
    """Return whether the zarr library does not open a dataset, but others do."""
    folder = array_folder(path, dataset)
    readable = is_array(folder) and (ZARR_VERSION >= 3 or (folder / ".zarray").is_file())
    return (not readable or has_other_axes(path)) and not _section_names(folder) and is_in_place(path)


def _stored_name(path: Path | str, dataset: str) -> str:
    """Return the name that a zarr has for a dataset: that in PUBLISHED_SECTIONS, if only that has sections."""
    published = PUBLISHED_SECTIONS.get(dataset)
    folder = array_folder(path, dataset)
    if published is None or is_array(folder) or _section_names(folder):
        return dataset
    return published if _section_names(array_folder(path, published)) else dataset


def _section_names(folder: Path) -> list[str]:
    """Return the names "m" ... "n" of the sections in a folder, ordered by number. An array has none."""
    if is_array(folder) or not folder.is_dir():
        return []
    return sorted((child.name for child in folder.iterdir() if child.name.isdecimal() and is_array(child)), key=int)


def _stack(sections: dict[int, Array], where: str) -> Array:
    """Stack sections (y, x), number -> section, to one volume (z, y, x)."""
    numbers = range(min(sections), max(sections) + 1)
    first = sections[numbers[0]]
    for number in numbers:
        if number not in sections:
            raise UserError(
                f"{where} has sections {numbers[0]} to {numbers[-1]}, but no section {number}: "
                "add it, or move the sections after it to another zarr"
            )
        section = sections[number]
        alike = (section.roi, section.voxel_size, section.dtype) == (first.roi, first.voxel_size, first.dtype)
        if not alike or len(section.shape) != 2:
            raise UserError(
                f"section {number} of {where} is {section.dtype} of shape {section.shape} at {offset_nm(section)} "
                f"nm, but the first is {first.dtype} of {first.shape} at {offset_nm(first)}: move sections that "
                "differ to another zarr"
            )
    stack = dask.array.stack([sections[number].data for number in numbers])
    height, width = voxel_size_nm(first)
    return place_array(stack, (width, height, width), (numbers[0] * width, *offset_nm(first)))


def _is_node(folder: Path) -> bool:
    """Return whether a folder is an array or a group of a zarr."""
    return any((folder / header).is_file() for header in (".zgroup", ".zarray", "zarr.json"))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _format(path: Path) -> dict[str, Any]:
    """Return the arguments for zarr's format: 2, but 3 in a zarr of format 3, where arrays of format 2 are not seen."""
    if ZARR_VERSION >= 3 and (path / "zarr.json").is_file():
        return {"zarr_format": 3, "codecs": CODECS_3}
    format_2 = {"zarr_format": 2} if ZARR_VERSION >= 3 else {}
    return {"compressor": COMPRESSOR, "dimension_separator": "/", **format_2}


def _open_zarr(path: Path, dataset: str, mode: str) -> CheckedArray:
    """Open a zarr array, or raise UserError if there is none or this version of zarr cannot read it."""
    if not path.is_dir():
        raise UserError(f"{path} does not exist or is not a zarr folder: check the path")
    folder = array_folder(path, dataset)
    if not is_array(folder):
        read_json(folder / "zarr.json")  # a damaged one is the reason
        raise UserError(f"no dataset {dataset} in {path}; it holds {name_arrays(path)}")
    if ZARR_VERSION < 3 and not (folder / ".zarray").is_file():
        raise UserError(
            f"{dataset} in {path} is in zarr format 3, which zarr {zarr.__version__} cannot read: "
            "use Python 3.12 or newer, or store it in format 2"
        )
    return open_checked(path, dataset, mode)
