"""How zarr arrays lie on disk: their headers and their chunks, and what is checked of both.

Whatever opens an array reads its header here, and whatever reads voxels goes through `CheckedArray`. So a damaged file
ends in one line that names it. Blosc does not notice if a chunk ends early and then gives whatever was in memory, so
the sizes in its header are compared with the file. Chunks that this suite writes hold a checksum of zstd's own.
"""

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import zarr

from lsdseg.errors import DamagedError, UserError

ZARR_VERSION = int(zarr.__version__.split(".")[0])
# Types of voxels that can be opened.
NUMBERS = {np.dtype(order + code) for code in "?bhilqBHILQefdFD" for order in "<>"}
# Beyond what any microscope gives. A header that says more is damaged, and whoever believes it never ends.
MAX_BYTES, MAX_CHUNK_BYTES, MAX_CHUNKS_ALONG_AXIS, MAX_JSON_BYTES = 2**56, 2**32, 2**20, 2**26


class ChecksumZstd(numcodecs.Zstd):
    """zstd with a checksum, which costs a tenth of the compression's time, and which every reader of zstd checks.

    An array does not say so, since tensorstore refuses to open one with the word. So this is what zstd means here.
    """

    def __init__(self, level: int = 1, checksum: bool = True) -> None:
        super().__init__(level, checksum=True)

    def get_config(self) -> dict[str, Any]:
        """Return what the metadata of an array say."""
        left_out = {"checksum": False} if ZARR_VERSION >= 3 else {}  # which zarr 3 itself leaves out
        return {"id": self.codec_id, "level": self.level, **left_out}


numcodecs.register_codec(ChecksumZstd)


