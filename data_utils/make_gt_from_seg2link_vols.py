"""Ground truth of proofread ids: python data_utils/make_gt_from_seg2link_vols.py -f FILE -df IDS.csv -op OUT.zarr"""

from pathlib import Path

from lsdseg.cli import add_corrections, argument, command_parser, deferred, run_command
from lsdseg.config.rules import number, sequence
from lsdseg.data_utils.layout import LABELS

add_ground_truth = deferred("lsdseg.data_utils.corrected:add_ground_truth")


def main() -> None:
    """Write labels and their mask to one zarr."""
    parser = command_parser(
        "Write the ids that were proofread in Seg2Link, and their mask, to a zarr. All other voxels are unknown.",
        "python data_utils/make_gt_from_seg2link_vols.py -f seg-modified.npy -df ids.csv -op train/a.zarr -res 40,4,4",
        "\ndata_utils/import_proofread.py does the same, adds raw, and reads what other programs write.",
    )
    parser.add_argument(
        "-f", dest="corrected", metavar="FILE", type=Path, required=True, help="what Seg2Link saved: seg-modified.npy"
    )
    add_corrections(parser, "-df", axes="yxz for .npy, else zyx")
    parser.add_argument(
        "-op", "--out_path", dest="target", metavar="ZARR", type=Path, required=True, help="zarr to write to"
    )
    for flag, name, meaning in [("-res", "--resolution", "voxel size"), ("-off", "--offset", "offset")]:
        help_text = f"{meaning} in nm, Z,Y,X (default: that of raw in ZARR, if there is one)"
        parser.add_argument(flag, name, metavar="Z,Y,X", type=argument(sequence(number(), 3)), help=help_text)
    parser.add_argument("-ds", "--dataset", default=LABELS, help="dataset to write (default: %(default)s)")
    run_command(parser, lambda arguments: add_ground_truth(**vars(arguments)))


if __name__ == "__main__":
    main()
