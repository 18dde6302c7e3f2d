"""Time a training step against the bare forward and backward pass, and what a worker needs for its batch.

    python benchmarks/training.py -c config_fib25.py

A step is everything the training process does with a batch: targets and weights, losses, gradients, Adam and the
average of the weights. The bare pass sums up the outputs instead of computing a loss. Both get the same batch of a
phantom. Times are CPU seconds of one thread (seconds on a GPU): the median of --repeats, taken in turns.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
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

PHANTOM = (160, 160, 160)
PATCHES = 20


def main() -> None:
    """Print one row for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="config_fib25.py")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("options", nargs="*", help="KEY VALUE pairs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = load_config(args.config, ["SYSTEM.NUM_WORKERS", "0", *args.options])
    batch, making = made_batch(cfg)
    print(f"a worker takes {making:.2f} CPU s for a batch of {batch.raw.shape[0]} x {batch.raw.shape[2:]} voxels")
    print(f"{'precision':>9} {'bare (s)':>9} {'step (s)':>9} {'ratio':>6} {'(least to most)':>16} {'workers':>8}")
    for name in ("no", "bf16"):
        bare, steps = timed_steps(cfg, Precision(name, device), batch, args.repeats)
        ratios = sorted(step / pure for step, pure in zip(steps, bare, strict=True))
        step = statistics.median(steps)
        print(
            f"{name:>9} {statistics.median(bare):9.3f} {step:9.3f} {statistics.median(ratios):6.2f} "
            f"{f'({ratios[0]:.2f} to {ratios[-1]:.2f})':>16} {math.ceil(making / step):8}",
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

    bare_times, step_times = [], []
    for _ in range(repeats + 1):
        bare_times.append(seconds(bare, precision.device))
        step_times.append(seconds(lambda: trainer.run_iteration([batch], 0), precision.device))
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
