"""Markers of finished blocks: which are done, and with which settings. They lie beside the outputs that they describe.

A worker records a block after it has written it and before it says so over the network, in a file that it alone appends
to. Only what is recorded counts as done: whoever reaches the scheduler's port can report what they like. Workers never
wait for each other, and one that is killed, or a disk that is full, spoils at most the last record, whose block is done
again. With other settings, finished blocks would be mixed with others, so going on is refused.
"""

import errno
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lsdseg.engine.blocks.lock import step_lock
from lsdseg.engine.blocks.reports import Report
from lsdseg.engine.blocks.step import BlockStep, Work
from lsdseg.errors import UserError
from lsdseg.files import read_json, write_whole

# A block is known by its number in the grid, counted from 1: zeros, which a crash may leave, are no record.
UNTIMED = np.dtype([("block", "<u8"), ("seconds", "<f4"), ("megabytes", "<f4")])
TIMED = np.dtype([*UNTIMED.descr, ("time", "<f8")])
RECORD = np.dtype([*TIMED.descr, ("computed", "<f4"), ("written", "<f4"), ("bytes", "<f4")])
# Suffix of the file -> what it holds. All but the last are of earlier versions.
FORMATS = {"": UNTIMED, ".timed": TIMED, ".measured": RECORD}
GIVEN_UP = "given_up.json"
WRITTEN = "block without context (nm)"  # the setting with the place and shape of the first block
BEGUN_ANEW = "begun_anew"  # there until a step that was started over is complete

Found = TypeVar("Found")


def new_record_file(markers: Path) -> Path:
    """Create the empty file in which one worker records its blocks."""
    file = markers / "done" / f"{uuid.uuid4().hex}{list(FORMATS)[-1]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def record_block(file: Path, number: int, seconds: float, megabytes: float, work: Work, written: int) -> None:
    """Record a block as done.

    The file is closed each time, which makes a network file system show the record to other machines.

    Args:
        file: the worker's own, see `new_record_file`.
        number: of the block in the grid, from 0.
        seconds: how long the block took.
        megabytes: most memory that the worker has taken so far.
        work: voxels.
        written: bytes.
    """
    record = np.array((number + 1, seconds, megabytes, time.time(), *work, written), RECORD).tobytes()
    opened = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        if os.write(opened, record) < len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(opened)


def record_files(markers: Path) -> set[Path]:
    """The files in which workers recorded blocks."""
    return {file for file in (markers / "done").glob("*") if file.is_file()}


def records_in(files: set[Path]) -> NDArray[Any]:
    """All records in these files; a last one that is incomplete is left out.

    Their `time` is in seconds since 1970. In those of an earlier version, it may be that of the file, and voxels and
    bytes are 0.
    """
    found = [np.empty(0, RECORD)]
    for file in sorted(files):
        stored = np.fromfile(file, FORMATS.get(file.suffix, UNTIMED))
        records = np.zeros(len(stored), RECORD)
        records["time"] = file.stat().st_mtime
        for name in stored.dtype.names or ():
            records[name] = stored[name]
        found.append(records)
    return np.concatenate(found)


def give_up(markers: Path, failed: Sequence[Report]) -> None:
    """Record blocks that fail as ones to go on without, for good: what is made from the others counts on it."""
    with write_whole(markers / GIVEN_UP) as partial:
        partial.write_text(json.dumps([asdict(report) for report in failed], indent=1), encoding="utf-8")


