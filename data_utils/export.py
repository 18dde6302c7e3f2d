"""Export a dataset to another format: python data_utils/export.py SAMPLE.zarr --to precomputed OUT"""

from pathlib import Path

from lsdseg.cli import command_parser, deferred, run_command
from lsdseg.data_utils.export_formats import FORMATS

export_dataset = deferred("lsdseg.data_utils.export:export_dataset")


def main() -> None:
    """Export one dataset."""
    formats = "\n".join(f"  {name}: {written_as.title}" for name, written_as in FORMATS.items())
    parser = command_parser(
        "Write one dataset of a zarr in another format: a segmentation, labels, raw, affinities.",
        "python data_utils/export.py SAMPLE.zarr --dataset volumes/segmentation_055 --to precomputed OUT",
        f"formats:\n{formats}",
    )
    parser.add_argument("source", metavar="SAMPLE.zarr", type=Path, help="the zarr to read")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument("--to", metavar="FORMAT", choices=FORMATS, required=True, help="one of the formats below")
    parser.add_argument("--dataset", metavar="NAME", help="dataset to export (default: the only segmentation)")
    parser.add_argument("--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="export this part only: begin and end in nm")
    parser.add_argument(
        "--renumber",
        dest="renumbered",
        action="store_true",
        help="give segments the ids 1, 2, 3 ..., which need few bits",
    )
    parser.add_argument("--mesh", action="store_true", help="write meshes of the segments, too (precomputed)")
    parser.add_argument("--skeletons", action="store_true", help="write skeletons of the segments, too (precomputed)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that exists")
    run_command(parser, lambda arguments: export_dataset(**vars(arguments)))


if __name__ == "__main__":
    main()