class Header(NamedTuple):
    """What the header of an array says.

    Attributes:
        folder: the array.
        shape: in voxels.
        chunks: shape of a chunk in voxels.
        dtype: type of the voxels.
        prefix: what the names of all chunk files begin with.
        separator: what stands between the numbers in these names.
        blosc: whether chunks are compressed by Blosc, and by nothing after it.
        plain: whether a chunk's bytes are those of its voxels before they are compressed.
    """

    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    prefix: str
    separator: str
    blosc: bool
    plain: bool

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's voxels."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def chunk_file(self, index: tuple[int, ...]) -> Path:
        """Return the file of a chunk, which need not exist: then all its voxels have the fill value."""
        return self.folder / f"{self.prefix}{self.separator.join(map(str, index))}"

    def chunks_of(self, selection: Any) -> Iterator[tuple[int, ...]]:
        """Return the indices of the chunks that hold the voxels of a selection, as one indexes an array."""
        selection = selection if isinstance(selection, tuple) else (selection,)
        if Ellipsis in selection:
            at = selection.index(Ellipsis)
            missing = len(self.shape) - len(selection) + 1
            selection = (*selection[:at], *[slice(None)] * missing, *selection[at + 1 :])
        selection += (slice(None),) * (len(self.shape) - len(selection))
        ranges = []
        for along, size, chunk in zip(selection, self.shape, self.chunks, strict=True):
            voxels = range(size)[along if isinstance(along, slice) else slice(int(along), int(along) + 1 or None)]
            ranges.append(range(min(voxels) // chunk, max(voxels) // chunk + 1) if voxels else range(0))
        return itertools.product(*ranges)


def read_header(folder: Path) -> Header:
    """Read the header of an array, of zarr format 2 or 3.

    Raises:
        UserError: it is damaged; the voxels are no numbers; there are no voxels, or more than there can be.
    """
    file = folder / ".zarray"
    if not file.is_file():
        file = folder / "zarr.json"
    content = read_json(file)
    try:
        header = _header_2(folder, content) if file.name == ".zarray" else _header_3(folder, content)
        whole = all(type(n) is int for n in header.shape + header.chunks)
        if not whole or len(header.shape) != len(header.chunks) or min(header.chunks) <= 0 or min(header.shape) < 0:
            raise ValueError(f"shape {header.shape}, chunks {header.chunks}")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if header.dtype not in NUMBERS:
        raise UserError(f"{folder} holds {str(header.dtype)[:40]}: store integers or floats of at most 64 bits")
    if not 2 <= len(header.shape) <= 5 or 0 in header.shape:
        raise UserError(f"{folder} has shape {str(header.shape)[:100]}: store it with the axes z, y, x and some voxels")
    axes = zip(header.shape, header.chunks, strict=True)
    too_large = math.prod(header.shape) * header.dtype.itemsize > MAX_BYTES or header.chunk_bytes > MAX_CHUNK_BYTES
    if too_large or any(-(-size // chunk) > MAX_CHUNKS_ALONG_AXIS for size, chunk in axes):
        raise UserError(
            f"{folder} has shape {str(header.shape)[:100]} in chunks of {str(header.chunks)[:100]}, more than this "
            f"suite can read: correct {file.name}, or store it in smaller parts or in other chunks"
        )
    return header


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a zarr, {} if there is none.

    Raises:
        UserError: it is damaged or cannot be read.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
            raise _damaged(file, "it is no text of JSON")
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(file, "no JSON object")
    return content


def count_chunks(header: Header) -> int:
    """Return how many chunks of an array are stored. It lists all of them: some seconds for a million."""
    folders, names = [header.folder], re.compile(rf"{re.escape(header.prefix)}\d+(\.\d+)*")
    if header.separator == "/":
        folders, names = [header.folder / header.prefix], re.compile(r"\d+")
        for _ in header.shape[1:]:
            folders = [Path(e) for e in _entries(folders) if names.fullmatch(e.name) and not _is_file(e)]
    return sum(bool(names.fullmatch(e.name)) and _is_file(e) for e in _entries(folders))


def _entries(folders: list[Path]) -> Iterator[os.DirEntry[str]]:
    for folder in folders:
        if folder.is_dir():
            yield from os.scandir(folder)


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False) or os.path.isfile(entry)


class CheckedArray(zarr.Array):
    """A zarr array that names the file of a damaged chunk when it is read."""

    @cached_property
    def header(self) -> Header:
        """What its header says."""
        root = self.store.path if ZARR_VERSION < 3 else self.store.root
        return read_header(Path(root, self.path))

    def __getitem__(self, selection: Any) -> Any:
        """Return the voxels of a selection.

        Raises:
            UserError: a chunk is damaged.
        """
        for index in self.header.chunks_of(selection):
            _check_chunk(self.header, self.header.chunk_file(index))
        try:
            return super().__getitem__(selection)
        except Exception as error:
            for index in self.header.chunks_of(selection):
                self._read_one(index)
            raise error

    def _read_one(self, index: tuple[int, ...]) -> None:
        """Read one chunk to see whether it is the damaged one."""
        box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, self.chunks, strict=True))
        try:
            super().__getitem__(box)
        except Exception as error:
            raise _damaged(self.header.chunk_file(index), str(error)) from error


def open_checked(path: Path, dataset: str, mode: str) -> CheckedArray:
    """Open a zarr array.

    Args:
        path: the zarr.
        dataset: name of the array in it.
        mode: "r" to read, "r+" to write.

    Raises:
        UserError: as for `read_header`, or the version of zarr that is installed cannot read it.
    """
    header = read_header(path / dataset)
    if (header.folder / ".zarray").is_file():
        read_json(header.folder / ".zattrs")
    try:
        if ZARR_VERSION < 3:
            return CheckedArray(zarr.DirectoryStore(str(path)), path=dataset, read_only=mode == "r")
        return CheckedArray(zarr.open_array(store=str(path), path=dataset, mode=mode).async_array)
    except Exception as error:
        raise _damaged(header.folder, f"{type(error).__name__}: {error}") from error


def _header_2(folder: Path, content: dict[str, Any]) -> Header:
    compressor = content["compressor"] or {}
    if content["order"] not in ("C", "F"):
        raise ValueError(f"order {content['order']!r}")
    return Header(
        folder,
        tuple(content["shape"]),
        tuple(content["chunks"]),
        np.dtype(str(content["dtype"])),
        prefix="",
        separator=_separator(content.get("dimension_separator", ".")),
        blosc=compressor.get("id") == "blosc",
        plain=not content["filters"],
    )


def _header_3(folder: Path, content: dict[str, Any]) -> Header:
    encoding = content["chunk_key_encoding"]
    default = encoding["name"] == "default"
    separator = _separator(encoding.get("configuration", {}).get("separator", "/" if default else "."))
    codecs = [codec["name"] for codec in content["codecs"]]
    return Header(
        folder,
        tuple(content["shape"]),
        tuple(content["chunk_grid"]["configuration"]["chunk_shape"]),
        np.dtype(str(content["data_type"])),
        prefix=f"c{separator}" if default else "",
        separator=separator,
        blosc=codecs[-1] == "blosc",
        plain=set(codecs) <= {"transpose", "bytes", "blosc"},
    )


def _separator(text: Any) -> str:
    if text not in (".", "/"):
        raise ValueError(f"separator {text!r}")
    return str(text)


def _check_chunk(header: Header, file: Path) -> None:
    """Check that a chunk is a file, and that one of Blosc is as long as it says. A missing one is fine."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(file, "it is not a file")
        if not header.blosc:
            return
        with open(file, "rb", buffering=0) as stream:
            start = stream.read(16)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error
    # c-blosc's header has at 4 the number of bytes without compression, at 12 with it
    unpacked, stored = (int.from_bytes(start[i : i + 4], "little") for i in (4, 12))
    if len(start) < 16 or stored != status.st_size or (header.plain and unpacked != header.chunk_bytes):
        raise _damaged(
            file, f"{status.st_size} bytes for {header.chunk_bytes} of voxels, but it says {stored} for {unpacked}"
        )


def _damaged(file: Path, reason: str) -> DamagedError:
    short = " ".join(reason.split())[:150]
    return DamagedError(f"{file} is damaged ({short}): restore it from a copy, or make the array anew")
