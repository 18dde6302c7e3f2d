"""N5, Neuroglancer precomputed and zarr volumes. tensorstore reads them.

The first two store x, y, z; everything here is z, y, x.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray

from lsdseg.data_utils.formats import Source, Volume, total_bytes
from lsdseg.data_utils.layout import LABELS, RAW
from lsdseg.data_utils.placement import multiscales_of, read_ome_placement, stored_attributes
from lsdseg.data_utils.reader import reader
from lsdseg.data_utils.replace import is_array
from lsdseg.data_utils.stored import open_checked
from lsdseg.errors import UserError
from lsdseg.files import read_json

ANOTHER = "use another copy"
SECONDS = 300  # to wait for voxels
# A server that does not answer is asked again, for some seconds.
RETRIES = {"max_retries": 3, "initial_delay": "0.5s", "max_delay": "2s"}
CONTEXT = {f"{kind}_request_retries": RETRIES for kind in ("http", "gcs", "s3")}


# The kvstore of tensorstore for a folder.
Store = Callable[[Path], Any]


def on_disk(path: Path) -> dict[str, str]:
    """Return the kvstore of a folder on disk."""
    return {"driver": "file", "path": f"{path.resolve()}/"}  # which refuses a path with ..


class LazyStore:
    """An array of tensorstore that reads what is sliced, counted from 0.

    It may be sliced in a process that was forked later, too, see `reader`.

    Args:
        store: with the axes z, y, x.
    """

    def __init__(self, store: Any) -> None:
        self.store = store[tensorstore.d[:].translate_to[0]]
        self.shape = tuple(self.store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        self.chunks = tuple(store.chunk_layout.read_chunk.shape)
        self.spec, self.process = self.store.spec().to_json(), os.getpid()

    def __getitem__(self, where: tuple[slice, ...]) -> NDArray[Any]:
        if os.getpid() != self.process:
            return reader().read(self.spec, where)
        values: NDArray[Any] = self.store[where].read().result(SECONDS)
        return values


class InOrder:
    """An array of zarr that reads what is sliced along z, y, x.

    Args:
        array: with these axes in any order, and others of length 1.
        axes: which of its axes are z, y, x.
    """

    def __init__(self, array: Any, axes: Sequence[int]) -> None:
        self.array, self.axes, self.dtype = array, axes, array.dtype
        self.shape, self.chunks = (tuple(sizes[axis] for axis in axes) for sizes in (array.shape, array.chunks))

    def __getitem__(self, where: tuple[slice, ...]) -> NDArray[Any]:
        index: list[int | slice] = [0] * self.array.ndim
        for axis, along in zip(self.axes, where, strict=True):
            index[axis] = along
        values: NDArray[Any] = self.array[tuple(index)]
        return values.transpose([sorted(self.axes).index(axis) for axis in self.axes])


@contextmanager
def open_precomputed(path: Path, store: Store = on_disk) -> Iterator[Source]:
    """Open the finest scale of a precomputed volume, plain or sharded.

    Raises:
        UserError: it is damaged, or has several channels.
    """
    info = read_json(path / "info", ANOTHER)
    try:
        scale, channels = info["scales"][0], info["num_channels"]
        sizes, begin = scale["resolution"][::-1], scale.get("voxel_offset", [0] * 3)[::-1]
        offset = [first * size for first, size in zip(begin, sizes, strict=True)]
        attributes = {"resolution": [float(size) for size in sizes], "offset": offset}
        name = LABELS if info["type"] == "segmentation" else RAW
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path / 'info'} describes no precomputed volume ({error}): use another folder") from None
    if channels != 1:
        raise UserError(f"{path} has {channels} channels: convert it to gray values first")
    array = open_store(path, store, "neuroglancer_precomputed")
    yield Source([_volume(path, name, LazyStore(array[..., 0].T), attributes)], [])


@contextmanager
def open_n5(path: Path, store: Store = on_disk) -> Iterator[Source]:
    """Open an N5 container, or one dataset of it: every dataset with three axes, and of a pyramid the finest level.

    Voxel sizes are those of `pixelResolution` or `resolution`, in nm, offsets those of `offset`; x, y, z.

    Raises:
        UserError: it is damaged, or has no dataset with three axes.
    """
    volumes, others = [], []
    for folder in _folders(path, lambda folder: "dimensions" in _n5_attributes(folder)):
        attributes, name = _n5_attributes(folder), str(folder.relative_to(path))
        if len(attributes["dimensions"]) == 3 and not (folder.name[1:].isdigit() and folder.name != "s0"):
            # A level s0 is what its folder is called.
            name = name.removesuffix("/s0") if name not in (".", "s0") else RAW
            data = LazyStore(open_store(folder, store, "n5").T)
            volumes.append(_volume(folder, name, data, _n5_placement(attributes)))
        else:
            others.append(name)
    if not volumes:
        raise UserError(f"{path} holds no N5 dataset with three axes: give the folder of the container")
    yield Source(volumes, others)


def _n5_attributes(folder: Path) -> dict[str, Any]:
    file = folder / "attributes.json"
    return read_json(file, ANOTHER) if file.is_file() else {}


def _n5_placement(attributes: dict[str, Any]) -> dict[str, Any]:
    found = attributes.get("pixelResolution", attributes.get("resolution"))
    if found is None:
        return {}
    units = [found.get("unit", "nm")] * 3 if isinstance(found, dict) else ["nm"] * 3
    sizes = found["dimensions"] if isinstance(found, dict) else found
    offset = {"offset": attributes["offset"][::-1]} if "offset" in attributes else {}
    return {"resolution": sizes[::-1], "units": units, **offset}


@contextmanager
def open_zarr(path: Path, store: Store = on_disk) -> Iterator[Source]:
    """Open a zarr of format 2 or 3: every array with the axes z, y, x, and of an OME-Zarr pyramid the finest level.

    Axes of length 1 may lie before them, such as time and channel.

    Raises:
        UserError: it is damaged, has no such array, or several channels or points in time.
    """
    volumes, others = [], []
    for folder in _folders(path, is_array):
        name, where = str(folder.relative_to(path)), f"{folder.relative_to(path)} in {path}"
        finest, axes = _pyramid(folder.parent)
        if finest not in (None, folder.name):
            continue
        is_format_2 = (folder / ".zarray").is_file()
        array = _open_zarr_2(folder, store) if is_format_2 else open_store(folder, store, "zarr3")
        if len(array.shape) < 3:
            others.append(name)
            continue
        if finest is not None:
            name = str(folder.parent.relative_to(path))
        axes = axes or ["?"] * (len(array.shape) - 3) + ["z", "y", "x"]
        data, attributes = _spatial(array, axes, where), _zarr_placement(folder, axes, where)
        volumes.append(_volume(folder, RAW if name == "." else name, data, attributes))
    if not volumes:
        raise UserError(f"{path} holds no zarr array with the axes z, y, x: give the folder that ends in .zarr")
    yield Source(volumes, others)


def _pyramid(group: Path) -> tuple[str | None, list[str]]:
    """Return the name of the finest level of an OME-Zarr pyramid and the names of its axes; None if it is none."""
    multiscales = multiscales_of(group)
    if not multiscales:
        return None, []
    try:
        return multiscales[0]["datasets"][0]["path"], [axis["name"] for axis in multiscales[0]["axes"]]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"the multiscales of {group} are damaged ({error!r}): correct or remove them") from None


def _zarr_placement(folder: Path, axes: list[str], where: str) -> dict[str, Any]:
    """Return the attributes of an array, or its place in a pyramid as such."""
    placement = read_ome_placement(folder, where)
    if placement is None:
        return stored_attributes(folder)
    stored = [name for name in axes if name in "zyx"]
    voxel_size, offset = ([values[stored.index(name)] for name in "zyx"] for values in placement)
    return {"resolution": voxel_size, "offset": offset}


def _spatial(array: Any, axes: list[str], where: str) -> LazyStore | InOrder:
    """Return the voxels of an array of tensorstore or zarr along z, y, x.

    Raises:
        UserError: these are not among its axes, or another one is longer than 1.
    """
    shape = tuple(array.shape)
    if len(axes) != len(shape) or not {"z", "y", "x"} <= set(axes):
        raise UserError(f"{where} has the axes {', '.join(axes)} and shape {shape}: z, y and x are needed")
    if long := [f"{n} along {name}" for name, n in zip(axes, shape, strict=True) if name not in "zyx" and n > 1]:
        raise UserError(f"{where} has {' and '.join(long)}: write a copy with one image of each voxel")
    if not isinstance(array, tensorstore.TensorStore):
        return InOrder(array, [axes.index(name) for name in "zyx"])
    single = [number for number, name in enumerate(axes) if name not in "zyx"]
    left = [name for name in axes if name in "zyx"]
    return LazyStore(array[tensorstore.d[single][0]][tensorstore.d[[left.index(name) for name in "zyx"]].transpose[:]])


def _open_zarr_2(folder: Path, store: Store) -> Any:
    """Open an array of format 2. zarr itself reads those of zstd with checksums, a setting that tensorstore refuses."""
    compressor = read_json(folder / ".zarray", ANOTHER).get("compressor")
    if store is on_disk and isinstance(compressor, dict) and "checksum" in compressor:
        return open_checked(folder.parent, folder.name, "r")
    return open_store(folder, store, "zarr")


def open_store(path: Path, store: Store, driver: str) -> Any:
    """Open an array with tensorstore.

    Args:
        path: folder with what describes it.
        store: says where its voxels are.
        driver: of its format.

    Raises:
        UserError: it is damaged, or compressed in a way that tensorstore does not know.
    """
    try:
        return open_spec({"driver": driver, "kvstore": store(path)})
    except Exception as error:  # ValueError or RuntimeError, whatever is wrong; its last words say what
        reason = str(error).partition(" [tensorstore_spec")[0][-150:]
        raise UserError(f"{path} cannot be read ({reason}): {ANOTHER}") from error


def open_spec(spec: dict[str, Any]) -> Any:
    """Open what a spec of tensorstore describes."""
    return tensorstore.open(spec, read=True, open=True, context=tensorstore.Context(CONTEXT)).result(SECONDS)


def _folders(path: Path, is_array: Callable[[Path], bool]) -> list[Path]:
    """Return the sorted folders of arrays. What is in them, which may be millions of chunks, is not looked at."""
    found = []
    for name, below, _ in os.walk(path):
        if is_array(Path(name)):
            found.append(Path(name))
            below.clear()
    return sorted(found)


def _volume(path: Path, name: str, data: LazyStore | InOrder, attributes: dict[str, Any]) -> Volume:
    return Volume(name, data, attributes, lambda: total_bytes(path.rglob("*")), data.chunks)
