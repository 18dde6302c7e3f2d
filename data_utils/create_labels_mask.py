"""Write masks of labeled voxels: python data_utils/create_labels_mask.py train/*.zarr"""

import argparse
from pathlib import Path

from lsdseg.cli import ID, argument, command_parser, deferred, run_command
from lsdseg.data_utils.layout import LABELS, LABELS_MASK
from lsdseg.errors import UserError

create_labels_masks = deferred("lsdseg.data_utils.labels:create_labels_masks")


def main() -> None:
    """Write the masks of one or several zarrs."""
    parser = command_parser(
        "Write the labels mask of every zarr that has none.",
        "python data_utils/create_labels_mask.py CREMI/data_3d/train/*.zarr",
    )
    parser.add_argument("paths", metavar="ZARR", nargs="*", type=Path, help="zarrs with labels")
    parser.add_argument("-dir", metavar="FOLDER", type=Path, help="or: every zarr in this folder")
    parser.add_argument(
        "-labels_ds", "--labels", dest="labels", default=LABELS, help="dataset of the labels (default: %(default)s)"
    )
    parser.add_argument("--mask", default=LABELS_MASK, help="dataset to write (default: %(default)s)")
    parser.add_argument("-bg_val", type=argument(ID), help="id of voxels that nobody has labeled, such as 0")
    run_command(parser, create)


def create(arguments: argparse.Namespace) -> None:
    """Write the masks of the zarrs that are named and of those in the folder."""
    paths = [*arguments.paths, *(sorted(arguments.dir.glob("*.zarr")) if arguments.dir else ())]
    if not paths:
        raise UserError(f"no zarr in {arguments.dir}: name a folder with zarrs" if arguments.dir else "name a zarr")
    create_labels_masks(paths, arguments.labels, arguments.mask, arguments.bg_val)


if __name__ == "__main__":
    main()
