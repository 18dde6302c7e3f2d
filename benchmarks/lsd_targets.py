"""Time local shape descriptors against lsd-lite on real labels, both in one run with the same arguments.

    python benchmarks/lsd_targets.py --data ../shared/data --quick

Ours is the median of three runs after one that compiles (its time is printed apart); lsd-lite, which takes minutes,
runs once. Both use one thread. The last two columns compare the results: correlations differ where a label is flat,
since lsd-lite divides rounding errors there, and where down-sampling leaves nothing of a label.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
from lsd_lite import get_lsds

from engine.training.lsd import local_shape_descriptors

SIGMA = 80.0  # nm, the default of MODEL_*.LSD_SIGMA
COLUMNS = "{:<9}{:>13}{:>8}{:>12}{:>12}{:>9}{:>8}{:>10}{:>12}"


def timed(function, *args, **kwargs):
    """The function's result and how long it took in seconds."""
    begin = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - begin


def main():
    """Measure two volumes at full resolution and down-sampled by two, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cremi_labels.npz and fib25_train.hdf")
    parser.add_argument("--quick", action="store_true", help="crops that take seconds; their ratios are lower")
    args = parser.parse_args()
    files = cremi, fib25 = args.data / "cremi_labels.npz", args.data / "fib25_train.hdf"
    for file in files:
        if not file.is_file():
            parser.error(f"{file} is missing; --data names the folder that holds it")

    sections, side = (16, 64) if args.quick else (144, 200)
    cube = 64 if args.quick else 144
    with h5py.File(fib25) as file:
        fib25_labels = file["volumes/labels/neuron_ids"][:cube, :cube, :cube]
    volumes = {
        "CREMI": (np.load(cremi)["labels"][:sections, :side, :side], (40, 4, 4)),
        "FIB-25": (fib25_labels, (10, 10, 10)),
    }

    _, compilation = timed(local_shape_descriptors, np.ones((4, 4, 4), np.uint64), SIGMA)
    print(f"{os.cpu_count()} cores; sigma {SIGMA:.0f} nm; compiling or loading our kernels: {compilation:.1f} s")
    print(
        COLUMNS.format(
            "labels of", "voxels", "labels", "downsample", "lsd-lite s", "ours s", "ratio", "max diff", "> 2e-3"
        ),
        flush=True,
    )
    for name, (labels, voxel_size) in volumes.items():
        for downsample in (1, 2):
            arguments = (labels, SIGMA, voxel_size)
            runs = [timed(local_shape_descriptors, *arguments, downsample) for _ in range(3)]
            ours, seconds = runs[0][0], np.median([run[1] for run in runs])
            expected, lsd_lite_seconds = timed(get_lsds, *arguments, downsample=downsample)
            difference = np.abs(ours - expected).max(axis=0)
            print(
                COLUMNS.format(
                    name,
                    "x".join(map(str, labels.shape)),
                    np.count_nonzero(np.unique(labels)),
                    downsample,
                    f"{lsd_lite_seconds:.2f}",
                    f"{seconds:.3f}",
                    f"{lsd_lite_seconds / seconds:.0f}",
                    f"{difference.max():.4f}",
                    f"{np.mean(difference > 2e-3):.4%}",
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
