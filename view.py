"""Look at a volume and all that was made of it in a browser: python view.py -c FILE, or python view.py SAMPLE.zarr"""

from pathlib import Path

from lsdseg.cli import add_merge_function, argument, command_parser, deferred, run_command
from lsdseg.config.rules import integer, threshold

view = deferred("lsdseg.engine.view.view:view")


def main() -> None:
    """Serve a page of Neuroglancer."""
    parser = command_parser(
        "Show raw, labels, predictions, fragments and every segmentation in Neuroglancer, in your browser.",
        "python view.py -c CKPT_FOLDER/config_predict.yaml\n  python view.py SAMPLE.zarr --volume RAW.zarr",
        "\nlsdseg/config/defaults.py explains every key.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SAMPLE.zarr | KEY VALUE",
        help="an output zarr; or, with -c, settings that override the config",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="show all test volumes of a config, and their outputs")
    parser.add_argument("--volume", metavar="RAW.zarr", type=Path, help="the volume that SAMPLE.zarr was made from")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), default=(), help="two segmentations, side by side")
    walks = parser.add_mutually_exclusive_group()
    walk = {"dest": "worst", "action": "store_const"}
    walks.add_argument(
        "--worst", **walk, const="segments", help="walk through likely merges that quality.py found: key w"
    )
    walks.add_argument(
        "--splits", **walk, const="splits", help="walk through likely splits that quality.py found: key w"
    )
    parser.add_argument(
        "--proofread", type=argument(threshold), metavar="THRESHOLD", help="edit the segments at this threshold"
    )
    add_merge_function(parser)
    parser.add_argument(
        "--export-labels",
        metavar="OUT.zarr",
        type=Path,
        help="write segments that were marked as right (key d) as ground truth, and end",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.zarr if it exists")
    parser.add_argument("--author", default="", metavar="NAME", help="who proofreads (default: the name of the user)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=argument(integer(0, 65535)), default=0, help="port (default: any that is free)")
    run_command(parser, lambda arguments: view(**vars(arguments)))


if __name__ == "__main__":
    main()
