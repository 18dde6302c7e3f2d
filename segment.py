"""Segment a volume with the shipped weights: python segment.py --raw volume.zarr (or `make segment RAW=volume.zarr`).

A network works on voxels of one size. The volume is rescaled to that size, and the segmentation back to the voxels of
the volume. The script prints and runs commands that a user could type in the checkout.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.cli import call_script, run_script
from lsdseg.config.loader import find_config, load_config
from lsdseg.data_utils.layout import data_folder, output_path
from lsdseg.engine.blocks.lock import run_lock
from lsdseg.engine.evaluate.figure import draw_sample
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.predict.check import check_before_segmenting
from lsdseg.engine.sample import Sample


def main(_cfg: CfgNode | None, args: Namespace) -> None:
    """Write `volumes/segmentation_050` (uint64) for each threshold on the voxels of raw, and pictures beside the zarr.

    The config is loaded anew, with a work folder as DATA.HOME. What was predicted there before is not predicted again,
    and the output keeps the segmentations at other thresholds.
    """
    raw = Path(args.raw).absolute()
    out = Path(args.out or raw.with_name(f"{raw.stem}_segmentation.zarr")).absolute()
    work = out.with_name(f"{out.stem}_work")
    config = ["-c", str(find_config(args.config)), *args.overrides, "DATA.HOME", str(work)]
    cfg = load_config(config[1], config[2:])
    names = list(method_of(cfg.INS_SEGMENT).segmentation_names(cfg.INS_SEGMENT).values())
    check_before_segmenting(raw, out, cfg, names)

    rescaled = data_folder(cfg, "test") / f"{out.stem}.zarr"
    predicted = output_path(cfg, rescaled)
    size = ["--voxel-size", *cfg.MODEL.VOXEL_SIZE, "--overwrite"]
    back = ["--like", raw, cfg.DATA.RAW, "--labels", "--add"]
    with run_lock(work / "lock", f"in {work}"):
        call_script("data_utils/rescale.py", raw, rescaled, "--dataset", cfg.DATA.RAW, *size)
        call_script("predicter.py", *config)
        call_script("instance_segmenter.py", *config)
        for name in names:
            call_script("data_utils/rescale.py", predicted, out, "--dataset", name, *back)
    print()
    for name in names:
        picture = out.with_name(f"{out.stem.removesuffix('_segmentation')}_{name.removeprefix('volumes/')}.png")
        draw_sample(Sample(cfg, rescaled), name, picture)
        print(f"{out}/{name}, on the voxels of {raw}/{cfg.DATA.RAW}; a section of it is in {picture}")
    print(f"affinities are in {predicted}; delete {work} if you do not need them")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the input and the output."""
    parser.add_argument("--raw", metavar="ZARR", required=True, help="the volume")
    parser.add_argument("--out", metavar="ZARR", help="zarr to write (default: NAME_segmentation.zarr beside --raw)")


if __name__ == "__main__":
    run_script(
        main,
        description="Segment DATA.RAW of an isotropic volume (--raw) into --out, at each of INS_SEGMENT.THRESHOLDS.",
        example="python segment.py --raw volume.zarr DATA.RAW volumes/em INS_SEGMENT.THRESHOLDS 0.6",
        default_config="pretrained/config_fib25.py",
        add_arguments=add_arguments,
    )
