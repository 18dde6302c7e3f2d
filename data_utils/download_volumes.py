"""Download public volumes to train on: python data_utils/download_volumes.py snemi3d -c config_snemi.py"""

from pathlib import Path

from lsdseg.cli import argument, command_parser, deferred, run_command
from lsdseg.config.rules import integer

download_volumes = deferred("lsdseg.data_utils.download:download_volumes")


def main() -> None:
    """Download volumes, and convert them to zarrs, or list what there is."""
    parser = command_parser(
        "Download public volumes with labels, and lay them out for training. Run it again to go on after a break.",
        "python data_utils/download_volumes.py --list\n"
        "  python data_utils/download_volumes.py fib25/trvol-250-1 hemibrain -c config_fib25.py DATA.BRAIN_VOL FLY",
    )
    parser.add_argument(
        "words", nargs="*", metavar="NAME | KEY VALUE", help="data sets, or NAME/VOLUME; then settings, with -c"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-c", "--config", metavar="FILE", help="write to the folder train/ of this config")
    where.add_argument("--to", metavar="FOLDER", type=Path, help="write to this folder")
    parser.add_argument("--list", dest="listed", action="store_true", help="print what there is, and where it is from")
    parser.add_argument("--table", metavar="FILE", type=Path, help="read a table of your own (docs/public_volumes.md)")
    parser.add_argument(
        "--threads",
        metavar="N",
        type=argument(integer(1, 64)),
        default=4,
        help="files to download at a time (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="download volumes that are there, and replace them")
    run_command(parser, lambda arguments: download_volumes(**vars(arguments)))


if __name__ == "__main__":
    main()
