"""Write a synthetic EM volume: python data_utils/phantom.py OUT.zarr --shape 64 256 256"""

import argparse

from lsdseg.cli import argument, command_parser, deferred, run_command
from lsdseg.config.rules import integer

write_phantom = deferred("lsdseg.data_utils.phantom:write_phantom")

ZYX = ("Z", "Y", "X")


def main() -> None:
    """Write one phantom."""
    parser = command_parser(
        "Write a synthetic EM volume with dense ground truth to a zarr.",
        "python data_utils/phantom.py a.zarr --shape 64 256 256 --seed 1 --voxel-size 40 4 4",
    )
    parser.add_argument("path", metavar="OUT.zarr", help="zarr to write; an existing one is replaced")
    parser.add_argument(
        "--shape",
        type=argument(integer(1, 2000)),
        nargs=3,
        metavar=ZYX,
        default=(128, 128, 128),
        help="size in voxels (default: 128 128 128)",
    )
    parser.add_argument(
        "--seed", type=argument(integer(0, 2**32 - 1)), default=0, help="another seed gives other tissue (default: 0)"
    )
    parser.add_argument(
        "--voxel-size",
        type=argument(integer(1)),
        nargs=3,
        metavar=ZYX,
        default=(10, 10, 10),
        help="in nm (default: 10 10 10)",
    )
    parser.add_argument(
        "--offset", type=argument(integer()), nargs=3, metavar=ZYX, default=(0, 0, 0), help="in nm (default: 0 0 0)"
    )
    run_command(parser, write)


def write(arguments: argparse.Namespace) -> None:
    """Write the phantom, and say where it is."""
    write_phantom(**vars(arguments))
    print(f"phantom: {arguments.path}")


if __name__ == "__main__":
    main()
