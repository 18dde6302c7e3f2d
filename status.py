"""See how far the blockwise steps of a run are: python status.py [FOLDER] --watch"""

import shutil
import time
from argparse import Namespace
from pathlib import Path

from lsdseg.cli import command_parser, deferred, run_command

show_status = deferred("lsdseg.engine.blocks.status:show_status")

CLEAR = "\033[H\033[2J"
SECONDS_BETWEEN_LOOKS = 5


def main(arguments: Namespace) -> None:
    """Print the status once, or again and again until Ctrl-C."""
    while True:
        if arguments.watch and not arguments.json:
            print(end=CLEAR)
        columns = shutil.get_terminal_size().columns
        show_status(arguments.folder, as_json=arguments.json, picture=arguments.png, columns=columns)
        if not arguments.watch:
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


if __name__ == "__main__":
    parser = command_parser(
        "Say for each step how many blocks are done, running, failed and left, and how fast, and draw a map of them.",
        "python status.py ~/lsd/run --watch",
    )
    where = "folder in which the scripts were started, its daisy_logs, or a folder in there (default: this one)"
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path(), help=where)
    parser.add_argument("--watch", action="store_true", help="repeat that every few seconds, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    parser.add_argument(
        "--png", metavar="FILE", type=Path, help="write a picture of the last step, with all layers of blocks"
    )
    run_command(parser, main)
