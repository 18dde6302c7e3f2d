"""The folders that the scripts expect volumes in, made for new data sets."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lsdseg.data_utils.layout import create_dir_organisation


def main():
    """Command line: make the folders, say how to point a config at them."""
    parser = argparse.ArgumentParser(
        description="Make BASE/NAME/data_{2d,3d}/{train,test} for every data set NAME.",
        epilog="example: python data_utils/create_dir_organisation.py ~/lsd/connexion/data CREMI FIB25",
    )
    parser.add_argument("base", metavar="BASE", type=Path, help="HOME/DATA_DIR_PATH of your config")
    parser.add_argument("names", metavar="NAME", nargs="+", help="a data set, BRAIN_VOL in your config")
    arguments = parser.parse_args()
    base = arguments.base.absolute()
    try:
        folders = create_dir_organisation(base, arguments.names)
    except OSError as error:
        parser.exit(2, f"error: cannot make folders below {base}: {error.strerror}; choose another BASE\n")

    print(*folders, sep="\n")
    depth = 2 if base.match("connexion/data") else 1  # the default of DATA.DATA_DIR_PATH, or one folder
    home = base.parents[depth - 1]
    print("\nPut volumes (*.zarr) into them and set in your config file or behind a script's -c FILE:")
    print(f"  DATA.HOME {home}")
    print(f"  DATA.DATA_DIR_PATH {base.relative_to(home)}")
    print(f"  DATA.BRAIN_VOL {' or '.join(arguments.names)}")


if __name__ == "__main__":
    main()
