"""Convert HDF5 to zarr: python data_utils/hdf_to_zarr.py IN.hdf OUT.zarr --sections 0:130"""

from pathlib import Path

from lsdseg.cli import command_parser, run_command
from lsdseg.data_utils.hdf import hdf_to_zarr, left_out, open_hdf, parse_sections, parts_of, targets_of
from lsdseg.data_utils.volumes import list_arrays, open_array


def main():
    """Convert one or several files."""
    parser = command_parser(
        "Copy CREMI-layout HDF5 files (volumes/raw, volumes/labels/neuron_ids ...) to zarrs.",
        "python data_utils/hdf_to_zarr.py sample_A.hdf train/sample_A.zarr --sections 0:100",
    )
    parser.add_argument("sources", metavar="IN.hdf", nargs="+", type=Path)
    parser.add_argument("output", metavar="OUT", type=Path, help="OUT.zarr, or a folder for IN.zarr")
    parser.add_argument("--sections", metavar="A:B", default=":", help="sections A to B - 1 only")
    resolution_help = "z y x in nm, for datasets without attribute resolution"
    parser.add_argument("--resolution", type=float, nargs=3, metavar=("Z", "Y", "X"), help=resolution_help)
    parser.add_argument("--overwrite", action="store_true", help="replace zarrs that exist")
    run_command(parser, convert)


def convert(arguments):
    """Look at all files before the first one is converted."""
    sections = parse_sections(arguments.sections)
    targets = targets_of(arguments.sources, arguments.output, arguments.overwrite)
    for source in arguments.sources:
        with open_hdf(source) as file:
            for name in left_out(file, parts_of(file, sections, arguments.resolution)):
                print(f"{source}: left out {name}: it is not a volume, or outside the sections")
    for source, target in zip(arguments.sources, targets, strict=True):
        hdf_to_zarr(source, target, sections=sections, resolution=arguments.resolution)
        for name in list_arrays(target):
            array = open_array(target, name)
            print(f"{target}: {name} {array.dtype} {array.shape}, {tuple(array.offset)} nm")


if __name__ == "__main__":
    main()
