"""Convert HDF5 to zarr: python data_utils/hdf_to_zarr.py IN.hdf OUT.zarr --sections 0:130"""

from pathlib import Path

from lsdseg.cli import argument, command_parser, run_command
from lsdseg.config.rules import number
from lsdseg.data_utils.convert import FORMATS, convert_files


def main() -> None:
    """Convert one or several files."""
    parser = command_parser(
        f"Copy files in CREMI's layout (volumes/raw, volumes/labels/neuron_ids ...) to zarrs: {', '.join(FORMATS)}.",
        "python data_utils/hdf_to_zarr.py sample_A.hdf train/sample_A.zarr --sections 0:100",
    )
    parser.add_argument("sources", metavar="IN", nargs="+", type=Path)
    parser.add_argument("output", metavar="OUT", type=Path, help="OUT.zarr, or a folder for one zarr per input")
    parser.add_argument("--sections", metavar="A:B", default=":", help="sections A to B - 1 only")
    resolution_help = "z y x in nm, for datasets without the attribute resolution"
    parser.add_argument(
        "--resolution", type=argument(number(0, above=True)), nargs=3, metavar=("Z", "Y", "X"), help=resolution_help
    )
    parser.add_argument("--overwrite", action="store_true", help="replace zarrs that exist")
    run_command(parser, lambda arguments: convert_files(**vars(arguments)))


if __name__ == "__main__":
    main()
