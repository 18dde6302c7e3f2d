"""Convert a volume to zarr: python data_utils/to_zarr.py raw.tif train/sample.zarr --labels labels.tif"""

from pathlib import Path

from lsdseg.cli import add_conversion, command_parser, deferred, run_command
from lsdseg.data_utils.formats import FOLDERS, FORMATS

convert_volume = deferred("lsdseg.data_utils.convert:convert_volume")


def main() -> None:
    """Convert one volume, and perhaps its labels."""
    folders = ", ".join(dict.fromkeys(name for name, _ in FOLDERS.values()))
    parser = command_parser(
        f"Copy a volume to a zarr: a file ({', '.join(FORMATS)}), a folder of TIFFs, or {folders}.",
        "python data_utils/to_zarr.py raw.tif train/sample.zarr --labels labels.tif --resolution 40 4 4",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="the volume")
    parser.add_argument("target", metavar="OUT.zarr", type=Path, help="the zarr to write")
    parser.add_argument("--labels", metavar="IN", type=Path, help="neuron labels on the same voxels, in any format")
    parser.add_argument("--dataset", metavar="NAME", help="the dataset of IN that is raw, if it holds several")
    add_conversion(parser)
    run_command(parser, lambda arguments: convert_volume(**vars(arguments)))


if __name__ == "__main__":
    main()
