"""Volumes drawn at random go through every format and every export and come back, each voxel at its nanometer."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from funlib.geometry import Coordinate
from fuzz import fuzz
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_formats import (
    write_hdf,
    write_imagej,
    write_n5,
    write_ome,
    write_ome_zarr,
    write_precomputed,
    write_sections,
    write_zarr3,
)

from lsdseg.data_utils.convert import convert_volume
from lsdseg.data_utils.export import export_dataset
from lsdseg.data_utils.export_formats import FORMATS
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.placement import nanometers, voxel_size_nm
from lsdseg.data_utils.volumes import create_array, list_arrays, open_array, read
from lsdseg.errors import UserError

# Smallest values of a volume: the marked voxel has the smallest one + 8, all others less.
LEAST = {
    "uint8": [0, 247],
    "uint16": [0, 2**16 - 9],
    "int16": [-(2**15), 2**15 - 9],
    "float32": [0.5],
    "uint64": [0, 2**32 - 9, 2**32 - 8, 2**63, 2**64 - 12],
}
WIDEST_OF_TIFF = 2**32 - 1
few = settings(fuzz, max_examples=max(1, fuzz.max_examples // 2))


class Drawn(NamedTuple):
    """A volume, z, y, x; voxel size and offset in nm, chunks in voxels."""

    data: np.ndarray
    marked: tuple[int, ...]
    voxel_size: tuple[float, ...]
    offset: tuple[float, ...]
    chunks: tuple[int, ...]

    def is_in(self, path, offset=None):
        """Check that a volume is this one, perhaps at another offset, with the marked voxel at its nanometer."""
        array = open_array(path, RAW)
        np.testing.assert_array_equal(read(array), self.data)
        (marked,) = np.argwhere(read(array) == self.data[self.marked])
        begin = self.offset if offset is None else offset
        expected = [b + m * v for b, m, v in zip(begin, self.marked, self.voxel_size, strict=True)]
        assert nanometers(array.offset + Coordinate(marked) * array.voxel_size, array) == pytest.approx(expected)
        assert voxel_size_nm(array) == self.voxel_size
        return array


def three(numbers):
    """Three numbers, all different: an axis that is taken for another one shows."""
    return st.lists(numbers, min_size=3, max_size=3, unique=True).map(tuple)


@st.composite
def drawn_volumes(draw):
    shape = draw(three(st.integers(1, 12) | st.integers(62, 70)).filter(lambda shape: np.prod(shape) < 20_000))
    dtype = np.dtype(draw(st.sampled_from(sorted(LEAST))))
    least = draw(st.sampled_from(LEAST[dtype.name]))
    data = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 8, shape).astype(dtype) + dtype.type(least)
    marked = tuple(draw(st.integers(0, size - 1)) for size in shape)
    data[marked] = least + 8
    voxel_size = draw(three(st.integers(1, 120) | st.integers(10, 1200).map(lambda tenths: tenths / 10)))
    offset = tuple(round(n * v, 1) for n, v in zip(draw(three(st.integers(-90, 2000))), voxel_size, strict=True))
    chunks = tuple(draw(st.integers(-(-size // 3), size)) for size in shape)
    return Drawn(data, marked, voxel_size, offset, chunks)


def write_zarr2(path, data, voxel_size, offset, chunks):
    array = create_array(
        path, "em", data.shape, voxel_size=voxel_size, offset=offset, dtype=data.dtype, chunk_shape=chunks
    )
    array[:] = data


# What is read, how other programs write it, and what of a volume's place it holds.
PLACED, IN_CHUNKS = ("voxel_size", "offset"), ("voxel_size", "offset", "chunks")
READ = {
    "in.hdf": (write_hdf, IN_CHUNKS),
    "imagej.tif": (write_imagej, ("voxel_size",)),
    "ome.tif": (write_ome, ("voxel_size",)),
    "sections": (write_sections, ()),
    "in.npy": (np.save, ()),
    "in.n5": (write_n5, IN_CHUNKS),
    "precomputed": (write_precomputed, IN_CHUNKS),
    "zarr2.zarr": (write_zarr2, IN_CHUNKS),
    "zarr3.zarr": (write_zarr3, PLACED),
    "ome04.zarr": (write_ome_zarr, PLACED),
    "ome05.zarr": (lambda path, data, **place: write_ome_zarr(path, data, "0.5", "xzy", **place), PLACED),
}
NOT_IMAGEJ, NOT_OME = ("int16", "uint64"), ("uint64",)  # types that a format cannot hold
ANYWHERE = (0, 0, 0)  # the offset of what says none
IN_PLACE = ["zarr2.zarr", "in.n5", "in.hdf", "precomputed", "ome04.zarr", "ome05.zarr"]
NAMES = {"tiff": "out.tif", "hdf5": "out.hdf"}


def convert(path, target, volume, placed):
    resolution = None if "voxel_size" in placed else volume.voxel_size
    convert_volume(path, target, labels=None, dataset=None, sections=":", resolution=resolution, overwrite=False)
    return volume.is_in(target, offset=None if "offset" in placed else ANYWHERE)


@pytest.mark.parametrize("name", READ)
@few
@given(volume=drawn_volumes())
def test_every_format_is_read_to_the_same_zarr(name, volume):
    write, placed = READ[name]
    dtype, width = volume.data.dtype, volume.data.shape[2]
    # tifffile writes a single column for ImageJ as if it were colors
    assume(name != "imagej.tif" or (dtype.name not in NOT_IMAGEJ and width > 1))
    assume(name != "ome.tif" or dtype.name not in NOT_OME)
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder, name), Path(folder, "out.zarr")
        write(path, volume.data, **{key: getattr(volume, key) for key in placed})
        assert convert(path, target, volume, placed).dtype == dtype
        assert list_arrays(target) == [RAW]


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "swc"])  # which holds no voxels
@few
@given(
    volume=drawn_volumes(),
    name=st.sampled_from(IN_PLACE),
)
def test_every_export_comes_back(to, name, volume):
    """The volume that is exported lies in any format: it is read where it is."""
    with tempfile.TemporaryDirectory() as folder:
        path, out, back = Path(folder, name), Path(folder, NAMES.get(to, "out")), Path(folder, "back.zarr")
        write, placed = READ[name]
        write(path, volume.data, **{key: getattr(volume, key) for key in placed})
        (dataset,) = list_arrays(path)
        options = {"to": to, "dataset": dataset, "overwrite": False}
        if to.startswith("tiff") and volume.data[volume.marked] > WIDEST_OF_TIFF and volume.data.dtype == np.uint64:
            with pytest.raises(UserError, match="which is no uint32 and cannot be written in this format"):
                export_dataset(path, out, **options)
            assert [file.name for file in Path(folder).iterdir()] == [name]
            return
        export_dataset(path, out, **options)
        array = convert(out, back, volume, () if to == "tiff-sections" else IN_CHUNKS)
        narrow = to.startswith("tiff") and volume.data.dtype == np.uint64
        assert array.dtype == (np.uint32 if narrow else volume.data.dtype)
