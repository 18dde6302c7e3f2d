"""Ratios: what benchmarks measure in turns, as rows of one form. `table.py` makes docs/benchmarks.md of them.

A ratio is a cost divided by another cost, so less is better. Where other work shares the machine, a single ratio means
little. So both sides are measured in turns, each repeat gives a ratio, and a row holds their median and their range.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from lsdseg.cli import argument
from lsdseg.config.rules import integer
from lsdseg.errors import UserError
from lsdseg.files import write_whole

PACKAGES = ("torch", "numpy", "daisy")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of the CPU, those that matter to networks


class Row(TypedDict):
    """A ratio, and all that is needed to read it later."""

    name: str  # what is measured
    against: str  # what it is compared with
    ratio: float  # median of the repeats
    least: float
    most: float
    repeats: int
    goal: float | None  # the most that it should be
    goal_in: str  # "ratio", or `unit` if the goal is a cost
    cost: float  # medians, in `unit`
    other_cost: float
    unit: str
    load: float  # load average of the last minute
    date: str
    command: str  # that measures it
    machine: dict[str, Any]  # see `machine`
    versions: dict[str, str]


def in_turns(repeats: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Measure several sides in turns, every other time in reverse order.

    Args:
        repeats: how often.
        sides: each returns what it measured, such as seconds.

    Returns:
        For each side, what it returned in each repeat.
    """
    values: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats):
        order = list(range(len(sides)))
        for side in order[:: -1 if repeat % 2 else 1]:
            values[side].append(sides[side]())
    return values


def cpu_seconds(function: Callable[..., Any], *args: Any) -> float:
    """Return the CPU seconds that a call takes in this process, on all its threads."""
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def wall_seconds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - began


def add_options(parser: argparse.ArgumentParser, repeats: int | None = None) -> None:
    """Add --json, for `Rows`, and --repeats with this default, for `in_turns`, if the benchmark has a choice."""
    if repeats is not None:
        number = argument(integer(1))
        parser.add_argument("--repeats", type=number, default=repeats, help="of both sides (default %(default)s)")
    parser.add_argument("--json", type=_file, metavar="FILE", help="also write the ratios to this file, as JSON")


def _file(text: str) -> Path:
    path = Path(text).absolute()  # some benchmarks change the folder
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: name a file in a folder that you may write to")
    return path


class Rows:
    """The rows of one run of a benchmark. Each is in the file as soon as it is measured.

    Args:
        path: a JSON file, which is replaced; None writes nothing.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: list[Row] = []
        self.command, self.machine, self.versions = _command(), machine(), versions()

    def add(
        self,
        name: str,
        costs: Sequence[float],
        against: str,
        other_costs: Sequence[float],
        *,
        unit: str = "s",
        goal: float | None = None,
        goal_in: str = "ratio",
    ) -> Row:
        """Add a row.

        Args:
            name: what is measured.
            costs: what it cost in each repeat, in `unit`.
            against: what it is compared with.
            other_costs: what that cost in the same repeats.
            unit: of both.
            goal: the most that it should be, if there is such a goal.
            goal_in: "ratio", or `unit` if the goal is a cost.
        """
        ratios = [cost / other for cost, other in zip(costs, other_costs, strict=True)]
        row = Row(
            name=name,
            against=against,
            ratio=statistics.median(ratios),
            least=min(ratios),
            most=max(ratios),
            repeats=len(ratios),
            goal=goal,
            goal_in=goal_in,
            cost=statistics.median(costs),
            other_cost=statistics.median(other_costs),
            unit=unit,
            load=round(os.getloadavg()[0], 1),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.command,
            machine=self.machine,
            versions=self.versions,
        )
        self.rows.append(row)
        if self.path:
            write_rows(self.path, self.rows)
        return row

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Add a row, and print it."""
        row = self.add(*args, **kwargs)
        sides = f"{row['cost']:.4g} {row['unit']} against {row['other_cost']:.4g} {row['unit']}"
        spread = f"({row['least']:.2f} to {row['most']:.2f})"
        print(f"{row['name']}: {row['ratio']:.2f} {spread} of {row['against']}: {sides}", flush=True)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a JSON file, a row on each line, whole or not at all."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    with write_whole(path) as partial:
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        keys = Row.__annotations__.keys()
        if isinstance(rows, list) and all(isinstance(row, dict) and keys <= row.keys() for row in rows):
            return rows
        reason = "these are not rows of benchmarks"
    except FileNotFoundError:
        raise UserError(f"there is no {path}: run make bench, or benchmarks/run.py, first") from None
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path} cannot be read ({reason}): remove it, and run benchmarks/run.py again")


def machine() -> dict[str, Any]:
    """Describe this machine: CPU, cores that this process may use, memory in GB, `FLAGS` that the CPU has, and GPU.

    OMP_NUM_THREADS is among it, because it limits the threads of libraries.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    model, flags = (re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "flags"))
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "flags": [flag for flag in FLAGS if flags and flag in flags[1].split()],
        "gpu": _gpu(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def _gpu() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return names[0] if names else None


def _command() -> str:
    """How this benchmark was started, without --json."""
    arguments, words = [], iter(sys.argv[1:])
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            arguments.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
