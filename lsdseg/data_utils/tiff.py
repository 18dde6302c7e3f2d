"""TIFF stacks, as volumes to convert: one file of many sections, or a folder with one file for each."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils import placement
from lsdseg.data_utils.formats import Source, Volume, total_bytes
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.mapped import MappedArray
from lsdseg.errors import UserError

SUFFIXES = (".tif", ".tiff")
# In ImageJ, "um" may be written with an escaped or another Greek letter.
NANOMETERS = placement.NANOMETERS | {"μm": 1000, "\\u00B5m": 1000, "cm": 10**7}


class Sections:
    """Sections of a TIFF as an array (z, y, x) that reads what is sliced.

    Args:
        pages: of tifffile, one for each section.
        where: names the file, for messages.

    Raises:
        UserError: the sections are not gray, or differ in shape or type.
    """

    def __init__(self, pages: list[Any], where: str) -> None:
        first = pages[0]
        kinds = {(tuple(page.shape), page.dtype) for page in pages}
        if len(kinds) > 1:
            raise UserError(f"the sections of {where} differ in shape or type: use sections that are all alike")
        if len(first.shape) != 2:
            raise UserError(
                f"{where} has {first.samplesperpixel} values for each pixel, such as colors: convert it to gray values "
                "first"
            )
        self.pages = pages
        self.shape = (len(pages), *first.shape)
        self.dtype = np.dtype(first.dtype)

    def __getitem__(self, where: tuple[slice, slice, slice]) -> NDArray[Any]:
        pages = self.pages[where[0]]
        rows, columns = (range(size)[along] for size, along in zip(self.shape[1:], where[1:], strict=True))
        values = np.empty((len(pages), len(rows), len(columns)), self.dtype)
        if values.size:
            y, x = (slice(min(along), max(along) + 1) for along in (rows, columns))
            for section, page in zip(values, pages, strict=True):
                section[...] = _read(page, y, x)[:: rows.step, :: columns.step]
        return values


def _read(page: Any, y: slice, x: slice) -> NDArray[Any]:
    """Read a box of a page of a file that is closed.

    Only the strips or tiles that it touches are read: a section may be as large as memory, and is read in many boxes.
    """
    path = page.parent.filehandle.path
    if page.is_memmappable:
        dtype = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
        return np.memmap(path, dtype, "r", page.dataoffsets[0], page.shape)[y, x]
    (height, width), across = page.chunks[-2:], page.chunked[-1]
    values = np.full((y.stop - y.start, x.stop - x.start), page.nodata, page.dtype)
    with open(path, "rb") as file:
        for row, column in itertools.product(_pieces(y, height), _pieces(x, width)):
            number = row * across + column
            if page.databytecounts[number]:
                file.seek(page.dataoffsets[number])
                data = file.read(page.databytecounts[number])
                tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
                piece = page.decode(data, number, **tables)[0][0, :, :, 0]
                rows = _common(y, row * height, piece.shape[0])
                columns = _common(x, column * width, piece.shape[1])
                values[rows[1], columns[1]] = piece[rows[0], columns[0]]
    return values


def _pieces(along: slice, width: int) -> range:
    """Return the numbers of the strips or tiles that a slice touches."""
    return range(along.start // width, (along.stop - 1) // width + 1)


def _common(along: slice, begin: int, width: int) -> tuple[slice, slice]:
    """Return what a strip or tile and a slice have in common: in the one, and in the other."""
    first, last = max(along.start, begin), min(along.stop, begin + width)
    return slice(first - begin, last - begin), slice(first - along.start, last - along.start)


@contextmanager
def open_tiff(path: Path) -> Iterator[Source]:
    """Open a TIFF stack, or a folder of TIFFs in the order of their names.

    The voxel size is that of the metadata of ImageJ or OME, if there is any. The offset is where OME says that
    the first section is, if it says so in nm.

    Raises:
        UserError: a file is damaged, or no stack of gray sections; it has several channels or points in time.
    """
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    try:
        with tifffile.TiffFile(files[0]) as first:
            voxel_size, offset = _voxel_size(first), _offset(first)
            stacked, is_ome = _stacked_axes(first), first.is_ome
            stack = _undescribed_stack(first)
        pages = _pages(files)
    except Exception as error:  # tifffile and the parser of XML raise what they like
        raise UserError(f"{path} is no TIFF or damaged ({str(error)[:100]}): use another copy") from error
    if len(stacked) > 1 or (is_ome and "C" in stacked):
        axes = " and ".join(f"{count} along {axis}" for axis, count in stacked.items())
        raise UserError(f"{path} has {axes}: save one stack of sections, such as one channel, in a file of its own")
    if stack and len(files) > 1:
        raise UserError(f"{files[0]} is one of several stacks: convert each by itself")
    data = Sections(pages, str(path))
    attributes = {"resolution": voxel_size} if voxel_size else {}
    if voxel_size and offset:
        attributes["offset"] = offset
    size = partial(total_bytes, files)
    yield Source([Volume(RAW, stack or data, attributes, size, (1, *data.shape[1:]))], [])


def _pages(files: list[Path]) -> list[Any]:
    """Return the pages of all files, which are closed: a process may not have thousands of files open."""
    pages: list[Any] = []
    for file in tqdm(files, desc="files", unit="file", delay=2):
        with tifffile.TiffFile(file) as tiff:
            pages += tiff.pages
    return pages


def _undescribed_stack(tiff: tifffile.TiffFile) -> MappedArray | None:
    """Return a stack of which the file describes only the first section, as ImageJ writes those of more than 4 GB."""
    stack = tiff.series[0]
    if not stack.is_truncated:
        if (count := (tiff.imagej_metadata or {}).get("images", 1)) > len(tiff.pages):
            raise ValueError(f"it has {len(tiff.pages)} of {count} sections")
        return None
    shape = (stack.size // math.prod(stack.shape[-2:]), *stack.shape[-2:])
    dtype = np.dtype(stack.dtype).newbyteorder(tiff.byteorder)
    return MappedArray(partial(np.memmap, tiff.filehandle.path, dtype, "r", stack.dataoffset, shape))


def _stacked_axes(tiff: tifffile.TiffFile) -> dict[str, int]:
    """Return the axes of a stack that are longer than 1, beside those of a section.

    Programs write sections along any one axis: Z, T, or C in files of ImageJ. OME files say what they mean.
    """
    series = tiff.series[0]
    return {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "YXS" and size > 1}


def _voxel_size(tiff: tifffile.TiffFile) -> list[float]:
    """Return z, y, x in nm, empty if the file does not say."""
    if tiff.ome_metadata:
        pixels = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
        sizes = [_ome_size(pixels, axis) for axis in "ZYX"] if pixels is not None else []
        return [size for size in sizes if size] if all(sizes) else []
    metadata, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags  # type: ignore[union-attr]
    unit = NANOMETERS.get(metadata.get("unit") or "unknown")
    if unit is None or "spacing" not in metadata or "XResolution" not in tags:
        return []
    along = [tags[name].value for name in ("YResolution", "XResolution")]  # pixels in each unit, as a fraction
    if not all(pixels for pixels, _ in along):
        return []
    return [float(metadata["spacing"]) * unit, *(units / pixels * unit for pixels, units in along)]


def _offset(tiff: tifffile.TiffFile) -> list[float]:
    """Return z, y, x in nm, empty if the file does not say. Positions in other units are those of a stage."""
    plane = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Plane") if tiff.ome_metadata else None
    if plane is None or any(plane.get(f"Position{axis}Unit") != "nm" for axis in "ZYX"):
        return []
    return [float(plane.get(f"Position{axis}", 0)) for axis in "ZYX"]


def _ome_size(pixels: ElementTree.Element, axis: str) -> float:
    unit = NANOMETERS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), 0.0)
    return float(pixels.get(f"PhysicalSize{axis}", 0)) * unit
