"""How every script starts and ends: arguments, config, one call, and one line for a mistake."""

import argparse
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

from config.errors import DeviceError, UserError
from config.loader import CHECKOUT, EXPERIMENT, load_config


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help shows how to call {self.prog})")


def run_script(main, *, description: str, example: str, default_config: str | None, add_arguments=None) -> None:
    """Parse the command line, load the config and call `main(cfg)`; `main(cfg, args)` with `add_arguments`.

    Args:
        main: does the work.
        description, example: for `--help`; the example is a whole command.
        default_config: the config file when `-c` is not given.
        add_arguments: called with the argparse parser, to add the script's own options.

    Does not return after a mistake: exit status 2 with one line on stderr for a UserError, 130 for Ctrl-C.
    """
    try:
        parser = _Parser(
            description=description,
            epilog=f"example:\n  {example}\n\nEvery key is explained in config/config.py.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            default=default_config,
            help=f".py or .yaml file; a bare name is also looked for in config/ (default: {default_config})",
        )
        parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="settings that win over the file")
        if add_arguments is not None:
            add_arguments(parser)
        args = parser.parse_intermixed_args()
        cfg = load_config(args.config, args.overrides)
        logging.getLogger("gunpowder").setLevel(logging.WARNING)  # it reports every process that it starts and ends
        logging.basicConfig(
            level=logging.INFO if cfg.SYSTEM.VERBOSE else logging.WARNING, format="%(name)s: %(message)s"
        )
        if Path(EXPERIMENT).is_file():
            print(f"settings from {Path(EXPERIMENT).resolve()} are used, too")
        if add_arguments is None:
            main(cfg)
        else:
            main(cfg, args)
    except UserError as error:
        # Of processes that train together, one says for all what all of them meet.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, DeviceError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def call_script(script: str, *arguments, cwd: Path | None = None) -> None:
    """Print a command as a user would type it in the checkout, and run it; its failure ends this program likewise."""
    command = [script, *map(str, arguments)]
    print("\n$ python", shlex.join(command), flush=True)
    if status := subprocess.run([sys.executable, CHECKOUT / script, *command[1:]], cwd=cwd).returncode:
        sys.exit(status)


def add_merge_function(parser) -> None:
    """The option -mf, as scripts have it that read what 03_agglomerate_blockwise.py wrote."""
    parser.add_argument(
        "-mf", "--merge_function", metavar="NAME", required=True, help="merge function that 03 was run with"
    )
