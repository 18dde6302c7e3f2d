"""Measure the cost per voxel of each blockwise step, for volumes of 1, 4 and 16 units. If it is constant, steps scale.

    python benchmarks/blockwise.py --units 1 4 16

A unit is 6 layers of 2 x 2 blocks of 48^3 voxels, and volumes grow along z. Blocks at the faces of a volume cost less,
because they have less context to read and fewer fragments in it, and a small volume has more such blocks. With six
layers, and a context as small relative to the block as by default, this hardly matters. Costs are therefore simply
divided by the number of voxels.

Seconds are CPU seconds of the one worker, without its start and without its first block, which loads compiled code.
Bytes are its peak memory per voxel of a block, because it holds one block at a time. Look-up tables (nine thresholds)
are made by the master from the whole graph. For them, CPU seconds and the peak memory of Python and NumPy are per voxel
of the volume. Sizes run in the order 1, 4, 16, 4, 1, and the two runs of a size are averaged, so that a machine that
slows down or speeds up does not matter. With --repeats 2, that goes on with 4, 16, 4, 1. Ratios are relative to the
smallest volume; those of --json are relative to its run before or after, or to both for the largest volume.
"""

import argparse
import os
import re
import tempfile
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import data_folder, output_path
from lsdseg.data_utils.volumes import open_array, write_array
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.step import BlockStep, Summary
from lsdseg.engine.post.steps import edges, fragments, relabel
from lsdseg.engine.post.steps.tables import find_segments
from lsdseg.engine.predict import blockwise as predict
from lsdseg.models import build_model
from lsdseg.models.checkpoint import save_untrained
from made_up import phantom_with_affinities
from ratios import Rows, add_options

BLOCK, LAYERS = 48, 6
UNIT_BLOCKS = LAYERS * 2 * 2
CONSTANT = 1.05  # a step scales whose cost per voxel grows by less from volume to volume
MERGE_FUNCTION, THRESHOLD = "hist_quant_75", 0.5
SETTINGS = {
    "SYSTEM.NUM_WORKERS": 1,
    "TRAIN.DEVICE": "cpu",
    "TRAIN.THREADS": 1,
    "TRAIN.MIXED_PRECISION": "auto",
    "MODEL_ISO.NUM_FMAPS": 4,
    "MODEL_ISO.NUM_FMAPS_OUT": 4,
    "MODEL_ISO.FMAP_INC_FACTOR": 2,
    "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2]],
    "MODEL_ISO.KERNEL_SIZE_DOWN": None,
    "MODEL_ISO.KERNEL_SIZE_UP": None,
    "MODEL_ISO.INPUT_SHAPE": (64, 64, 64),  # 48 out
    "MODEL_ISO.GROW_INPUT": (0, 0, 0),
    "INS_SEGMENT.BLOCK_SIZE": (BLOCK,) * 3,
    "INS_SEGMENT.CONTEXT": (4, 4, 4),
    "INS_SEGMENT.EPSILON_AGGLOMERATE": 0.0,
    "INS_SEGMENT.MERGE_FUNCTION": MERGE_FUNCTION,
}
# Step -> seconds and bytes, both per voxel.
Costs = dict[str, tuple[float, float]]
COLUMNS = "{:<16}{:>6}{:>8}{:>16}{:>8}{:>18}{:>8}"


