"""Convert HDF5 to zarr: python data_utils/hdf_to_zarr.py IN.hdf OUT.zarr --sections 0:130"""

import argparse
from pathlib import Path

from lsdseg.cli import add_conversion, command_parser, deferred, run_command
from lsdseg.data_utils.formats import FORMATS
from lsdseg.errors import UserError

convert_files = deferred("lsdseg.data_utils.convert:convert_files")
convert_folder = deferred("lsdseg.data_utils.convert:convert_folder")


def main() -> None:
    """Convert one or several files."""
    parser = command_parser(
        f"Copy files in CREMI's layout (volumes/raw, volumes/labels/neuron_ids ...) to zarrs: {', '.join(FORMATS)}.",
        "python data_utils/hdf_to_zarr.py sample_A.hdf train/sample_A.zarr --sections 0:100",
    )
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", type=Path, help="files, then OUT.zarr or a folder for one zarr each"
    )
    parser.add_argument("-d", dest="folder", metavar="FOLDER", type=Path, help="or: every HDF5 file in this folder")
    parser.add_argument("-od", dest="output", metavar="OUT", type=Path, help="folder for their zarrs, with -d")
    add_conversion(parser)
    run_command(parser, convert)


def convert(arguments: argparse.Namespace) -> None:
    """Convert the files that are named, or those in the folder."""
    options = vars(arguments)
    paths, folder, output = (options.pop(name) for name in ("paths", "folder", "output"))
    if folder and output and not paths:
        convert_folder(folder, output, **options)
    elif len(paths) > 1 and not folder and not output:
        convert_files(paths[:-1], paths[-1], **options)
    else:
        raise UserError("name files and where to write: IN.hdf OUT.zarr, or -d FOLDER -od FOLDER")


if __name__ == "__main__":
    main()
