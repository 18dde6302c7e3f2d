"""N5 and Neuroglancer precomputed volumes on disk, as volumes to convert. tensorstore reads them.

Both store x, y, z; everything here is z, y, x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray

from lsdseg.data_utils.convert import Source, Volume
from lsdseg.data_utils.layout import LABELS, RAW
from lsdseg.errors import UserError
from lsdseg.files import read_json

ANOTHER = "use another copy"


class _Lazy:
    """An array (z, y, x) of tensorstore that reads what is sliced, counted from 0.

    Args:
        store: with the axes x, y, z, and perhaps a channel axis of length 1 behind them.
    """

    def __init__(self, store: Any) -> None:
        if store.rank == 4:
            store = store[..., 0]
        self.store = store.T[tensorstore.d[:].translate_to[0]]
        self.shape = tuple(self.store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, where: tuple[slice, ...]) -> NDArray[Any]:
        values: NDArray[Any] = self.store[where].read().result()
        return values


@contextmanager
def open_precomputed(path: Path) -> Iterator[Source]:
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
    yield Source([_volume(path, name, "neuroglancer_precomputed", attributes)], [])


@contextmanager
def open_n5(path: Path) -> Iterator[Source]:
    """Open an N5 container, or one dataset of it: every dataset with three axes, and of a pyramid the finest level.

    Voxel sizes are those of `pixelResolution` or `resolution`, in nm, offsets those of `offset`; x, y, z.

    Raises:
        UserError: it is damaged, or has no dataset with three axes.
    """
    volumes, others = [], []
    for file in sorted(path.rglob("attributes.json")):
        attributes, name = read_json(file, ANOTHER), str(file.parent.relative_to(path))
        if "dimensions" not in attributes:
            continue
        if len(attributes["dimensions"]) == 3 and not (file.parent.name[1:].isdigit() and file.parent.name != "s0"):
            # A level s0 is what its folder is called.
            name = name.removesuffix("/s0") if name not in (".", "s0") else RAW
            volumes.append(_volume(file.parent, name, "n5", _n5_placement(attributes)))
        else:
            others.append(name)
    if not volumes:
        raise UserError(f"{path} holds no N5 dataset with three axes: give the folder of the container")
    yield Source(volumes, others)


def _n5_placement(attributes: dict[str, Any]) -> dict[str, Any]:
    found = attributes.get("pixelResolution", attributes.get("resolution"))
    if found is None:
        return {}
    units = [found.get("unit", "nm")] * 3 if isinstance(found, dict) else ["nm"] * 3
    sizes = found["dimensions"] if isinstance(found, dict) else found
    return {"resolution": sizes[::-1], "offset": attributes.get("offset", [0, 0, 0])[::-1], "units": units}


def _volume(path: Path, name: str, driver: str, attributes: dict[str, Any]) -> Volume:
    try:
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
        data = _Lazy(tensorstore.open(spec, read=True, open=True).result())
    except Exception as error:  # ValueError or RuntimeError, whatever is wrong
        raise UserError(f"{path} cannot be read ({str(error)[:150]}): {ANOTHER}") from error
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Volume(name, data, attributes, stored)
