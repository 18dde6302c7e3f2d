"""Time a tile of a network with "same" padding: all of the input against only what the tile depends on.

    python benchmarks/prediction.py -c config_fib25.py --tile 104

Times are CPU seconds of one thread (seconds on a GPU), the best of --repeats, with random weights. The numbers that
come out are compared, too.
"""

import argparse
import time
from collections.abc import Callable

import torch

from lsdseg.config.loader import load_config
from lsdseg.engine.device import Precision
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
    """Print one row for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="config_fib25.py")
    parser.add_argument("--tile", type=int, default=104, help="voxels along each axis, a multiple of the down-sampling")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
