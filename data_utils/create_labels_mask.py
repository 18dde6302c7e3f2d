"""Write masks of labeled voxels: python data_utils/create_labels_mask.py train/*.zarr"""

from lsdseg.cli import command_parser, run_command
from lsdseg.data_utils.labels import create_labels_masks
from lsdseg.data_utils.layout import LABELS, LABELS_MASK


def main() -> None:
    """Write the masks of one or several zarrs."""
    parser = command_parser(
        "Write the labels mask of every zarr that has none.",
        "python data_utils/create_labels_mask.py CREMI/data_3d/train/*.zarr",
    )
    parser.add_argument("paths", metavar="ZARR", nargs="+")
    parser.add_argument("--labels", default=LABELS, help="dataset of the labels (default: %(default)s)")
    parser.add_argument("--mask", default=LABELS_MASK, help="dataset to write (default: %(default)s)")
    run_command(parser, lambda arguments: create_labels_masks(arguments.paths, arguments.labels, arguments.mask))


if __name__ == "__main__":
    main()
