"""Compare local shape descriptors with lsd-lite on real labels, in one run and with the same arguments.

    python benchmarks/lsd_targets.py --data ../shared/data --quick

Both use one thread. Our time is the median of three runs, after a run that compiles (its time is printed separately).
lsd-lite runs once, label after label. At full resolution it would need up to half an hour for all labels, so it gets
every k-th label and its time is scaled up (~). The last two columns compare the results. Correlations differ where a
label is flat, because lsd-lite divides rounding errors there. Offsets differ where down-sampling leaves nothing of a
label.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from lsd_lite import get_lsds
from numpy.typing import NDArray

from lsdseg.engine.training.lsd import local_shape_descriptors

SIGMA = 80.0  # nm, the default of MODEL_*.LSD_SIGMA
FULL_RESOLUTION_LABELS = 16  # lsd-lite gets at least this many at full resolution
COLUMNS = "{:<9}{:>13}{:>8}{:>12}{:>12}{:>9}{:>8}{:>10}{:>9}"
HEADER = ("labels of", "voxels", "labels", "downsample", "lsd-lite s", "ours s", "ratio", "max diff", "> 2e-3")


def main() -> None:
    """Measure two volumes, down-sampled by two and at full resolution, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cremi_labels.npz and fib25_train.hdf")
    parser.add_argument("--quick", action="store_true", help="crops that take seconds; their ratios are lower")
    args = parser.parse_args()
    files = cremi, fib25 = args.data / "cremi_labels.npz", args.data / "fib25_train.hdf"
    for file in files:
        if not file.is_file():
            parser.error(f"{file} is missing; --data names the folder that holds it")

    sections, side, cube = (16, 64, 64) if args.quick else (50, 200, 144)
    with h5py.File(fib25) as file:
        fib25_labels = file["volumes/labels/neuron_ids"][:cube, :cube, :cube]
    cremi_labels = np.load(cremi)["labels"][:sections, :side, :side]

    _, compilation = timed(local_shape_descriptors, np.ones((4, 4, 4), np.uint64), SIGMA)
    print(f"{os.cpu_count()} cores; sigma {SIGMA:.0f} nm; compiling or loading our kernels: {compilation:.1f} s")
    print(COLUMNS.format(*HEADER), flush=True)
    for downsample in (2, 1):
        compare("FIB-25", fib25_labels, (10, 10, 10), downsample)
        compare("CREMI", cremi_labels, (40, 4, 4), downsample)


def compare(name: str, labels: NDArray[Any], voxel_size: tuple[int, ...], downsample: int) -> None:
    """Run both on one volume, and print a line."""
    ids = np.unique(labels[labels > 0])
    subset = ids if downsample > 1 else ids[:: max(1, len(ids) // FULL_RESOLUTION_LABELS)]
    runs = [timed(local_shape_descriptors, labels, SIGMA, voxel_size, downsample) for _ in range(3)]
    ours, seconds = runs[0][0], np.median([run[1] for run in runs])
    theirs, their_seconds = timed(get_lsds, labels, SIGMA, voxel_size, labels=subset, downsample=downsample)
    their_seconds *= len(ids) / len(subset)
    difference = np.abs(ours - theirs).max(axis=0)[np.isin(labels, subset)]
    line = COLUMNS.format(
        name,
        "x".join(map(str, labels.shape)),
        len(ids),
        downsample,
        f"{'~' if len(subset) < len(ids) else ''}{their_seconds:.2f}",
        f"{seconds:.3f}",
        f"{their_seconds / seconds:.0f}",
        f"{difference.max():.4f}",
        f"{np.mean(difference > 2e-3):.3%}",
    )
    print(line, flush=True)


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Return the result of a function, and how many seconds it took."""
    begin = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - begin


if __name__ == "__main__":
    main()
