"""How far the steps of a run are: read from what they leave on disk, on any machine that sees it, during or after."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsdseg.engine.blocks.lock import is_locked
from lsdseg.engine.blocks.markers import given_up, record_files, records_in
from lsdseg.engine.blocks.reports import MOST_LISTED, Report, current_blocks, failed_blocks
from lsdseg.engine.blocks.slurm import Job, jobs_of
from lsdseg.engine.blocks.step import SKIPPED, STEP
from lsdseg.engine.blocks.supervisor import STOPPED
from lsdseg.errors import UserError
from lsdseg.files import read_json, write_whole

# Blocks per minute are those of the last minutes, since workers come and go.
SECONDS_OF_RATE = 300
# What a block is, in maps: the largest number wins where one cell stands for several blocks.
LEFT, SKIP, DONE, RUNNING, FAILED = range(5)
SHADES = "·░▒▓█"  # of nothing done, to all done


@dataclass
class Status:
    """How far a step is.

    Attributes:
        step: its name, and that of its sample: the name of its folder.
        folder: with its logs.
        active: whether its script runs.
        blocks: how many there are.
        done: how many are recorded as done.
        skipped: how many need not be done, or are given up.
        running: the blocks that workers are at.
        failed: the last failure of each block that failed and was not done since.
        per_minute: blocks done per minute in the last minutes, 0 if none.
        seconds_left: at that rate; None if there is none, or nothing is left.
        seconds_per_block: mean time of a block, for one worker.
        slowest: the blocks that took longest, and how many seconds.
        jobs: of Slurm.
        stopped: why the run ended early, if it says so.
        map: uint8 over the grid of blocks, LEFT to FAILED.
    """

    step: str
    folder: str
    active: bool
    blocks: int
    done: int
    skipped: int
    running: list[Report]
    failed: list[Report]
    per_minute: float
    seconds_left: float | None
    seconds_per_block: float
    slowest: list[tuple[Report, float]]
    jobs: list[Job]
    stopped: str
    map: NDArray[np.uint8] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold; the map is left out."""
        content = asdict(self) | {"slowest": [asdict(block) | {"seconds": t} for block, t in self.slowest]}
        del content["map"]
        return content


def statuses(folder: Path) -> list[Status]:
    """Return the status of every step whose logs are in a folder, the one that began last at the end.

    Args:
        folder: one in which scripts were started, its daisy_logs, or the folder of a step in there.

    Raises:
        UserError: there are no steps.
    """
    folder = folder.absolute()
    for candidates in ([folder], sorted(folder.glob("*")), sorted(folder.glob("daisy_logs/*"))):
        steps = [candidate for candidate in candidates if (candidate / STEP).is_file()]
        if steps:
            return [read_status(step) for step in sorted(steps, key=lambda step: (step / STEP).stat().st_mtime)]
    raise UserError(
        f"no blockwise step was run in {folder}: name the folder in which a script was started, or its daisy_logs"
    )


def read_status(folder: Path) -> Status:
    """Return the status of the step whose logs are in a folder.

    Raises:
        UserError: its description is damaged, or of an earlier version.
    """
    step = read_json(folder / STEP, "start the step again")
    try:
        markers, grid = Path(step["markers"]), tuple(map(int, step["grid"]))
        begin, block = step["begin"], step["block"]
    except KeyError:
        raise UserError(f"{folder / STEP} is of an earlier version: start the step again") from None
    records = records_in(record_files(markers))
    records = records[(records["block"] > 0) & (records["block"] <= math.prod(grid))]
    numbers = records["block"].astype(np.int64) - 1
    blocks = np.full(math.prod(grid), LEFT, np.uint8)
    skipped = folder / SKIPPED
    if skipped.is_file():
        blocks[np.unpackbits(np.fromfile(skipped, np.uint8), count=blocks.size) > 0] = SKIP
    blocks[numbers] = DONE
    blocks[[report.block for report in given_up(markers)]] = SKIP
    active = is_locked(folder / "lock")
    running = current_blocks(folder) if active else []
    reports = failed_blocks(folder).items()
    failed = [report for number, report in reports if number < blocks.size and blocks[number] == LEFT]
    for found, state in ((running, RUNNING), (failed, FAILED)):
        blocks[[report.block for report in found if report.block < blocks.size]] = state

    longest = np.argsort(records["seconds"])[::-1][:MOST_LISTED]
    now = time.time()
    recent = int(np.count_nonzero(records["time"] > now - SECONDS_OF_RATE))
    since = max(now - SECONDS_OF_RATE, (folder / STEP).stat().st_mtime)
    per_minute = 60 * recent / max(1.0, now - since) if active else 0.0
    left = int(np.count_nonzero((blocks != DONE) & (blocks != SKIP)))
    stopped = folder / STOPPED
    return Status(
        step=folder.name,
        folder=str(folder),
        active=active,
        blocks=blocks.size,
        done=len(np.unique(numbers)),
        skipped=int(np.count_nonzero(blocks == SKIP)),
        running=running,
        failed=failed,
        per_minute=per_minute,
        seconds_left=60 * left / per_minute if per_minute and left else None,
        seconds_per_block=float(records["seconds"].mean()) if len(records) else 0.0,
        slowest=[(Report.at(int(numbers[n]), grid, begin, block), float(records["seconds"][n])) for n in longest],
        jobs=jobs_of(folder),
        stopped=stopped.read_text(encoding="utf-8", errors="replace").strip() if stopped.is_file() else "",
        map=blocks.reshape(grid),
    )


