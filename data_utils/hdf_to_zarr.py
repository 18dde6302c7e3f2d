"""Convert HDF5 to zarr: python data_utils/hdf_to_zarr.py IN.hdf OUT.zarr --sections 0:130"""

from pathlib import Path

from lsdseg.cli import add_conversion, command_parser, deferred, run_command
from lsdseg.data_utils.formats import FORMATS

convert_files = deferred("lsdseg.data_utils.convert:convert_files")


def main() -> None:
    """Convert one or several files."""
    parser = command_parser(
        f"Copy files in CREMI's layout (volumes/raw, volumes/labels/neuron_ids ...) to zarrs: {', '.join(FORMATS)}.",
        "python data_utils/hdf_to_zarr.py sample_A.hdf train/sample_A.zarr --sections 0:100",
    )
    parser.add_argument("sources", metavar="IN", nargs="+", type=Path)
    parser.add_argument("output", metavar="OUT", type=Path, help="OUT.zarr, or a folder for one zarr per input")
    add_conversion(parser)
    run_command(parser, lambda arguments: convert_files(**vars(arguments)))


if __name__ == "__main__":
    main()
