"""Train on corrected labels: python data_utils/import_proofread.py CORRECTED train/NAME.zarr --sample SAMPLE.zarr"""

from pathlib import Path

from lsdseg.cli import ID, add_corrections, argument, command_parser, deferred, run_command
from lsdseg.config.rules import integer
from lsdseg.data_utils.layout import RAW

import_proofread = deferred("lsdseg.data_utils.corrected:import_proofread")


def main() -> None:
    """Import one corrected region."""
    parser = command_parser(
        "Make a zarr to train on of raw and of labels that somebody corrected in another program.",
        "python data_utils/import_proofread.py seg_tiff train/NAME.zarr --sample test/SAMPLE.zarr "
        "--region 400:2000,0:800,0:800",
    )
    parser.add_argument(
        "corrected", metavar="CORRECTED", type=Path, help="what to_zarr.py reads, or an annotation of webKnossos (.zip)"
    )
    parser.add_argument("target", metavar="NAME.zarr", type=Path, help="the zarr to write")
    parser.add_argument(
        "--sample", metavar="SAMPLE.zarr", type=Path, required=True, help="the volume that was exported"
    )
    parser.add_argument("--raw", metavar="DATASET", default=RAW, help="its raw (default: %(default)s)")
    parser.add_argument(
        "--dataset", metavar="NAME", help="the dataset of CORRECTED that holds the ids, if it has several"
    )
    parser.add_argument("--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="the part that was exported, in nm")
    parser.add_argument(
        "--before", metavar="SENT", type=Path, help="what was exported, where CORRECTED holds changes only"
    )
    parser.add_argument(
        "--unknown", metavar="ID", type=argument(ID), nargs="+", default=(), help="ids that training leaves out"
    )
    add_corrections(parser, "--only", axes="zyx")
    parser.add_argument(
        "--context",
        metavar=("Z", "Y", "X"),
        type=argument(integer(0)),
        nargs=3,
        default=(100, 100, 100),
        help="voxels of raw to keep around the region (default: 100 100 100)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a zarr that exists")
    run_command(parser, lambda arguments: import_proofread(**vars(arguments)))


if __name__ == "__main__":
    main()