def given_up(markers: Path) -> list[Report]:
    """The blocks that the step goes on without.

    Raises:
        UserError: the file is damaged.
    """
    file = markers / GIVEN_UP
    if not file.is_file():
        return []
    try:
        return [Report(**report) for report in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: set DATA.DROP_DS_MONGOTABLE True to do this step anew") from error


def missing_blocks(markers: Path) -> list[list[list[float]]]:
    """Where the blocks are that the step goes on without: begin and shape of each in nm, z, y, x."""
    return [[report.begin, report.shape] for report in given_up(markers)]


def finished(step: BlockStep) -> NDArray[np.bool_]:
    """Which blocks are recorded as done, or given up, over the grid of blocks.

    Raises:
        UserError: what is recorded are blocks of another grid.
    """
    done = np.zeros(math.prod(step.grid), bool)
    if not step.markers.is_dir():
        return done.reshape(step.grid)
    before = read_settings(step.markers)
    changed = [key for key, roi in _rois(step).items() if before and before.get(key) != roi]
    if changed:
        raise UserError(
            f"{step.markers} describes blocks of another size or volume ({changed[0]} was {before[changed[0]]}, is "
            f"{_rois(step)[changed[0]]}): use the BLOCK_SIZE and CONTEXT that they were made with, or make them anew"
        )
    numbers = records_in(record_files(step.markers))["block"]
    done[numbers[(numbers > 0) & (numbers <= done.size)].astype(np.int64) - 1] = True
    done[[report.block for report in given_up(step.markers)]] = True
    return done.reshape(step.grid) | _finished_by_version_0_1(step)


def finished_blocks(step: BlockStep) -> int:
    """Number of blocks that are recorded as done."""
    return int(np.count_nonzero(finished(step)))


def blocks_left(step: BlockStep) -> int:
    """Number of blocks that are not done yet; those that are skipped or given up count as done."""
    done = finished(step)
    return int(done.size - np.count_nonzero(done if step.skip is None else done | step.skip))


def discard_markers(markers: Path) -> None:
    """Remove the record of what is done: the next run does every block, with any settings.

    Raises:
        UserError: a run is at work there.
    """
    with step_lock(markers):
        shutil.rmtree(markers, ignore_errors=True)


def begun_before(anew: bool, markers: Path, find: Callable[..., Found | None], *arguments: Any) -> Found | None:
    """Return what an earlier run has begun and this one goes on with, None if it has to start over.

    A run that starts over, and is ended, goes on when the same command is given again.

    Args:
        anew: start over (DATA.DROP_DS_MONGOTABLE).
        markers: of the step.
        find: returns what was begun, None if nothing was.
        arguments: for `find`.

    Raises:
        UserError: of `find`, unless the run starts over.
    """
    if not anew:
        return find(*arguments)
    if (markers / BEGUN_ANEW).is_file():
        with suppress(UserError):
            return find(*arguments)
    return None


def complete(step: BlockStep) -> None:
    """Record that nothing is left of a step: the next run that is to start over does."""
    (step.markers / BEGUN_ANEW).unlink(missing_ok=True)


def block_begun(markers: Path) -> list[float] | None:
    """The shape in nm of the blocks that finished ones have, None if there are none yet.

    Raises:
        UserError: the file is damaged.
    """
    recorded = read_settings(markers).get(WRITTEN)
    return None if recorded is None else recorded[1]


def read_settings(markers: Path) -> dict[str, Any]:
    """The settings that the finished blocks were made with, empty if there are none yet.

    Raises:
        UserError: the file is damaged.
    """
    file = markers / "settings.json"
    if not file.is_file():
        return {}
    return read_json(file, "set DATA.DROP_DS_MONGOTABLE True to do this step anew")


def check_settings(step: BlockStep) -> None:
    """Record the settings that the finished blocks depend on.

    Raises:
        UserError: they were made with other settings.
    """
    settings = json.loads(json.dumps(_rois(step) | step.settings))
    before = read_settings(step.markers)
    if not before:
        with write_whole(step.markers / "settings.json") as partial:
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return
    changed = [
        f"{key} (was {before.get(key)}, is {settings.get(key)})"
        for key in before | settings
        if before.get(key) != settings.get(key)
    ]
    if changed:
        count = len(np.unique(records_in(record_files(step.markers))["block"]))
        raise UserError(
            f"{', '.join(changed)} changed, which makes {count} finished blocks of {step} invalid: set "
            "DATA.DROP_DS_MONGOTABLE True to start over, or change back"
        )


def _rois(step: BlockStep) -> dict[str, list[list[float]]]:
    """What the grid of blocks depends on."""
    rois = {"volume (nm)": step.total_roi, "block (nm)": step.read_roi, WRITTEN: step.write_roi}
    return {key: list(step.in_nanometers(roi)) for key, roi in rois.items()}


def _finished_by_version_0_1(step: BlockStep) -> NDArray[np.bool_]:
    """Blocks that version 0.1 finished: daisy kept a byte for each, in a grid that begins with the context."""
    done = np.zeros(step.grid, bool)
    folder = step.markers / "blocks" / "done"
    file = folder.joinpath("c", *"0" * len(step.grid))
    if not file.is_file():
        return done
    shape = read_json(folder / "zarr.json", f"delete {folder}")["shape"]
    context = (step.write_roi.begin - step.total_roi.begin) / step.write_roi.shape
    kept = np.fromfile(file, np.uint8)
    if kept.size == math.prod(shape):
        kept = kept.reshape(shape)[*(slice(first, first + n) for first, n in zip(context, step.grid, strict=True))]
        done[*(slice(n) for n in kept.shape)] = kept > 0
    return done
