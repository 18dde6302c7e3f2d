"""Compare local shape descriptors with lsd-lite, in one run and with the same arguments.

    python benchmarks/lsd_targets.py --data ../shared/data --quick
    python benchmarks/lsd_targets.py --quick --repeats 3

Without --data, labels are those of two phantoms. Both use one thread. Our time is the median of three runs, after a run
that compiles (its time is printed separately). lsd-lite runs once, label after label. This is repeated --repeats times.
At full resolution lsd-lite would need up to half an hour for all labels, so it gets every k-th label and its time is
scaled up (~). The last two columns compare the results. Correlations differ where a label is flat, because lsd-lite
divides rounding errors there. Offsets differ where down-sampling leaves nothing of a label.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
from lsd_lite import get_lsds
from numpy.typing import NDArray

from lsdseg.data_utils.phantom import make_phantom
from lsdseg.engine.training.lsd import local_shape_descriptors
from ratios import Rows, add_options, in_turns

SIGMA = 80.0  # nm, the default of MODEL_*.LSD_SIGMA
FULL_RESOLUTION_LABELS = 16  # lsd-lite gets at least this many at full resolution
COLUMNS = "{:<9}{:>13}{:>8}{:>12}{:>12}{:>9}{:>8}{:>10}{:>9}"
HEADER = ("labels of", "voxels", "labels", "downsample", "lsd-lite s", "ours s", "ratio", "max diff", "> 2e-3")


def main() -> None:
    """Measure two volumes, down-sampled by two and at full resolution, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of cremi_labels.npz and fib25_train.hdf")
    parser.add_argument("--quick", action="store_true", help="crops that take seconds; their ratios are lower")
    add_options(parser, repeats=1)
    args = parser.parse_args()
    rows = Rows(args.json)
    volumes = labels_of(args.data, args.quick, parser.error)

    _, compilation = timed(local_shape_descriptors, np.ones((4, 4, 4), np.uint64), SIGMA)
    print(f"{os.cpu_count()} cores; sigma {SIGMA:.0f} nm; compiling or loading our kernels: {compilation:.1f} s")
    print(COLUMNS.format(*HEADER), flush=True)
    for downsample in (2, 1):
        for name, (labels, voxel_size) in volumes.items():
            compare(rows, name, labels, voxel_size, downsample, args.repeats)


def labels_of(
    data: Path | None, quick: bool, error: Callable[[str], NoReturn]
) -> dict[str, tuple[NDArray[Any], tuple[int, ...]]]:
    """Return labels and voxel size (nm) of an isotropic volume and of one of sections."""
    sections, side, cube = (16, 64, 64) if quick else (50, 200, 144)
    shapes = {"phantom": ((cube,) * 3, (10, 10, 10)), "sections": ((sections, side, side), (40, 4, 4))}
    if data is None:
        return {name: (make_phantom(n, seed=0, voxel_size=size)[1], size) for name, (n, size) in shapes.items()}
    cremi, fib25 = data / "cremi_labels.npz", data / "fib25_train.hdf"
    for path in (cremi, fib25):
        if not path.is_file():
            error(f"{path} is missing; --data names the folder that holds it")
    with h5py.File(fib25) as file:
        fib25_labels = file["volumes/labels/neuron_ids"][:cube, :cube, :cube]
    cremi_labels = np.load(cremi)["labels"][:sections, :side, :side]
    return {"FIB-25": (fib25_labels, (10, 10, 10)), "CREMI": (cremi_labels, (40, 4, 4))}


def compare(
    rows: Rows, name: str, labels: NDArray[Any], voxel_size: tuple[int, ...], downsample: int, repeats: int
) -> None:
    """Run both on one volume, print a line, and add a row."""
    ids = np.unique(labels[labels > 0])
    subset = ids if downsample > 1 else ids[:: max(1, len(ids) // FULL_RESOLUTION_LABELS)]
    arguments, results = (labels, SIGMA, voxel_size), {}

    def our_seconds() -> float:
        runs = [timed(local_shape_descriptors, *arguments, downsample) for _ in range(3)]
        results["ours"] = runs[0][0]
        return float(np.median([run[1] for run in runs]))

    def their_seconds() -> float:
        results["theirs"], seconds = timed(get_lsds, *arguments, labels=subset, downsample=downsample)
        return seconds * len(ids) / len(subset)

    seconds = in_turns(repeats, our_seconds, their_seconds)
    about = f"{name}, {'x'.join(map(str, labels.shape))} voxels, {len(ids)} labels, downsample {downsample}"
    row = rows.add(f"LSDs of {about}", seconds[0], "lsd-lite", seconds[1])
    ours, theirs = results["ours"], results["theirs"]
    difference = np.abs(ours - theirs).max(axis=0)[np.isin(labels, subset)]
    line = COLUMNS.format(
        name,
        "x".join(map(str, labels.shape)),
        len(ids),
        downsample,
        f"{'~' if len(subset) < len(ids) else ''}{row['other_cost']:.2f}",
        f"{row['cost']:.3f}",
        f"{1 / row['ratio']:.0f}",
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
