"""Resample a volume: python data_utils/rescale.py IN.zarr OUT.zarr --voxel-size 10 10 10"""

from pathlib import Path

from lsdseg.cli import argument, command_parser, deferred, run_command
from lsdseg.config.rules import length
from lsdseg.data_utils.layout import RAW

rescale_zarr = deferred("lsdseg.data_utils.rescale:rescale_zarr")


def main() -> None:
    """Resample one dataset."""
    parser = command_parser(
        "Resample a volume to another voxel size, in nm and z, y, x order.",
        "python data_utils/rescale.py volume.zarr test/volume.zarr --voxel-size 10 10 10",
    )
    parser.add_argument("source", metavar="IN.zarr", type=Path, help="the zarr to read")
    parser.add_argument("target", metavar="OUT.zarr", type=Path, help="the zarr to write")
    parser.add_argument("--dataset", default=RAW, help="dataset to read (default: %(default)s)")
    parser.add_argument("--to", metavar="DATASET", help="dataset to write (default: the same name)")
    grid = parser.add_mutually_exclusive_group(required=True)
    grid.add_argument(
        "--voxel-size", type=argument(length), nargs=3, metavar=("Z", "Y", "X"), help="new voxel size in nm"
    )
    grid.add_argument("--like", nargs=2, metavar=("ZARR", "DATASET"), help="or: voxel size and ROI of this volume")
    parser.add_argument("--labels", action="store_true", help="for labels and masks: take the nearest voxel")
    parser.add_argument("--overwrite", action="store_true", help="replace a zarr that exists (with --add: a dataset)")
    parser.add_argument("--add", action="store_true", help="add the dataset to a zarr that exists")
    run_command(parser, lambda arguments: rescale_zarr(**vars(arguments)))


if __name__ == "__main__":
    main()
