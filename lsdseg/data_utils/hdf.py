"""HDF5 files in CREMI's layout, as volumes to convert."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lsdseg.data_utils.formats import Source, Volume
from lsdseg.data_utils.replace import array_folder
from lsdseg.data_utils.stored import MAX_BYTES
from lsdseg.errors import UserError

# A volume this large of which this share is stored is a mistake, and copying it would not end.
LARGE_BYTES, LEAST_SHARE = 2**36, 0.01


class Voxels:
    """A dataset of a file that reads what is sliced.

    The file is opened for each read anew, so processes that are forked in between do not share it.

    Args:
        dataset: of a file that may be closed later.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.file, self.name = dataset.file.filename, dataset.name
        self.shape, self.dtype = dataset.shape, dataset.dtype

    def __getitem__(self, where: Any) -> NDArray[Any]:
        with h5py.File(self.file, "r") as file:
            return np.asarray(file[self.name][where])


@contextmanager
def open_hdf(path: Path) -> Iterator[Source]:
    """List what an HDF5 file holds; its numeric datasets with three or four axes are volumes.

    Raises:
        UserError: the file is damaged, or is not HDF5; or a volume lies in other files, is hardly stored or has a name
            that a dataset of a zarr cannot have.
    """
    try:
        file = h5py.File(path, "r")
    except Exception as error:
        raise _damaged(path, error) from error
    with file:
        source = _source(file, path)
    yield source


def _source(file: h5py.File, path: Path) -> Source:
    """List what a file holds. Links to other files are not followed."""
    datasets: list[h5py.Dataset] = []
    try:
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        volumes = [dataset for dataset in datasets if _is_volume(dataset)]
        for dataset in volumes:
            _check_volume(dataset, path)
        others = [_name(dataset) for dataset in datasets if not _is_volume(dataset)]
        return Source([_volume(dataset) for dataset in volumes], others)
    except UserError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def _check_volume(dataset: h5py.Dataset, path: Path) -> None:
    """Check that a volume can be copied, and that its voxels lie in this file: another may hold somebody's secrets."""
    name = _name(dataset)
    array_folder(path, name)
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{name} in {path} keeps its voxels in other files: copy them into one file, e.g. with h5py")
    stored = dataset.id.get_storage_size() / dataset.dtype.itemsize
    if dataset.chunks:
        stored = dataset.id.get_num_chunks() * math.prod(dataset.chunks)
    size = dataset.size * dataset.dtype.itemsize
    if size > MAX_BYTES or (size > LARGE_BYTES and stored < LEAST_SHARE * dataset.size):
        raise UserError(
            f"{name} in {path} has shape {dataset.shape}, but only {stored:.3g} of its {dataset.size:.3g} voxels are "
            "stored: copy the part that you need to another file"
        )


def _is_volume(dataset: h5py.Dataset) -> bool:
    numeric = dataset.dtype.kind in "buif" and dataset.dtype.itemsize <= 8
    return dataset.ndim in (3, 4) and dataset.size > 0 and numeric


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is no HDF5 file or damaged ({str(error)[:150]}): use another file")


def _volume(dataset: h5py.Dataset) -> Volume:
    attributes = json.loads(json.dumps(dict(dataset.attrs), default=_to_json))
    stored_bytes = dataset.id.get_storage_size()
    return Volume(_name(dataset), Voxels(dataset), attributes, lambda: stored_bytes, dataset.chunks or dataset.shape)


def _name(dataset: h5py.Dataset) -> str:
    name = dataset.name if isinstance(dataset.name, str) else dataset.name.decode(errors="backslashreplace")
    return str(name.lstrip("/"))


def _to_json(value: Any) -> Any:
    """Convert the value of an HDF5 attribute that JSON cannot hold."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
