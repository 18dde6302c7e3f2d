"""Write masks of what is labeled: python data_utils/create_labels_mask.py train/*.zarr"""

from lsdseg.cli import command_parser, run_command
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import LABELS, LABELS_MASK
from lsdseg.data_utils.volumes import open_array


def main():
    """Make the masks of several zarrs."""
    parser = command_parser(
        "Write the labels mask of every zarr that has none.",
        "python data_utils/create_labels_mask.py CREMI/data_3d/train/*.zarr",
    )
    parser.add_argument("paths", metavar="ZARR", nargs="+")
    parser.add_argument("--labels", default=LABELS, help="dataset of the labels (default: %(default)s)")
    parser.add_argument("--mask", default=LABELS_MASK, help="dataset to write (default: %(default)s)")
    run_command(parser, create)


def create(arguments):
    """Look at all zarrs before the first one is changed."""
    for path in arguments.paths:
        open_array(path, arguments.labels)
    for path in arguments.paths:
        made = create_labels_mask(path, arguments.labels, arguments.mask)
        print(f"{path}: {arguments.mask} {'written' if made else 'is there already'}")


if __name__ == "__main__":
    main()
