"""Peak memory and rate of every conversion, export and operation on volumes of several sizes.

    python benchmarks/memory.py --gb 1 4 --folder /scratch

Memory that stays the same while the volume grows fits any volume. Each row is one program, started as a user starts it.
Peak memory is that of the program and of all processes that it starts, added up (Linux only). The rate counts the
voxels that it reads, without compression. A volume is a cube of zeros with blobs along its diagonal. It takes little
room on disk, so rates are those of code and compression, not of a disk. Exit status 1: a program failed, or took more
than 1.5 GB.
"""

import argparse
import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import psutil
import tensorstore
import tifffile
from numpy.typing import DTypeLike, NDArray

from lsdseg.config.loader import CHECKOUT
from lsdseg.data_utils.export_formats import FORMATS
from lsdseg.data_utils.layout import LABELS, RAW
from lsdseg.data_utils.process import OPERATIONS
from lsdseg.data_utils.volumes import create_array

LIMIT = 1.5e9  # bytes
EDGE = 64  # of a chunk and of a blob, in voxels
VOXEL_SIZE = (8, 8, 8)
SUFFIXES = {"tiff": ".tif", "hdf5": ".hdf"}
OPTIONS = {
    "clahe": [],
    "match": ["--to", "{source}"],
    "merge": ["--ids", "2", "3", "--into", "1"],
    "remove-small": ["--voxels", "5000"],
    "components": [],
    "pad": ["--by", "8", "8", "8"],
    "crop": ["--context", "8", "8", "8"],
}
OF_RAW = ("clahe", "match", "pad")


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", nargs="+", type=float, default=[16], help="sizes of the volume (default: 16)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="programs whose row holds one of these")
    args = parser.parse_args()
    names = [f"to_zarr {name}" for name in SOURCES]
    names += [f"export {kind} {to}" for to in FORMATS for kind in ("raw", "labels") if (kind, to) != ("raw", "swc")]
    names += [f"process {name}" for name in OPERATIONS]
    chosen = [name for name in names if not args.only or any(text in name for text in args.only)]
    print("| program | volume | peak memory | rate | below 1.5 GB |\n|---|---|---|---|---|")
    well = True
    for name in chosen:
        for size in args.gb:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                peak, seconds, voxel_bytes, error = measure(command_of(name, size, Path(folder)))
            well &= not error and peak < LIMIT
            rate = f"failed: {error}" if error else f"{voxel_bytes / seconds / 1e6:.0f} MB/s"
            fits = "yes" if peak < LIMIT else "no"
            print(f"| {name} | {voxel_bytes / 1e9:.1f} GB | {peak / 1e9:.2f} GB | {rate} | {fits} |", flush=True)
    sys.exit(not well)


def command_of(name: str, size: float, folder: Path) -> tuple[list[str], int]:
    """Make the source of a program below a folder, and return its command and the bytes of the source's voxels."""
    program, kind, *rest = name.split()
    dtype = np.dtype(np.uint64 if kind == "labels" or (kind not in OF_RAW and program == "process") else np.uint8)
    shape = (math.ceil((size * 1e9 / dtype.itemsize) ** (1 / 3) / EDGE) * EDGE,) * 3
    count = math.prod(shape) * dtype.itemsize
    script = str(CHECKOUT / "data_utils" / f"{program}.py")
    if program == "to_zarr":
        source = folder / f"in{kind if kind.startswith('.') else ''}"
        SOURCES[kind](source, shape)
        size_of_voxels = ["--resolution", *map(str, VOXEL_SIZE)]
        return [script, str(source), str(folder / "out.zarr"), *size_of_voxels], count
    source, dataset = folder / "in.zarr", RAW if dtype == np.uint8 else LABELS
    make_zarr(source, shape, dataset, dtype)
    if program == "export":
        to = rest[0]
        return [
            script,
            str(source),
            str(folder / f"out{SUFFIXES.get(to, '')}"),
            "--to",
            to,
            "--dataset",
            dataset,
        ], count
    options = [option.format(source=source) for option in OPTIONS[kind]]
    return [script, kind, str(source), str(folder / "out.zarr"), *options], count


def measure(command: tuple[list[str], int]) -> tuple[float, float, int, str]:
    """Run a program, and return its peak memory in bytes, its seconds, the bytes it reads, and its error, if any."""
    arguments, count = command
    began, peaks = time.monotonic(), {}
    with tempfile.TemporaryFile("w+") as errors:
        program = psutil.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=errors)
        while program.poll() is None:
            peaks |= peaks_of(program)
            time.sleep(0.02)
        seconds = time.monotonic() - began
        errors.seek(0)
        error = errors.read().strip().splitlines()[-1][:200] if program.returncode else ""
    return sum(peaks.values()), seconds, count, error


