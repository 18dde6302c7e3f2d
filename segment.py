"""Segment a volume with the shipped weights: python segment.py volume.zarr (or `make segment RAW=volume.zarr`).

A network works on voxels of one size. A volume with others is rescaled to that size, and the segmentation back to the
voxels of the volume. The script prints and runs commands that a user could type in the checkout. Run it again after an
interruption or with other settings: it does what is left, and what has changed.
"""

from argparse import ArgumentParser, Namespace

from yacs.config import CfgNode

from lsdseg.cli import call_script, deferred, run_script
from lsdseg.errors import UserError

segment_volume = deferred("lsdseg.engine.segmenting:segment_volume")


def main(_cfg: CfgNode | None, args: Namespace) -> None:
    """Segment the volume; the config is loaded anew, with a work folder as DATA.HOME."""
    if not args.raw:
        raise UserError("no volume: python segment.py volume.zarr")
    options = {name: getattr(args, name) for name in ("out", "resolution", "blockwise", "skip_failed", "dry_run")}
    segment_volume(args.raw, args.config, args.overrides, call=call_script, **options)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the input and the output."""
    parser.add_argument("--raw", metavar="VOLUME", help="the volume, in place of the first word")
    parser.add_argument("--out", metavar="ZARR", help="zarr to write (default: NAME_segmentation.zarr beside --raw)")
    size = "voxel size in nm, z y x, of a volume that states none or a wrong one"
    parser.add_argument("--resolution", nargs=3, metavar=("Z", "Y", "X"), help=size)
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and do nothing")
    parser.add_argument("--skip-failed", action="store_true", help="go on without blocks that fail every time")
    parser.add_argument("--blockwise", action="store_true", help="work block by block even if memory is large enough")


if __name__ == "__main__":
    run_script(
        main,
        description="Segment an isotropic volume, a path or a URL (zarr, OME-Zarr, N5, precomputed, HDF5, TIFF), "
        "at each of INS_SEGMENT.THRESHOLDS.",
        example="python segment.py volume.zarr DATA.RAW volumes/em INS_SEGMENT.THRESHOLDS 0.6",
        default_config="pretrained/config_fib25.py",
        add_arguments=add_arguments,
        first="raw",
    )
