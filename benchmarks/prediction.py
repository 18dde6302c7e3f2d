"""Time a tile of a network with "same" padding, and the prediction of a volume against it.

    python benchmarks/prediction.py -c config_fib25.py --tile 104 --volume 250

First, a forward pass of all of the input against only what the tile depends on: CPU seconds of one thread (seconds on a
GPU), the median of --repeats, taken in turns, with random weights. The numbers that come out are compared, too. Then
the prediction of a phantom on disk, reading and writing included, with one view and with eight: the voxels that it
predicts in a second, against those of the bare forward pass of its tile in the fastest precision. --against adds
predicter.py of another checkout of this repository, on the same volume. All three are started as a user starts them, in
turns, --repeats times.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.data_utils.layout import data_folder
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.data_utils.volumes import open_array
from lsdseg.engine.device import Precision
from lsdseg.engine.predict.tile_size import tile_voxels
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.models import build_model
from ratios import Rows, add_options, in_turns, wall_seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the time of a call, in seconds."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="config_fib25.py")
    parser.add_argument("--tile", type=int, default=104, help="voxels along each axis, a multiple of the down-sampling")
    parser.add_argument("--volume", type=int, default=0, help="voxels of the volume along each axis; 0: none")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    add_options(parser, repeats=2)
    args = parser.parse_args()
    rows = Rows(args.json)
    time_tile(args, rows)
    if args.volume:
        time_volume(args, rows)


def time_tile(args: argparse.Namespace, rows: Rows) -> None:
    """Print one row for each precision."""
    cfg = load_config(args.config)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inside = tuple((context, context + args.tile) for context in cfg.MODEL.CONTEXT)
    print(f"{'precision':>9} {'all (s)':>9} {'tile (s)':>9} {'ratio':>6} {'difference':>11}")
    for name, words in {"no": "float32", "bf16": "bf16"}.items():
        precision = Precision(name, device)
        model = precision.place(build_model(cfg)).eval()
        x = precision.place(torch.rand(1, 1, *(args.tile + 2 * context for context in cfg.MODEL.CONTEXT)))
        with torch.inference_mode(), precision.autocast():
            whole = model(x).affs[0][:, *(slice(*ends) for ends in inside)]
            difference = (whole - model(x, inside).affs[0]).abs().max().item()
            passes = [lambda m=model, x=x: m(x, inside), lambda m=model, x=x: m(x)]
            needed, everything = in_turns(args.repeats, *(partial(timed, run, device) for run in passes))
        row = rows.add(f"forward pass for a tile of {args.tile}^3, {words}", needed, "all of its input", everything)
        print(
            f"{name:>9} {row['other_cost']:9.2f} {row['cost']:9.2f} {1 / row['ratio']:6.2f} {difference:11.1e}",
            flush=True,
        )


def time_volume(args: argparse.Namespace, rows: Rows) -> None:
    """Print one row for each way to predict a volume."""
    with tempfile.TemporaryDirectory() as folder:
        keys = ["DATA.HOME", folder, "DATA.DROP_DS_MONGOTABLE", "True", "TRAIN.MIXED_PRECISION", "auto"]
        cfg = load_config("pretrained/config_fib25.py", keys)
        path = data_folder(cfg, "test") / "phantom.zarr"
        write_phantom(path, (args.volume,) * 3, seed=0, voxel_size=cfg.MODEL.VOXEL_SIZE)
        commands = {"one view": (CHECKOUT, []), "eight views": (CHECKOUT, ["DATA.VIEWS", "8"])}
        if args.against:
            commands[f"{args.against.name}, one view"] = (args.against.absolute(), [])

        def predicter(checkout: Path, more: list[str]) -> float:
            command = [sys.executable, "predicter.py", "-c", "pretrained/config_fib25.py", *keys, *more]
            # Each checkout must import its own code.
            options = {"cwd": checkout, "env": environment(checkout), "check": True, "capture_output": True}
            return wall_seconds(subprocess.run, command, **options)

        sides = [partial(bare_seconds, cfg, path), *(partial(predicter, *command) for command in commands.values())]
        bare, *others = in_turns(args.repeats, *sides)
    print(f"\n{'':>24} {'Mvoxel/s':>9} {'of bare':>8} {'(least to most)':>16}")
    print(f"{'bare forward pass':>24} {args.volume**3 / statistics.median(bare) / 1e6:9.3f} {1:8.2f}")
    for name, seconds in zip(commands, others, strict=True):
        goal = 1.11 if name == "one view" and args.volume >= 250 else None  # in a small volume, start-up is most of it
        about = f"predicter.py, {args.volume}^3 voxels, {name}"
        row = rows.add(about, seconds, "bare forward pass of its tiles", bare, goal=goal)
        spread = f"({1 / row['most']:.2f} to {1 / row['least']:.2f})"
        print(f"{name:>24} {args.volume**3 / row['cost'] / 1e6:9.3f} {1 / row['ratio']:8.2f} {spread:>16}")


def environment(checkout: Path) -> dict[str, str]:
    """Return the environment variables with which a checkout imports its own code."""
    return os.environ | {"PYTHONPATH": str(checkout)}


def bare_seconds(cfg: CfgNode, path: Path) -> float:
    """Return the seconds that as many forward passes take as the voxels of a volume need, without reading and writing.

    Tiles reach beyond the end of a volume whose size is no multiple of the down-sampling; here, they do not.
    """
    raw = open_array(path, cfg.DATA.RAW)
    predictor = TilePredictor(cfg)
    tile = tile_voxels(cfg, raw.shape)
    voxels = predictor.read(raw, (0, 0, 0), tile)
    box = tuple((context, context + size) for context, size in zip(predictor.context, tile, strict=True))
    inputs = predictor.precision.place(torch.from_numpy(np.ascontiguousarray(voxels))[None, None])
    with torch.inference_mode(), predictor.precision.autocast():
        began = time.perf_counter()
        predictor.model(inputs, box)
        if predictor.precision.device.type == "cuda":
            torch.cuda.synchronize(predictor.precision.device)
        return (time.perf_counter() - began) * math.prod(raw.shape) / math.prod(tile)


if __name__ == "__main__":
    main()