def peaks_of(program: psutil.Process) -> dict[int, float]:
    """Return process number -> bytes that it ever had in memory, of a program and what it started."""
    peaks = {}
    with contextlib.suppress(psutil.Error, OSError):  # it has just ended
        for process in [program, *program.children(recursive=True)]:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):  # gone when a process has ended
                peaks[process.pid] = int(found[1]) * 1024.0
    return peaks


def blobs(shape: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], NDArray]]:
    """Yield the chunks along the diagonal, each with one ball of a value of its own, below 255."""
    along = np.arange(EDGE) - EDGE / 2
    ball = along[:, None, None] ** 2 + along[:, None] ** 2 + along**2 < (EDGE / 3) ** 2
    for number, begin in enumerate(range(0, shape[0], EDGE)):
        yield (slice(begin, begin + EDGE),) * 3, ball * np.uint8(1 + number % 254)


def make_zarr(path: Path, shape: tuple[int, ...], dataset: str = RAW, dtype: DTypeLike = np.uint8) -> None:
    """Write a zarr of format 2."""
    array = create_array(path, dataset, shape, voxel_size=VOXEL_SIZE, offset=(0, 0, 0), dtype=dtype)
    for voxels, values in blobs(shape):
        array[voxels] = values.astype(dtype)


def make_hdf(path: Path, shape: tuple[int, ...]) -> None:
    """Write an HDF5 file."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(RAW, shape, np.uint8, chunks=(EDGE,) * 3)
        for voxels, values in blobs(shape):
            dataset[voxels] = values


def make_npy(path: Path, shape: tuple[int, ...]) -> None:
    """Write an array of numpy, a file with holes."""
    _fill(np.lib.format.open_memmap(path, "w+", np.uint8, shape), shape)


def make_tiff(path: Path, shape: tuple[int, ...], one_page: bool = False) -> None:
    """Write a stack without compression, a file with holes; with one page, as ImageJ writes large ones."""
    options = {"imagej": True, "metadata": {"axes": "ZYX"}, "truncate": True} if one_page else {"bigtiff": True}
    tifffile.imwrite(path, None, shape=shape, dtype=np.uint8, photometric="minisblack", **options)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.series[0].dataoffset
    _fill(np.memmap(path, np.uint8, "r+", offset, shape), shape)


def _fill(voxels: NDArray, shape: tuple[int, ...]) -> None:
    for where, values in blobs(shape):
        voxels[where] = values


def make_sections(path: Path, shape: tuple[int, ...]) -> None:
    """Write a folder of sections, each of them the same file."""
    path.mkdir()
    tifffile.imwrite(path / "00000.tif", np.arange(math.prod(shape[1:]), dtype=np.uint8).reshape(shape[1:]))
    for number in range(1, shape[0]):
        os.link(path / "00000.tif", path / f"{number:05}.tif")


def make_n5(path: Path, shape: tuple[int, ...]) -> None:
    """Write an N5 container."""
    metadata = {
        "dimensions": shape[::-1],
        "blockSize": [EDGE] * 3,
        "dataType": "uint8",
        "compression": {"type": "gzip"},
    }
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{path}/em/"}, "metadata": metadata}
    store = tensorstore.open(spec, create=True).result()
    for voxels, values in blobs(shape):
        store[voxels[::-1]] = values.T
    (path / "attributes.json").write_text('{"n5": "2.5.0"}', encoding="utf-8")


def exported(to: str) -> Callable[[Path, tuple[int, ...]], None]:
    """Return a function that writes a format that is exported."""

    def make(path: Path, shape: tuple[int, ...]) -> None:
        zarr = path.with_name("exported.zarr")
        make_zarr(zarr, shape)
        script = str(CHECKOUT / "data_utils" / "export.py")
        command = [sys.executable, script, str(zarr), str(path), "--to", to, "--dataset", RAW]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(zarr)

    return make


# What a source is called -> how it is made. A name that begins with a dot is the suffix of a file.
SOURCES: dict[str, Callable[[Path, tuple[int, ...]], None]] = {
    ".zarr": make_zarr,
    ".hdf": make_hdf,
    ".npy": make_npy,
    ".tif": make_tiff,
    ".imagej.tif": lambda path, shape: make_tiff(path, shape, one_page=True),
    "sections": make_sections,
    ".n5": make_n5,
    "precomputed": exported("precomputed"),
    "ome-zarr": exported("ome-zarr"),
    "ome-zarr-0.5": exported("ome-zarr-0.5"),
}


if __name__ == "__main__":
    main()