def as_text(status: Status, columns: int = 80) -> str:
    """Return the status of a step as lines for a terminal."""
    left = status.blocks - status.done - status.skipped
    state = "is running" if status.active else "is done" if not left else "has ended before it was done"
    counts = f"{status.done} of {status.blocks} blocks are done, {len(status.running)} running, {left} left"
    counts += f", {len(status.failed)} failed" if status.failed else ""
    counts += f", {status.skipped} skipped" if status.skipped else ""
    lines = [f"{status.step} {state}: {counts}"]
    if status.active:
        ahead = f", {duration(status.seconds_left)} left" if status.seconds_left else ""
        lines.append(f"  {status.per_minute:.1f} blocks per minute{ahead}; {status.seconds_per_block:.2f} s per block")
    if status.jobs:
        lines.append(f"  {_jobs_text(status.jobs)}")
    if status.stopped:
        lines.append(f"  stopped: {status.stopped}")
    for report in status.failed[:MOST_LISTED]:
        lines.append(f"  failed: block {report.block}, {report.place}: {report.error} ({status.folder}/{report.log})")
    for report, seconds in status.slowest[:1]:
        lines.append(f"  slowest: block {report.block}, {report.place}: {seconds:.1f} s")
    lines += [f"  {row}" for row in text_map(status.map, columns - 2)]
    return "\n".join(lines)


def _jobs_text(jobs: Sequence[Job]) -> str:
    """Say how many jobs are in each state, and which: those that run with node and time, those that wait with why."""
    parts = []
    for state in sorted({job.state for job in jobs}):
        own = [job for job in jobs if job.state == state]
        about = [[job.job, job.node, job.time] if job.node else [job.job, job.reason] for job in own[:MOST_LISTED]]
        listed = [" ".join(filter(None, words)) for words in about]
        more = ", ..." if len(own) > MOST_LISTED else ""
        parts.append(f"{len(own)} {state.lower() or 'of which squeue says nothing here'} ({', '.join(listed)}{more})")
    return f"Slurm jobs: {', '.join(parts)}"


def text_map(blocks: NDArray[np.uint8], columns: int) -> list[str]:
    """Draw which blocks are done, seen along z, with a legend: one character for each column of blocks or several.

    A failed block shows wherever it lies, then a running one; the other characters say which share is done.
    """
    step = max(1, -(-blocks.shape[2] // columns), -(-blocks.shape[1] // 40))
    rows = []
    for y in range(0, blocks.shape[1], step):
        row = ""
        for x in range(0, blocks.shape[2], step):
            cell = blocks[:, y : y + step, x : x + step]
            done = int(np.count_nonzero(cell == DONE)) / max(1, int(np.count_nonzero(cell != SKIP)))
            shade = " " if (cell == SKIP).all() else SHADES[math.floor(done * (len(SHADES) - 1))]
            row += "!" if (cell == FAILED).any() else "+" if (cell == RUNNING).any() else shade
        rows.append(row)
    return [*rows, "done, seen along z: · none, ░▒▓ some, █ all; + running, ! failed"]


def draw_map(status: Status, path: Path) -> None:
    """Draw the blocks of a step as a picture, PNG: every layer of blocks, up to 36 of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    states = {"left": "#d9d9d9", "skipped": "#ffffff", "done": "#0072b2", "running": "#f0e442", "failed": "#d55e00"}
    layers = np.unique(np.linspace(0, len(status.map) - 1, min(36, len(status.map))).round().astype(int))
    across = math.ceil(math.sqrt(len(layers)))
    width = max(6, 2 * across + 1)  # inches; the legend needs them
    figure = Figure(figsize=(width, 2 * math.ceil(len(layers) / across) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    for number, layer in enumerate(layers, start=1):
        axes = figure.add_subplot(math.ceil(len(layers) / across), across, number)
        axes.imshow(status.map[layer], cmap=ListedColormap(list(states.values())), norm=BoundaryNorm(range(6), 5))
        axes.set(title=f"layer {layer} along z", xlabel="x", ylabel="y", xticks=[], yticks=[])
    title = f"{status.step}: {status.done} of {status.blocks} blocks are done"
    figure.suptitle("\n".join(wrap(title, 10 * width)), fontsize=10)
    patches = [Patch(facecolor=color, edgecolor="#808080", label=name) for name, color in states.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    figure.savefig(path, format="png", dpi=100)


def duration(seconds: float) -> str:
    """Return seconds in words: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def show_status(folder: Path, *, as_json: bool = False, picture: Path | None = None, columns: int = 80) -> None:
    """Print the status of the steps in a folder.

    Args:
        folder: see `statuses`.
        as_json: print one JSON list.
        picture: PNG to draw the map of the last step in.
        columns: width of the terminal.

    Raises:
        UserError: there are no steps, or the picture cannot be written.
    """
    found: Sequence[Status] = statuses(folder)
    if as_json:
        print(json.dumps([status.to_json() for status in found], indent=1))
    else:
        print("\n\n".join(as_text(status, columns) for status in found))
    if picture is not None:
        with write_whole(picture) as partial:
            draw_map(found[-1], partial)