def measure(units: int, raw: NDArray[np.uint8], affinities: NDArray[np.uint8]) -> Costs:
    """Run all steps on a volume.

    Args:
        units: size of the volume.
        raw: two layers of blocks, repeated along z.
        affinities: of `raw`.

    Returns:
        Step -> seconds and bytes, both per voxel.
    """
    voxels = units * UNIT_BLOCKS * BLOCK**3
    measured: Costs = {}

    def measured_run(cfg: CfgNode, block_step: BlockStep) -> Summary:
        summary = run_blocks(cfg, block_step)
        log = (block_step.folder / "worker_0.log").read_text(encoding="utf-8")
        seconds = [float(found) for found in re.findall(r"^block .* ([\d.]+) s CPU$", log, re.MULTILINE)]
        step = block_step.name.partition("_")[0]
        measured[step] = float(np.mean(seconds[1:])) / BLOCK**3, summary.peak_memory / BLOCK**3
        return summary

    for module in (predict, fragments, edges, relabel):
        vars(module)["run_blocks"] = measured_run
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        paths = {"DATA.HOME": home, "TRAIN.CHECKPOINT": f"{home}/run/model_checkpoint_1"}
        cfg = load_config(overrides=[str(part) for item in (SETTINGS | paths).items() for part in item])
        torch.manual_seed(0)
        save_untrained(cfg.TRAIN.CHECKPOINT, build_model(cfg), cfg)
        sample = data_folder(cfg, "test") / "volume.zarr"
        repeats = units * LAYERS // 2
        write_array(sample, "volumes/raw", np.tile(raw, (repeats, 1, 1)), voxel_size=(8, 8, 8), offset=(0, 0, 0))

        predict.predict_blockwise(cfg)
        predicted = open_array(output_path(cfg, sample), "volumes/pred_affs", "r+")
        for begin in range(0, predicted.shape[1], len(raw)):  # random weights predict no neurites
            predicted[:, begin : begin + len(raw)] = affinities
        fragments.extract_fragments_blockwise(cfg)
        edges.agglomerate_blockwise(cfg)
        find_segments(cfg, MERGE_FUNCTION, None)  # loads compiled code
        began = time.process_time()
        find_segments(cfg, MERGE_FUNCTION, None)
        seconds = time.process_time() - began
        tracemalloc.start()  # this slows the call down, so it is not the one that is timed
        find_segments(cfg, MERGE_FUNCTION, None)
        _, memory = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        measured["look-up tables"] = seconds / voxels, memory / voxels
        relabel.extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
    return measured


def main() -> None:
    """Run all steps on volumes of several sizes, and print a line per step and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--units", type=int, nargs="+", default=[1, 4, 16], help="sizes of the volumes, in units, ascending"
    )
    add_options(parser, repeats=1)
    args = parser.parse_args()
    rows = Rows(args.json)

    raw, affinities = phantom_with_affinities(2 * BLOCK)  # two layers
    up_and_down = [*args.units[1:], *args.units[-2::-1]]
    runs = [(units, measure(units, raw, affinities)) for units in [args.units[0], *args.repeats * up_and_down]]
    print(COLUMNS.format("step", "units", "blocks", "CPU s/Mvoxel", "ratio", "bytes per voxel", "ratio"))
    for step in runs[0][1]:
        costs = {units: np.mean([run[step] for size, run in runs if size == units], axis=0) for units in args.units}
        for units, (seconds, memory) in costs.items():
            ratios = [f"{ratio:.2f}" for ratio in costs[units] / costs[args.units[0]]]
            blocks = units * UNIT_BLOCKS
            print(COLUMNS.format(step, units, blocks, f"{seconds * 1e6:.4f}", ratios[0], f"{memory:.4g}", ratios[1]))
    add_rows(rows, runs, args.units)


def add_rows(rows: Rows, runs: Sequence[tuple[int, Costs]], sizes: Sequence[int]) -> None:
    """Add rows for each step and size: seconds, and bytes.

    Args:
        rows: where to.
        runs: (size, what `measure` returned), in the order in which they ran.
        sizes: all sizes, the smallest first.
    """
    top = len(sizes) - 1  # runs from the smallest volume to the largest
    pairs = []  # (size, costs, those of the smallest volume to compare with)
    for begin in range(0, len(runs) - 1, max(1, 2 * top)):
        first, last = runs[begin][1], runs[begin + 2 * top][1]
        for n in range(1, 2 * top):
            near = [first] * (n <= top) + [last] * (n >= top)
            pairs.append((*runs[begin + n], near))
    for step in runs[0][1]:
        for size in sizes[1:]:
            for place, (unit, factor) in enumerate({"CPU s/Mvoxel": 1e6, "bytes/voxel": 1}.items()):
                own = [factor * costs[step][place] for units, costs, _ in pairs if units == size]
                others = [factor * np.mean([c[step][place] for c in near]) for units, _, near in pairs if units == size]
                what, than = (f"{units * UNIT_BLOCKS} blocks" for units in (size, sizes[0]))
                rows.add(f"{step}, {what}", own, than, others, unit=unit, goal=CONSTANT)


if __name__ == "__main__":
    main()
