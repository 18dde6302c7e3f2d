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
slows down or speeds up does not matter. Ratios are relative to the smallest volume.
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
COLUMNS = "{:<16}{:>6}{:>8}{:>16}{:>8}{:>18}{:>8}"


def measure(units: int, raw: NDArray[np.uint8], affinities: NDArray[np.uint8]) -> dict[str, tuple[float, float]]:
    """Run all steps on a volume.

    Args:
        units: size of the volume.
        raw: two layers of blocks, repeated along z.
        affinities: of `raw`.

    Returns:
        Step -> seconds and bytes, both per voxel.
    """
    voxels = units * UNIT_BLOCKS * BLOCK**3
    measured: dict[str, tuple[float, float]] = {}

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
    add_options(parser)
    args = parser.parse_args()

    raw, affinities = phantom_with_affinities(2 * BLOCK)  # two layers
    runs = [(units, measure(units, raw, affinities)) for units in [*args.units, *args.units[-2::-1]]]
    print(COLUMNS.format("step", "units", "blocks", "CPU s/Mvoxel", "ratio", "bytes per voxel", "ratio"))
    for step in runs[0][1]:
        costs = {units: np.mean([run[step] for size, run in runs if size == units], axis=0) for units in args.units}
        for units, (seconds, memory) in costs.items():
            ratios = [f"{ratio:.2f}" for ratio in costs[units] / costs[args.units[0]]]
            blocks = units * UNIT_BLOCKS
            print(COLUMNS.format(step, units, blocks, f"{seconds * 1e6:.4f}", ratios[0], f"{memory:.4g}", ratios[1]))
    add_rows(Rows(args.json), runs)


def add_rows(rows: Rows, runs: Sequence[tuple[int, dict[str, tuple[float, float]]]]) -> None:
    """Add a row for each step and size. Each run of a size is compared with the smallest volume before or after it."""
    smallest, middle = runs[0][0], len(runs) // 2
    for step in runs[0][1]:
        for units in sorted({size for size, _ in runs} - {smallest}):
            at = [n for n, (size, _) in enumerate(runs) if size == units]
            pairs = [(n, side) for n in at for side in (0, -1) if n == middle or (n < middle) == (side == 0)]
            what, than = (f"{size * UNIT_BLOCKS} blocks" for size in (units, smallest))
            for measure, unit, factor in ((0, "CPU s/Mvoxel", 1e6), (1, "bytes/voxel", 1)):
                costs = [factor * runs[n][1][step][measure] for n, _ in pairs]
                others = [factor * runs[side][1][step][measure] for _, side in pairs]
                rows.add(f"{step}, {what}", costs, than, others, unit=unit, goal=CONSTANT)


if __name__ == "__main__":
    main()
