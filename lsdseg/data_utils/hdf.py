"""HDF5 files in CREMI's layout, as volumes to convert."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lsdseg.data_utils.convert import Source, Volume
from lsdseg.errors import UserError


@contextmanager
def open_hdf(path: Path) -> Iterator[Source]:
    """Open an HDF5 file for reading; its numeric datasets with three or four axes are volumes.

    Raises:
        UserError: the file is damaged, or is not HDF5.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is no HDF5 file or damaged ({error}): use another file") from error
    with file:
        datasets: list[h5py.Dataset] = []
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        volumes = [_volume(dataset) for dataset in datasets if _is_volume(dataset)]
        yield Source(volumes, [_name(dataset) for dataset in datasets if not _is_volume(dataset)])


def _is_volume(dataset: h5py.Dataset) -> bool:
    return dataset.ndim in (3, 4) and dataset.size > 0 and dataset.dtype.kind in "buif"


def _volume(dataset: h5py.Dataset) -> Volume:
    attributes = json.loads(json.dumps(dict(dataset.attrs), default=_to_json))
    return Volume(_name(dataset), dataset, attributes, int(dataset.id.get_storage_size()))


def _name(dataset: h5py.Dataset) -> str:
    return str(dataset.name.lstrip("/"))


def _to_json(value: Any) -> Any:
    """Convert the value of an HDF5 attribute that JSON cannot hold."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
