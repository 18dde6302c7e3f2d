"""Run benchmarks one after the other, and keep their ratios in one file: `make bench`, `make bench-full`.

    python benchmarks/run.py                     # what fits a small machine
    python benchmarks/run.py --full              # all of them, an hour or more
    python benchmarks/run.py luts tree           # some of them

Rows of earlier runs stay in the file until their own command runs again. `table.py` makes a page of it.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lsdseg.cli import command_parser, run_command
from lsdseg.errors import UserError
from ratios import Row, read_rows, write_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
# Commands in the order of the page. Those that are quick take a minute or two each on two cores.
QUICK = (
    "startup.py",
    "prediction.py --tile 32 --volume 64 --repeats 3",
    "training.py --repeats 5",
    "segmentation.py",
    "tree.py --block 40 --repeats 3",
    "luts.py --edges 1000000",
    "table_tree.py --grid 4 --edge 20 --repeats 3",
    "rag_stores.py --edges 1000000",
    "block_overhead.py --blocks 10000 --repeats 3",
    "blockwise.py --units 1 2 --repeats 3",
    "lsd_targets.py --quick --repeats 3",
)
LONG = (
    "prediction.py --tile 104 --volume 250 --repeats 3",
    "training.py --repeats 15",
    "segmentation.py --edge 256",
    "luts.py",
    "table_tree.py --grid 8 --repeats 3",
    "rag_stores.py",
    "block_overhead.py --blocks 100000 --repeats 3",
    "block_overhead.py --blocks 640 --workers 64 --sleep 1 --repeats 3",
    "blockwise.py --units 1 4 16",
    "lsd_targets.py",
)


NAMES = sorted({Path(command.split()[0]).stem for command in QUICK + LONG})


def main() -> None:
    """Parse the command line."""
    parser = command_parser(__doc__.splitlines()[0], "python benchmarks/run.py luts tree")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(NAMES)}")
    parser.add_argument("--full", action="store_true", help="the long ones, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: benchmarks/results.json)")
    run_command(parser, run)


def run(args: argparse.Namespace) -> None:
    """Run what was asked for, and keep its rows.

    Raises:
        UserError: at once, if a name is unknown or the file of rows is damaged; at the end, if a benchmark failed.
    """
    if unknown := sorted(set(args.names) - set(NAMES)):
        raise UserError(f"no benchmark {', '.join(unknown)}: there are {', '.join(NAMES)}")
    rows = read_rows(args.results) if args.results.exists() else []
    commands = [
        command
        for command in QUICK + (LONG if args.full else ())
        if not args.names or Path(command.split()[0]).stem in args.names
    ]
    failed = []
    for number, command in enumerate(commands, start=1):
        print(f"\n[{number}/{len(commands)}] python benchmarks/{command}", flush=True)
        began = time.monotonic()
        new = measure(command)
        if new is None:
            failed.append(command)
            continue
        rows = merged(rows, new, command)
        write_rows(args.results, rows)
        print(f"{len(new)} rows in {args.results} ({time.monotonic() - began:.0f} s)")
    if failed:
        raise UserError(f"{', '.join(failed)} failed, see above: their rows are those of an earlier run, if any")


def measure(command: str) -> list[Row] | None:
    """Run a benchmark. Returns its rows, or None if it failed."""
    script, *options = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        done = subprocess.run([sys.executable, HERE / script, *options, "--json", file], cwd=HERE.parent)
        if done.returncode:
            return None
        return read_rows(file) if file.exists() else []


def merged(rows: list[Row], new: list[Row], command: str) -> list[Row]:
    """Put the new rows of a command in the place of its old ones, and drop those of commands that are gone."""
    order = [f"python benchmarks/{known}" for known in QUICK + LONG]
    kept = [row for row in rows if row["command"] in order and row["command"] != f"python benchmarks/{command}"]
    return sorted(kept + new, key=lambda row: order.index(row["command"]))


if __name__ == "__main__":
    main()
