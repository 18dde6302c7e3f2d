"""What segmentation block by block costs per voxel, for volumes of 1, 4 and 16 units: flat, if it scales.

    python benchmarks/blockwise.py --units 1 4 16

One worker, Parquet graph, affinities of a tiled synthetic volume; a unit is 8 blocks of 64^3 voxels. Seconds are the
worker's own, without starting it and without its first block, which loads compiled code, per voxel that is read: in a
small volume more blocks lie at its faces, where there is less context to read. Ratios are to the smallest volume of the
same run.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.segmentation import find_boundaries

from config.loader import load_config
from data_utils.layout import data_folder, output_path
from data_utils.phantom import make_phantom
from data_utils.volumes import write_array
from engine.blocks import run_blocks
from engine.post import large

BLOCK, CONTEXT = 64, 16
MERGE_FUNCTION = "hist_quant_75"
COLUMNS = "{:<12}{:>8}{:>12}{:>16}{:>10}{:>18}"


def unit_affinities() -> np.ndarray:
    """Affinities, uint8 (3, 128, 128, 128), of a noisy phantom."""
    _, labels, _ = make_phantom((2 * BLOCK,) * 3, seed=0)
    inside = np.where(find_boundaries(labels, mode="thick"), 0, labels)
    affinities = np.ones((3, *labels.shape), np.float32)
    for axis in range(3):
        here, before = np.moveaxis(inside, axis, 0)[1:], np.moveaxis(inside, axis, 0)[:-1]
        np.moveaxis(affinities[axis], axis, 0)[1:] = (here == before) & (here > 0)
    noise = np.random.default_rng(0).normal(0, 0.1, affinities.shape)
    return np.rint(255 * (np.stack([gaussian_filter(a, 0.7) for a in affinities]) + noise).clip(0, 1)).astype(np.uint8)


def voxels_read(shape, context) -> float:
    """Voxels that a block reads, in the mean over all blocks of a volume."""
    widths = [
        np.mean([min(begin + BLOCK + context, size) - max(begin - context, 0) for begin in range(0, size, BLOCK)])
        for size in shape
    ]
    return float(np.prod(widths))


def main():
    """Segment volumes of several sizes and print a line per step and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[1, 4, 16], help="sizes of the volumes, in units")
    args = parser.parse_args()

    measured = {}

    def recorded(cfg, task):
        summary = run_blocks(cfg, task)
        log = (task.folder / "worker_0.log").read_text()
        seconds = [float(found) for found in re.findall(r"^block \d+: ([\d.]+) s", log, re.MULTILINE)]
        measured[task.name] = np.mean(seconds[1:]), summary.peak_memory, summary.blocks
        return summary

    large.run_blocks = recorded
    affinities, rows, first = unit_affinities(), [], {}
    for units in args.units:
        with tempfile.TemporaryDirectory() as home:
            os.chdir(home)
            settings = {
                "DATA.HOME": home,
                "TRAIN.CHECKPOINT": f"{home}/run/model_checkpoint_1",
                "SYSTEM.NUM_WORKERS": 1,
                "INS_SEGMENT.BLOCK_SIZE": (BLOCK,) * 3,
                "INS_SEGMENT.CONTEXT": (CONTEXT,) * 3,
                "INS_SEGMENT.EPSILON_AGGLOMERATE": 0.0,
                "INS_SEGMENT.MERGE_FUNCTION": MERGE_FUNCTION,
            }
            cfg = load_config(overrides=[str(part) for item in settings.items() for part in item])
            sample = data_folder(cfg, "test") / "volume.zarr"
            place = {"voxel_size": (8, 8, 8), "offset": (0, 0, 0)}
            tiled = np.tile(affinities, (1, units, 1, 1))
            write_array(sample, "volumes/raw", tiled[0], **place)
            write_array(output_path(cfg, sample), "volumes/pred_affs", tiled, **place)
            large.extract_fragments_blockwise(cfg)
            large.agglomerate_blockwise(cfg)
            large.find_segments(cfg, MERGE_FUNCTION, 0.5)
            large.extract_segmentation(cfg, MERGE_FUNCTION, 0.5)
            for name, (seconds, memory, blocks) in measured.items():
                seconds /= voxels_read(tiled.shape[1:], 0 if name.startswith("segmentation") else CONTEXT) / 1e6
                first.setdefault(name, (seconds, memory))
                rows.append((name.split("_")[0], units, blocks, seconds, memory, first[name]))
    print(COLUMNS.format("step", "units", "blocks", "s per Mvoxel", "ratio", "peak memory ratio"))
    for name, units, blocks, seconds, memory, (seconds_1, memory_1) in rows:
        print(
            COLUMNS.format(
                name,
                units,
                blocks,
                f"{seconds:.3f}",
                f"{seconds / seconds_1:.2f}",
                f"{memory / memory_1:.2f}",
            )
        )


if __name__ == "__main__":
    main()
