"""Create the folders for new data sets: python data_utils/create_dir_organisation.py BASE NAME ..."""

import argparse
from pathlib import Path

from lsdseg.cli import argument, command_parser, run_command
from lsdseg.config.rules import nonempty, path, words
from lsdseg.data_utils.layout import create_data_folders
from lsdseg.errors import UserError


def main() -> None:
    """Create the folders of one or several data sets."""
    parser = command_parser(
        "Create BASE/NAME/data_{2d,3d}/{train,test} for every data set NAME.",
        "python data_utils/create_dir_organisation.py ~/lsd/connexion/data CREMI FIB25",
    )
    parser.add_argument("base", metavar="BASE", type=argument(path(words)), help="HOME/DATA_DIR_PATH of your config")
    parser.add_argument(
        "names", metavar="NAME", type=argument(nonempty), nargs="+", help="a data set, BRAIN_VOL of your config"
    )
    run_command(parser, create)


def create(arguments: argparse.Namespace) -> None:
    """Create the folders, and say how to point a config at them."""
    base = Path(arguments.base)
    if base == base.parent:
        raise UserError(f"{base} can be no folder of data sets: DATA.HOME lies above it; name a folder below")
    print(*create_data_folders(base, arguments.names), sep="\n")
    depth = 2 if base.match("connexion/data") else 1  # the default of DATA.DATA_DIR_PATH, or one folder
    home = base.parents[depth - 1]
    print("\nPut volumes (*.zarr) into them, and set in your config file, or after -c FILE on the command line:")
    print(f"  DATA.HOME {home}")
    print(f"  DATA.DATA_DIR_PATH {base.relative_to(home)}")
    print(f"  DATA.BRAIN_VOL {' or '.join(arguments.names)}")


if __name__ == "__main__":
    main()
