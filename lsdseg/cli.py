"""How every script runs: parse the arguments, load the config, make one call, and report a mistake in one line."""

import argparse
import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lsdseg.config.implementations import resolve
from lsdseg.config.loader import CHECKOUT, CONFIG_SUFFIXES, EXPERIMENT, load_config
from lsdseg.config.rules import Rule, choice, integer, number, pattern, read_value
from lsdseg.errors import DeviceError, UserError, quoted, without_secrets

ID = integer(0, 2**64 - 1)  # rule for the id of a label


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def command_parser(description: str, example: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser for `run_command`.

    Args:
        description: what the command does.
        example: a whole command line.
        epilog: text to append to the help.
    """
    return _Parser(
        description=description,
        epilog=f"example:\n  {example}\n{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(
    parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None], *, intermixed: bool = True
) -> None:
    """Parse the command line and call `main(arguments)`.

    Args:
        parser: what `command_parser` returned.
        main: does the work.
        intermixed: let options stand between paths. A parser with subcommands cannot.

    Raises:
        SystemExit: status 2 after a UserError, which is printed as one line on stderr; status 130 after Ctrl-C.
    """
    with _report_mistakes():
        main(parser.parse_intermixed_args() if intermixed else parser.parse_args())


def run_script(
    main: Callable[..., Any],
    *,
    description: str,
    example: str,
    default_config: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    first: str | None = None,
) -> None:
    """Parse the command line, load the config and call `main(cfg)`, or `main(cfg, args)` if there is `add_arguments`.

    Args:
        main: does the work.
        description: what the script does, for `--help`.
        example: a whole command line, for `--help`.
        default_config: config file to use without `-c`. None: only the defaults.
        add_arguments: adds the script's own options to the parser.
        first: the option that a volume before the KEY VALUE pairs stands for.

    Raises:
        SystemExit: as for `run_command`.
    """
    with _report_mistakes():
        parser = command_parser(description, example, "\nlsdseg/config/defaults.py explains every key.")
        parser.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            default=default_config,
            help=f"the config, .py or .yaml; a bare name is also looked up in config/ (default: {default_config})",
        )
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY VALUE" if first is None else "VOLUME | KEY VALUE",
            help="settings that override the config; before them, FILE may stand without -c"
            if first is None
            else "a volume, then settings that override the config",
        )
        if add_arguments is not None:
            add_arguments(parser)
        args = parser.parse_intermixed_args()
        if args.overrides and Path(args.overrides[0]).suffix in CONFIG_SUFFIXES and args.config == default_config:
            args.config, *args.overrides = args.overrides  # as the published scripts take it
        if first is not None and len(args.overrides) % 2:
            word, *args.overrides = args.overrides
            setattr(args, first, word)
        cfg = load_config(args.config, args.overrides)
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        if cfg.SYSTEM.VERBOSE:  # of this project alone: libraries report what no user asked for
            logging.getLogger("lsdseg").setLevel(logging.INFO)
        if Path(EXPERIMENT).is_file():
            print(f"also using the settings in {Path(EXPERIMENT).resolve()}")
        if add_arguments is None:
            main(cfg)
        else:
            main(cfg, args)


def deferred(reference: str) -> Callable[..., Any]:
    """Return a function that imports what a "module:name" refers to when it is called, and calls that.

    Importing what does the work takes seconds. So `--help` and a mistake in the config do not wait for it.
    """

    def call(*args: Any, **options: Any) -> Any:
        return resolve(reference)(*args, **options)

    return call


def call_script(script: str, *arguments: object, cwd: Path | None = None) -> None:
    """Print a script's command line as a user would type it in the checkout, and run it. It ends with this process.

    Args:
        script: path of the script in the checkout.
        arguments: what to pass to it.
        cwd: folder to run it in. None: the current directory.

    Raises:
        SystemExit: the script failed; the status is the script's, and 128 + N if signal N ended it.
    """
    command = [script, *map(str, arguments)]
    print("\n$ python", without_secrets(shlex.join(command)), flush=True)
    run = [sys.executable, str(CHECKOUT / script), *command[1:]]
    status = subprocess.run(run, cwd=cwd, preexec_fn=_end_with_parent).returncode
    if status < 0:
        name = signal.Signals(-status).name
        memory = ", perhaps because memory ran out" if -status == signal.SIGKILL else ""
        print(f"error: {script} was ended by {name}{memory}: run the same command again", file=sys.stderr)
    if status:
        sys.exit(status if status > 0 else 128 - status)


def _end_with_parent() -> None:
    """Let Linux send SIGTERM to this process when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def argument(rule: Rule) -> Callable[[str], Any]:
    """Return the `type` of an option that takes what a rule of the config takes."""

    def parse(text: str) -> Any:
        try:
            return read_value(rule, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be {error}") from None

    return parse


def add_merge_function(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the option -mf, for scripts that read what 03_agglomerate_blockwise.py wrote."""
    parser.add_argument(
        "-mf",
        "--merge_function",
        metavar="NAME",
        type=argument(pattern("[A-Za-z0-9_]{1,100}", "a name such as hist_quant_50")),
        default=default,
        help=f"merge function that 03 was run with (default: {default or 'that of the config'})",
    )


def add_corrections(parser: argparse.ArgumentParser, only: str, axes: str) -> None:
    """Add what imports of corrected labels have: the option `only` for a table of ids, and --axes with its default."""
    parser.add_argument(
        only, dest="only", metavar="FILE", type=Path, help="CSV with the ids that are right; all others are unknown"
    )
    parser.add_argument(
        "--axes",
        metavar="ORDER",
        type=argument(choice("zyx", "yxz", "xyz")),
        help=f"order in which the file stores its axes; yxz in a .npy of Seg2Link (default: {axes})",
    )


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """Add what all conversions to zarr have: --sections, --resolution and --overwrite."""
    parser.add_argument("--sections", metavar="A:B", default=":", help="take sections A to B - 1 only")
    parser.add_argument(
        "--resolution",
        metavar=("Z", "Y", "X"),
        type=argument(number(0, above=True)),
        nargs=3,
        help="voxel size in nm, z y x, where the input says nothing",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace zarrs that exist")


@contextmanager
def _report_mistakes() -> Iterator[None]:
    """Exit with one line on stderr after a UserError, an error of the file system or Ctrl-C."""
    try:
        yield
    except UserError as error:
        # Of several processes that train together, one reports the mistakes that all of them meet.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, DeviceError):
            print("error:", error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print("error:", UserError(f"{error.filename}: {error.strerror}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
