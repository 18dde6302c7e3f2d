"""Time a training step against the bare forward and backward pass, and what a worker needs for its batch.

    python benchmarks/training.py -c config_fib25.py

A step is everything the training process does with a batch: targets and weights, losses, gradients, Adam and the
average of the weights. The bare pass sums up the outputs instead of computing a loss. Both get the same batch of a
phantom. Times are CPU seconds of one thread (seconds on a GPU): the median of --repeats, taken in turns.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.engine.device import Precision
from lsdseg.engine.training.pipeline import TrainingBatch, training_batches
from lsdseg.engine.training.ranks import Ranks
from lsdseg.engine.training.train import seed_everything
from lsdseg.engine.training.trainer import Trainer
from ratios import Rows, add_options, in_turns

PHANTOM = (160, 160, 160)
PATCHES = 20
PRECISIONS = {"no": "float32", "bf16": "bf16"}


def main() -> None:
    """Print one row for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="config_fib25.py")
    add_options(parser, repeats=7)
    parser.add_argument("options", nargs="*", help="KEY VALUE pairs")
    args = parser.parse_args()
    rows = Rows(args.json)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = load_config(args.config, ["SYSTEM.NUM_WORKERS", "0", *args.options])
    batch, making = made_batch(cfg)
    print(f"a worker takes {making:.2f} CPU s for a batch of {batch.raw.shape[0]} x {batch.raw.shape[2:]} voxels")
    print(f"{'precision':>9} {'bare (s)':>9} {'step (s)':>9} {'ratio':>6} {'(least to most)':>16} {'workers':>8}")
    for name in PRECISIONS:
        bare, steps = timed_steps(cfg, Precision(name, device), batch, args.repeats)
        voxels = " x ".join(map(str, (batch.raw.shape[0], *batch.raw.shape[2:])))
        about = f"a batch of {voxels} voxels, {PRECISIONS[name]}"
        row = rows.add(f"training step, {about}", steps, "bare forward and backward pass", bare, goal=1.1)
        spread = f"({row['least']:.2f} to {row['most']:.2f})"
        print(
            f"{name:>9} {row['other_cost']:9.3f} {row['cost']:9.3f} {row['ratio']:6.2f} "
            f"{spread:>16} {math.ceil(making / row['cost']):8}",
            flush=True,
        )


def made_batch(cfg: CfgNode) -> tuple[TrainingBatch, float]:
    """Return a batch of a phantom, and the CPU seconds that one takes on average."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phantom.zarr"
        write_phantom(path, PHANTOM, seed=0, voxel_size=cfg.MODEL.VOXEL_SIZE)
        create_labels_mask(path)
        with training_batches(cfg, [path], tuple(task_channels(cfg))) as batches:
            batch = next(batches)
            began = time.process_time()
            for _ in range(PATCHES):
                next(batches)
            return batch, (time.process_time() - began) / PATCHES


def timed_steps(
    cfg: CfgNode, precision: Precision, batch: TrainingBatch, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of bare passes and of training steps, after one of each that is not counted."""
    seed_everything(0)
    trainer = Trainer(cfg, precision, Ranks())
    trainer.prepare()
    raw = precision.place(torch.from_numpy(batch.raw))

    def bare() -> None:
        with precision.autocast():
            outputs = trainer.model(raw)
        sum(output.float().sum() for output in outputs).backward()

    def step() -> None:
        trainer.run_iteration([batch], 0)

    bare_times, step_times = in_turns(repeats + 1, *(partial(seconds, run, precision.device) for run in (bare, step)))
    return bare_times[1:], step_times[1:]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


if __name__ == "__main__":
    main()
