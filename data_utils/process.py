"""Prepare a volume for training: python data_utils/process.py OPERATION IN.zarr OUT.zarr"""

import argparse
from pathlib import Path

from lsdseg.cli import ID, argument, command_parser, deferred, run_command
from lsdseg.config.rules import choice, integer, number
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW

process_zarr = deferred("lsdseg.data_utils.process:process_zarr")

ZYX = ("Z", "Y", "X")
WIDTH = argument(integer(0, 10_000))


def main() -> None:
    """Do one operation."""
    parser = command_parser(
        "Write a zarr in which one dataset is changed. All others are copied as they are.",
        "python data_utils/process.py clahe sample.zarr train/sample.zarr",
    )
    operations = parser.add_subparsers(dest="operation", metavar="OPERATION", required=True)
    clahe = _operation(operations, "clahe", RAW, "even out the contrast within each section, or in 3D")
    clahe.add_argument(
        "--tile",
        nargs=3,
        metavar=ZYX,
        type=argument(integer(1, 4096)),
        default=(1, 128, 128),
        help="voxels whose histogram counts (default: 1 128 128)",
    )
    clahe.add_argument(
        "--limit",
        metavar="SHARE",
        type=argument(number(0, 1, above=True)),
        default=0.01,
        help="most of a tile in one of 256 gray values; lower is gentler (default: 0.01)",
    )
    match = _operation(operations, "match", RAW, "take over the histogram of another volume")
    match.add_argument("--to", dest="reference", metavar="ZARR", type=Path, required=True, help="the other volume")
    match.add_argument(
        "--to-dataset", dest="reference_dataset", metavar="NAME", default=RAW, help="its dataset (default: %(default)s)"
    )
    merge = _operation(operations, "merge", LABELS, "give several labels one id")
    merge.add_argument("--ids", nargs="+", metavar="ID", type=argument(ID), required=True, help="labels to change")
    merge.add_argument("--into", metavar="ID", type=argument(ID), required=True, help="the id that they get")
    small = _operation(operations, "remove-small", LABELS, "set labels with few voxels to 0")
    small.add_argument(
        "--voxels", metavar="N", type=argument(integer(1)), required=True, help="fewest that a label keeps its id with"
    )
    pieces = _operation(operations, "components", LABELS, "give parts of a label that do not touch ids of their own")
    pieces.add_argument("--connectivity", type=argument(choice(6, 18, 26)), default=26, help="6, 18 or 26 (default)")
    pad = _operation(operations, "pad", RAW, "add voxels on every side")
    pad.add_argument(
        "--by", nargs=3, metavar=ZYX, type=WIDTH, required=True, help="voxels to add at either end of an axis"
    )
    modes = "reflect (mirror, the default), edge (repeat the last voxel) or constant (0)"
    pad.add_argument("--mode", type=argument(choice("reflect", "edge", "constant")), default="reflect", help=modes)
    crop = _operation(operations, "crop", LABELS, "cut all datasets to the labeled box, raw with context")
    crop.add_argument("--raw", metavar="NAME", default=RAW, help="dataset that keeps context (default: %(default)s)")
    crop.add_argument(
        "--mask", metavar="NAME", default=LABELS_MASK, help="dataset that says what is labeled (default: %(default)s)"
    )
    crop.add_argument(
        "--context",
        nargs=3,
        metavar=ZYX,
        type=WIDTH,
        default=(100, 100, 100),
        help="voxels of raw to keep around the box (default: 100 100 100)",
    )
    run_command(parser, lambda arguments: process_zarr(**vars(arguments)), intermixed=False)


def _operation(operations: argparse._SubParsersAction, name: str, dataset: str, text: str) -> argparse.ArgumentParser:
    """Add an operation with the options that all of them have."""
    parser: argparse.ArgumentParser = operations.add_parser(name, help=text, description=text)
    parser.add_argument("source", metavar="IN.zarr", type=Path, help="the zarr to read")
    parser.add_argument("target", metavar="OUT.zarr", type=Path, help="the zarr to write")
    parser.add_argument("--dataset", metavar="NAME", default=dataset, help="dataset to change (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a zarr that exists")
    return parser


if __name__ == "__main__":
    main()
