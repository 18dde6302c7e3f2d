"""Volume annotations that webKnossos downloads as Zarr: a zip that holds a zip for each layer.

A layer's zip holds a zarr of format 3 with the axes channel, x, y, z for each magnification, counted from the origin of
the dataset. It has the chunks that somebody changed, each as a whole. All others are as in the segmentation below it.
"""

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lsdseg.data_utils.formats import Volume
from lsdseg.data_utils.layout import LABELS
from lsdseg.data_utils.placement import NANOMETERS
from lsdseg.data_utils.stored import read_header
from lsdseg.data_utils.tensorstores import LazyStore, on_disk, open_store
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk

PROPERTIES = "datasource-properties.json"
FINEST = ("1", "1-1-1")  # names of the folder of the finest magnification


class Annotated(LazyStore):
    """The voxels of an annotation, and which of them it stores.

    Args:
        folder: the unpacked zarr of the finest magnification.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(open_store(folder, on_disk, "zarr3")[0].T)
        self.header = read_header(folder)
        self.chunks = self.header.chunks[:0:-1]

    def stored(self, voxels: tuple[slice, ...]) -> NDArray[np.bool_]:
        """Return which voxels of a box, z, y, x, lie in chunks that the annotation has."""
        inside = np.zeros([along.stop - along.start for along in voxels], bool)
        for index in self.header.chunks_of((slice(0, 1), *voxels[::-1])):
            if self.header.chunk_file(index).is_file():
                chunk = zip(index[:0:-1], self.chunks, voxels, strict=True)
                inside[tuple(slice(max(0, i * n - v.start), max(0, (i + 1) * n - v.start)) for i, n, v in chunk)] = True
        return inside


@contextmanager
def open_annotation(path: Path) -> Iterator[Volume]:
    """Open the only volume layer of an annotation. It is unpacked to a temporary folder.

    Yields:
        The volume, whose data is `Annotated`.

    Raises:
        UserError: the file is damaged, has no volume layer or several, or was downloaded as WKW.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as outer:
                layers = [name for name in outer.namelist() if name.endswith(".zip")]
                if len(layers) != 1:
                    raise UserError(f"{path} has {len(layers)} volume layers: download an annotation with one")
                with outer.open(layers[0]) as stream, zipfile.ZipFile(stream) as layer:
                    volume = _unpacked(layer, Path(folder), path)
        except UserError:
            raise
        except Exception as error:  # zipfile and zlib raise what they like
            raise UserError(f"{path} is no annotation of webKnossos or damaged ({error}): download it again") from error
        yield volume


def _unpacked(layer: zipfile.ZipFile, folder: Path, path: Path) -> Volume:
    """Unpack the finest magnification of a layer, and return it."""
    names = layer.namelist()
    headers = [name for name in names if name.endswith("/zarr.json") and name.split("/")[-2] in FINEST]
    if len(headers) != 1:
        as_wkw = any(name.endswith(".wkw") for name in names)
        reason = "was downloaded as WKW" if as_wkw else "does not hold the finest magnification"
        raise UserError(f"{path} {reason}: download the annotation with volume data as Zarr")
    inside = headers[0].removesuffix("zarr.json")
    files = [file for file in layer.infolist() if file.filename.startswith(inside) and not file.is_dir()]
    with room_on_disk(folder, sum(file.file_size for file in files)):
        layer.extractall(folder, files)
    data = Annotated(folder / inside)
    if len(data.shape) != 3:
        raise UserError(f"{path} has the shape {data.shape}: download an annotation with the axes x, y, z")
    attributes = {"offset": [0, 0, 0], "resolution": _voxel_size(layer, path)}
    return Volume(LABELS, data, attributes, lambda: path.stat().st_size, data.chunks)


def _voxel_size(layer: zipfile.ZipFile, path: Path) -> list[float]:
    """Return z, y, x in nm. The layer says x, y, z as numbers, or as numbers with a unit."""
    try:
        scale = json.loads(layer.read(PROPERTIES))["scale"]
        numbers, unit = (scale["factor"], scale["unit"]) if isinstance(scale, dict) else (scale, "nanometer")
        return [float(number) * NANOMETERS[unit] for number in numbers[::-1]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{PROPERTIES} in {path} gives no voxel size ({error!r}): download it again") from error
