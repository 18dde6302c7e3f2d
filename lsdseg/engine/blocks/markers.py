"""Markers of finished blocks: the one place that knows daisy's files.

daisy records in zarr arrays, one byte per block, which blocks are done. They lie beside the outputs that they describe,
together with the settings that these depend on: resuming with others would mix two results, so it is refused.
"""

import json
import math
import os
import shutil
from pathlib import Path

import daisy
import numpy as np

from lsdseg.engine.blocks.lock import step_lock
from lsdseg.engine.blocks.step import BlockStep
from lsdseg.errors import UserError
from lsdseg.files import write_whole

RETRIES = 3


def daisy_task(step: BlockStep) -> daisy.Task:
    """The step as daisy schedules it, without the function that starts the workers."""
    return daisy.Task(
        step.name,
        step.total_roi,
        step.read_roi,
        step.write_roi,
        read_write_conflict=False,
        fit="shrink",
        max_workers=1,  # the supervisor, which starts the workers
        max_worker_restarts=0,
        max_retries=RETRIES,
        timeout=step.timeout,
        tracking_path=str(step.markers / "blocks"),
        resource_tracking=True,
        skip_mask=step.skip,
    )


def total_blocks(step: BlockStep) -> int:
    """Number of blocks of a step."""
    return math.prod(daisy_task(step).block_grid_shape)


def blocks_left(step: BlockStep) -> int:
    """Number of blocks that are not done yet; those that are skipped count as done."""
    skipped = 0 if step.skip is None else np.count_nonzero(step.skip)
    return int(total_blocks(step) - skipped - finished_blocks(step.markers))


def finished_blocks(markers: Path) -> int:
    """Number of blocks that are recorded as done."""
    files = (file for file in (markers / "blocks" / "done" / "c").rglob("*") if file.is_file())
    return sum(int(np.count_nonzero(np.fromfile(file, np.uint8))) for file in files)


def allocate_markers(markers: Path) -> None:
    """Give all of daisy's marker files their room on disk.

    daisy maps them into memory: a full disk, when a page of one is first written, would end the master by SIGBUS.
    """
    for header in (markers / "blocks").glob("*/zarr.json"):
        array = json.loads(header.read_text(encoding="utf-8"))
        if array["node_type"] != "array":
            continue
        chunk = array["chunk_grid"]["configuration"]["chunk_shape"]
        size = math.prod(chunk) * np.dtype(array["data_type"]).itemsize
        for index in np.ndindex(*(-(-n // c) for n, c in zip(array["shape"], chunk, strict=True))):
            file = header.parent.joinpath("c", *map(str, index))
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "ab") as opened:
                os.posix_fallocate(opened.fileno(), 0, size)


def discard_markers(markers: Path) -> None:
    """Remove the record of what is done: the next run does every block, with any settings.

    Raises:
        UserError: a run is at work there.
    """
    with step_lock(markers):
        shutil.rmtree(markers, ignore_errors=True)


def check_settings(step: BlockStep) -> None:
    """Record the settings that the finished blocks depend on.

    Raises:
        UserError: they were made with other settings.
    """
    rois = {"volume (nm)": step.total_roi, "block (nm)": step.read_roi, "block without context (nm)": step.write_roi}
    settings = {key: [list(roi.offset), list(roi.shape)] for key, roi in rois.items()} | step.settings
    settings = json.loads(json.dumps(settings))
    file = step.markers / "settings.json"
    if not file.is_file():
        with write_whole(file) as partial:
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [
        f"{key} (was {before.get(key)}, is {settings.get(key)})"
        for key in before | settings
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(
            f"{', '.join(changed)} changed, which makes {finished_blocks(step.markers)} finished blocks of {step} "
            "invalid: set DATA.DROP_DS_MONGOTABLE True to start over, or change back"
        )
