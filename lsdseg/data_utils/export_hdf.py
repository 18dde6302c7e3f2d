"""Export to HDF5 in CREMI's layout: volumes/raw or volumes/labels/neuron_ids, with resolution and offset in nm."""

import io
import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from lsdseg.data_utils.export import STEP, Export
from lsdseg.data_utils.layout import LABELS, SEGMENTATIONS
from lsdseg.data_utils.pyramid import EDGE
from lsdseg.data_utils.records import ATTRIBUTE, Record
from lsdseg.data_utils.volumes import slabs

SLAB_BYTES = 2**26


class _File(io.FileIO):
    """A file that keeps its first error for later: if a write fails, HDF5 cannot close its file and crashes at exit."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return int(memoryview(data).nbytes)

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self.error is not None:
            raise self.error


def write_hdf(export: Export, path: Path) -> None:
    """Write one dataset. A segmentation gets the name that CREMI gives labels, anything else keeps its own."""
    name = LABELS if SEGMENTATIONS.fullmatch(export.dataset) else export.dataset
    shape = (*export.channels, *export.shape)
    dtype = np.dtype(np.uint8) if export.array.dtype == bool else export.array.dtype
    chunks = (*[1] * len(export.channels), *(min(EDGE, size) for size in export.shape))
    with (
        _File(path, "w+") as raw,
        io.BufferedRandom(raw) as buffered,
        h5py.File(buffered, "w") as file,
        tqdm(total=math.prod(shape), desc=export.dataset, unit="voxel", unit_scale=True) as bar,
    ):
        file.attrs.update({"file_format": "0.2", ATTRIBUTE: json.dumps(export.record.to_json())})
        dataset = file.create_dataset(name, shape, dtype, chunks=chunks, compression="gzip", shuffle=True)
        dataset.attrs.update({"resolution": [float(v) for v in export.voxel_size]})
        dataset.attrs.update({"offset": [float(o) for o in export.offset]})
        for slab in slabs(export.array, SLAB_BYTES):
            data = export.read_as(dtype, slab)
            dataset[slab] = data
            bar.update(data.size)
            raw.check()
    raw.check()  # what was written when the file was closed


def is_own(path: Path) -> bool:
    """Return whether an export wrote a file."""
    try:
        with h5py.File(path, "r") as file:
            record = Record.from_json(json.loads(file.attrs[ATTRIBUTE]))
            return record is not None and record.step == STEP
    except (OSError, KeyError, ValueError, TypeError):
        return False
