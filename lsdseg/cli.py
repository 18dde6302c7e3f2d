"""How every script starts and ends: arguments, config, one call, and one line for a mistake."""

import argparse
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lsdseg.config.loader import CHECKOUT, EXPERIMENT, load_config
from lsdseg.errors import DeviceError, UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows how to call {self.prog})")


def command_parser(description: str, example: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose mistakes are UserErrors, for `run_command`; `example` is a whole command."""
    return _Parser(
        description=description,
        epilog=f"example:\n  {example}\n{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and call `main(arguments)`.

    Does not return after a mistake: exit status 2 and one line on stderr for a UserError, 130 for Ctrl-C.
    """
    with _mistakes_in_one_line():
        main(parser.parse_args())


def run_script(
    main: Callable, *, description: str, example: str, default_config: str | None, add_arguments: Callable | None = None
) -> None:
    """Parse the command line, load the config and call `main(cfg)`; `main(cfg, args)` with `add_arguments`.

    Args:
        main: does the work.
        description: what the script does, for `--help`.
        example: a whole command, for `--help`.
        default_config: the config file when `-c` is not given.
        add_arguments: called with the argparse parser, to add the script's own options.

    Does not return after a mistake, as `run_command`.
    """
    with _mistakes_in_one_line():
        parser = command_parser(description, example, "\nEvery key is explained in config/config.py.")
        parser.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            default=default_config,
            help=f".py or .yaml file; a bare name is also looked for in config/ (default: {default_config})",
        )
        parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="settings that override the file")
        if add_arguments is not None:
            add_arguments(parser)
        args = parser.parse_intermixed_args()
        cfg = load_config(args.config, args.overrides)
        logging.getLogger("gunpowder").setLevel(logging.WARNING)  # it reports every process that it starts and ends
        logging.basicConfig(
            level=logging.INFO if cfg.SYSTEM.VERBOSE else logging.WARNING, format="%(name)s: %(message)s"
        )
        if Path(EXPERIMENT).is_file():
            print(f"also using the settings in {Path(EXPERIMENT).resolve()}")
        if add_arguments is None:
            main(cfg)
        else:
            main(cfg, args)


def call_script(script: str, *arguments: object, cwd: Path | None = None) -> None:
    """Print a command as a user would type it in the checkout, and run it; its failure ends this program likewise."""
    command = [script, *map(str, arguments)]
    print("\n$ python", shlex.join(command), flush=True)
    if status := subprocess.run([sys.executable, CHECKOUT / script, *command[1:]], cwd=cwd).returncode:
        sys.exit(status)


def add_merge_function(parser: argparse.ArgumentParser) -> None:
    """Add the option -mf of the scripts that read what 03_agglomerate_blockwise.py wrote."""
    parser.add_argument(
        "-mf", "--merge_function", metavar="NAME", required=True, help="merge function that 03 was run with"
    )


@contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        # Of processes that train together, one says for all what all of them meet.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, DeviceError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
