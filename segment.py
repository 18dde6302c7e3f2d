"""Segment a volume with the shipped weights: python segment.py volume.zarr (or `make segment RAW=volume.zarr`).

A network works on voxels of one size. The volume is rescaled to that size, and the segmentation back to the voxels of
the volume. The script prints and runs commands that a user could type in the checkout. Run it again after an
interruption or with other settings: it does what is left, and what has changed.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.cli import call_script, run_script
from lsdseg.config.loader import dump_config, find_config, load_config
from lsdseg.engine.blocks.lock import run_lock
from lsdseg.engine.chain import Chain, conversion, converted, fits_in_memory, is_other_format, keep_volume
from lsdseg.engine.estimate import show_estimates
from lsdseg.engine.evaluate.figure import draw_sample
from lsdseg.engine.predict.check import check_before_segmenting
from lsdseg.errors import UserError


def main(_cfg: CfgNode | None, args: Namespace) -> None:
    """Write `volumes/segmentation_050` (uint64) for each threshold on the voxels of raw, and pictures beside the zarr.

    A volume in another format is first copied to a zarr in the work folder.

    The config is loaded anew, with a work folder as DATA.HOME. The output keeps the segmentations at other thresholds.
    """
    if not args.raw:
        raise UserError("no volume: python segment.py volume.zarr")
    raw = Path(args.raw).absolute()
    out = Path(args.out or raw.with_name(f"{raw.stem}_segmentation.zarr")).absolute()
    work = out.with_name(f"{out.stem}_work")
    config = ("-c", str(find_config(args.config)), *args.overrides, "DATA.HOME", str(work))
    cfg = load_config(config[1], config[2:])
    if is_other_format(raw) and args.dry_run:
        raise UserError(f"--dry-run needs a zarr: convert {raw} with data_utils/to_zarr.py first")
    if is_other_format(raw):
        with run_lock(work / "lock", f"in {work}"):
            keep_volume(work, raw)
            for script, *arguments in conversion(raw, work, cfg.DATA.RAW, args.resolution):
                call_script(script, *arguments)
        raw = converted(work)
    chain = Chain(cfg, raw, out, config, blockwise=args.blockwise)
    check_before_segmenting(raw, out, cfg, list(chain.results))
    chain = Chain(cfg, raw, out, config, blockwise=args.blockwise or not fits_in_memory(cfg, raw))
    if args.dry_run:
        show_estimates(chain)
        return
    with run_lock(work / "lock", f"in {work}"):
        keep_volume(work, Path(args.raw).absolute())
        folder = None
        if chain.blockwise:  # logs are written to the current folder, so workers get a config without relative paths
            folder, config = work, ("-c", str(work / "config.yaml"))
            dump_config(cfg, config[1])
            if cfg.DATA.DB_HOST:  # the file does not hold its credentials
                os.environ.setdefault("LSD_DB_URI", cfg.DATA.DB_HOST)
            chain = Chain(cfg, raw, out, config, blockwise=True)
            print(f"python status.py {work} shows how far it is")
        for script, *arguments in chain.commands():
            call_script(script, *arguments, cwd=folder)
    print()
    for name, (made, _) in chain.results.items():
        picture = out.with_name(f"{out.stem.removesuffix('_segmentation')}_{name.removeprefix('volumes/')}.png")
        draw_sample(chain.sample, made, picture)
        print(f"{out}/{name}, on the voxels of {raw}/{cfg.DATA.RAW}; a section of it is in {picture}")
    print(f"affinities are in {chain.sample.output}; delete {work} if you do not need them")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the input and the output."""
    parser.add_argument("--raw", metavar="VOLUME", help="the volume, if it is not the first word")
    parser.add_argument("--out", metavar="ZARR", help="zarr to write (default: NAME_segmentation.zarr beside --raw)")
    size = "voxel size in nm, of a TIFF that does not say"
    parser.add_argument("--resolution", nargs=3, metavar=("Z", "Y", "X"), help=size)
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and do nothing")
    parser.add_argument("--blockwise", action="store_true", help="work block by block even if memory is large enough")


if __name__ == "__main__":
    run_script(
        main,
        description="Segment an isotropic volume (a zarr, or what data_utils/to_zarr.py reads), at each of "
        "INS_SEGMENT.THRESHOLDS.",
        example="python segment.py volume.zarr DATA.RAW volumes/em INS_SEGMENT.THRESHOLDS 0.6",
        default_config="pretrained/config_fib25.py",
        add_arguments=add_arguments,
        first="raw",
    )
