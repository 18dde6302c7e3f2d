"""Time a tile of a network with "same" padding, and the prediction of a volume against it.

    python benchmarks/prediction.py -c config_fib25.py --tile 104 --volume 250

First, a forward pass of all of the input against only what the tile depends on: CPU seconds of one thread (seconds on a
GPU), the best of --repeats, with random weights. The numbers that come out are compared, too. Then the prediction of a
phantom on disk, reading and writing included, with one view and with eight: the voxels that it predicts in a second,
against those of the bare forward pass of its tile in the fastest precision. --against adds predicter.py of another
checkout of this repository, on the same volume. All three are started as a user starts them, in turns, --repeats times.
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


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the shortest time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - began)
    return min(times)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="config_fib25.py")
    parser.add_argument("--tile", type=int, default=104, help="voxels along each axis, a multiple of the down-sampling")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--volume", type=int, default=0, help="voxels of the volume along each axis; 0: none")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    args = parser.parse_args()
    time_tile(args)
    if args.volume:
        time_volume(args)


def time_tile(args: argparse.Namespace) -> None:
    """Print one row for each precision."""
    cfg = load_config(args.config)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inside = tuple((context, context + args.tile) for context in cfg.MODEL.CONTEXT)
    print(f"{'precision':>9} {'all (s)':>9} {'tile (s)':>9} {'ratio':>6} {'difference':>11}")
    for name in ("no", "bf16"):
        precision = Precision(name, device)
        model = precision.place(build_model(cfg)).eval()
        x = precision.place(torch.rand(1, 1, *(args.tile + 2 * context for context in cfg.MODEL.CONTEXT)))
        with torch.inference_mode(), precision.autocast():
            whole = model(x).affs[0][:, *(slice(*ends) for ends in inside)]
            difference = (whole - model(x, inside).affs[0]).abs().max().item()
            everything = timed(lambda m=model, x=x: m(x), args.repeats, device)
            needed = timed(lambda m=model, x=x: m(x, inside), args.repeats, device)
        print(f"{name:>9} {everything:9.2f} {needed:9.2f} {everything / needed:6.2f} {difference:11.1e}", flush=True)


def time_volume(args: argparse.Namespace) -> None:
    """Print one row for each way to predict a volume."""
    with tempfile.TemporaryDirectory() as folder:
        keys = ["DATA.HOME", folder, "DATA.DROP_DS_MONGOTABLE", "True", "TRAIN.MIXED_PRECISION", "auto"]
        cfg = load_config("pretrained/config_fib25.py", keys)
        path = data_folder(cfg, "test") / "phantom.zarr"
        write_phantom(path, (args.volume,) * 3, seed=0, voxel_size=cfg.MODEL.VOXEL_SIZE)
        rows: dict[str, list[float]] = {"bare forward pass": []}
        for _ in range(args.repeats):
            rows["bare forward pass"].append(bare_seconds(cfg, path))
            commands = {"one view": (CHECKOUT, []), "eight views": (CHECKOUT, ["DATA.VIEWS", "8"])}
            if args.against:
                commands[f"{args.against.name}, one view"] = (args.against.absolute(), [])
            for name, (checkout, more) in commands.items():
                began = time.perf_counter()
                command = [sys.executable, "predicter.py", "-c", "pretrained/config_fib25.py", *keys, *more]
                # Each checkout must import its own code.
                subprocess.run(command, cwd=checkout, env=environment(checkout), check=True, capture_output=True)
                rows.setdefault(name, []).append(time.perf_counter() - began)
    voxels = args.volume**3
    print(f"\n{'':>24} {'Mvoxel/s':>9} {'of bare':>8} {'(least to most)':>16}")
    for name, seconds in rows.items():
        ratios = sorted(bare / s for bare, s in zip(rows["bare forward pass"], seconds, strict=True))
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed = voxels / statistics.median(seconds) / 1e6
        print(f"{name:>24} {speed:9.3f} {statistics.median(ratios):8.2f} {spread:>16}")


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
