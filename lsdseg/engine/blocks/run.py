"""The one place that runs blocks: what is to be done, which blocks are done already, and how it went.

daisy does the scheduling, retries, timeouts and done markers; `supervisor.py` keeps the workers going, `worker.py` is
one of them. Done markers lie beside the outputs that they describe, together with the settings that these depend on:
resuming with others would mix two results, so it is refused.
"""

import errno
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import daisy
import numpy as np
from daisy.logging import set_log_basedir
from funlib.geometry import Roi
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.loader import dump_config
from lsdseg.engine.blocks.slurm import check_installed
from lsdseg.engine.blocks.supervisor import finished_blocks, keep_workers
from lsdseg.engine.signals import handled
from lsdseg.errors import UserError
from lsdseg.files import cannot_write, room_on_disk, write_whole

LOGS = "daisy_logs"
RETRIES = 3
SECONDS_TO_WAIT = 20


@dataclass
class BlockTask:
    """What is to be done with every block of a volume. ROIs in nm, z, y, x.

    Attributes:
        name, sample: the task and the volume it works on; logs go to daisy_logs/SAMPLE_NAME/.
        total_roi: everything that is read: the volume, grown by the context.
        read_roi, write_roi: of the first block; they differ by the context. Blocks at the end are cut off.
        open_worker: "module:function", called once in every worker as function(cfg, arguments); what it returns is
            called with each `daisy.Block`. A block may be done twice, or be broken off and done again, so doing it
            must replace what is there. A UserError ends the whole run.
        arguments: for open_worker; what JSON can hold, paths absolute.
        markers: folder that records which blocks are done; it belongs beside the outputs that it describes.
        settings: {key: value} of all settings on which the result depends; finished blocks are only good for these.
        gpu: workers use a GPU.
        timeout: seconds after which a block counts as stuck and its worker is replaced.
        skip: bool array over the grid of blocks, True for those that need not be done. None: do all.
    """

    name: str
    sample: str
    total_roi: Roi
    read_roi: Roi
    write_roi: Roi
    open_worker: str
    arguments: dict[str, Any]
    markers: Path
    settings: dict[str, Any] = field(default_factory=dict)
    gpu: bool = False
    timeout: float = 3600.0
    skip: np.ndarray | None = None

    @property
    def folder(self) -> Path:
        """Where config, task and logs go: daisy_logs/SAMPLE_NAME below the current directory."""
        return Path(LOGS, f"{self.sample}_{self.name}").absolute()


@dataclass
class Summary:
    """How a run went: numbers of blocks (`skipped` were done before, or masked), seconds per block, bytes of memory."""

    blocks: int
    done: int
    skipped: int
    failed: int
    seconds_per_block: float = 0.0
    peak_memory: int = 0

    def __str__(self) -> str:
        titles = ("blocks", "done", "skipped", "failed", "s per block", "peak memory of a worker")
        memory = f"{self.peak_memory / 1e9:.2f} GB"
        values = (self.blocks, self.done, self.skipped, self.failed, f"{self.seconds_per_block:.2f}", memory)
        return "\n".join(
            "".join(f"{cell:>{len(title) + 3}}" for cell, title in zip(row, titles, strict=True))
            for row in (titles, values)
        )


def run_blocks(cfg: CfgNode, task: BlockTask) -> Summary:
    """Do all blocks of a task that are not done yet, on SYSTEM.NUM_WORKERS workers.

    Writes daisy_logs/SAMPLE_NAME/config_0.yaml (no password is in it) and the workers' logs beside it. Ctrl-C, SIGTERM
    and SIGHUP end all workers; what is done stays done, and the next call does the rest.

    Raises:
        UserError: finished blocks were made with other settings; another run is at work here; Slurm is missing or
            refuses jobs; workers cannot start; blocks failed RETRIES + 1 times.
    """
    if cfg.CLUSTER.TYPE == "slurm":
        check_installed()
    with room_on_disk(task.markers), room_on_disk(task.folder):
        _check_settings(task)
        task.folder.mkdir(parents=True, exist_ok=True)

    with _alone(task.folder), _alone(task.markers):
        return _run_alone(cfg, task)


def _run_alone(cfg: CfgNode, task: BlockTask) -> Summary:
    with room_on_disk(task.folder):
        _prepare_folder(cfg, task)
    what = f"{task.name} of {task.sample}"
    daisy_task = _daisy_task(task)
    total = math.prod(daisy_task.block_grid_shape)
    skipped = total - blocks_left(task)
    if skipped >= total:
        print(f"{what}: nothing to do, all {total} blocks are done")
        return Summary(total, 0, total, 0)
    workers = min(max(cfg.SYSTEM.NUM_WORKERS, 1), total - skipped)
    print(f"{what}: {total} blocks, {skipped} of them done before or skipped")
    print(f"workers: {workers} ({cfg.CLUSTER.TYPE}), their logs are in {task.folder}")

    daisy_task.process_function = functools.partial(keep_workers, cfg, task.folder, task.markers, task.gpu, workers)
    server = daisy.Server()
    set_log_basedir(None)
    try:
        with _heeding_all_signals() as received:
            states = server.run_blockwise(
                daisy_task, progress=_Progress(what, task.markers), host=_host(cfg), summary=False
            )
    except KeyboardInterrupt:
        finished = finished_blocks(task.markers)
        print(f"{what}: ended; {finished} of {total} blocks are done, the same command does the rest")
        if received:
            sys.exit(128 + received[0])
        raise
    except RuntimeError as error:  # how daisy reports what happens to its markers
        if "No space left on device" not in str(error):
            raise
        raise cannot_write(task.markers, OSError(errno.ENOSPC, "No space left on device")) from error
    state = states[task.name]
    costs = server.last_tracking_summary["per_task"][task.name]
    summary = Summary(
        blocks=total,
        done=state.completed_count - state.skipped_count,
        skipped=state.skipped_count,
        failed=state.failed_count,
        seconds_per_block=costs["mean_block_ms"] / 1000,
        peak_memory=costs["max_peak_rss_bytes"],
    )
    print(summary)
    _raise_if_incomplete(task, summary, state.first_worker_error)
    return summary


def forget(markers: Path) -> None:
    """Remove a task's record of what is done: the next run does every block, with any settings.

    Raises:
        UserError: a run is at work there.
    """
    if markers.is_dir():
        with _alone(markers):
            pass  # whoever worked there has ended
        shutil.rmtree(markers, ignore_errors=True)


def blocks_left(task: BlockTask) -> int:
    """Number of blocks that are not done yet; those that are skipped count as done."""
    total = math.prod(_daisy_task(task).block_grid_shape)
    skipped = 0 if task.skip is None else np.count_nonzero(task.skip)
    return int(total - skipped - finished_blocks(task.markers))


def _allocate(markers: Path) -> None:
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


def _host(cfg):
    """Address that the workers connect to; None lets daisy find the one under which other machines reach this one."""
    return "127.0.0.1" if cfg.CLUSTER.TYPE == "local" else cfg.CLUSTER.HOST or None


def _daisy_task(task):
    return daisy.Task(
        task.name,
        task.total_roi,
        task.read_roi,
        task.write_roi,
        read_write_conflict=False,
        fit="shrink",
        max_workers=1,  # the process that keeps the workers
        max_worker_restarts=0,
        max_retries=RETRIES,
        timeout=task.timeout,
        tracking_path=str(task.markers / "blocks"),
        resource_tracking=True,
        skip_mask=task.skip,
    )


def _prepare_folder(cfg, task):
    dump_config(cfg, task.folder / "config_0.yaml")
    worker = {"open_worker": task.open_worker, "arguments": task.arguments}
    (task.folder / "task.json").write_text(json.dumps(worker, indent=1), encoding="utf-8")
    (task.folder / "stopped").unlink(missing_ok=True)


def _check_settings(task):
    """Record the settings that the finished blocks depend on; UserError if they were made with others."""
    rois = {"volume (nm)": task.total_roi, "block (nm)": task.read_roi, "block without context (nm)": task.write_roi}
    settings = {key: [list(roi.offset), list(roi.shape)] for key, roi in rois.items()} | task.settings
    settings = json.loads(json.dumps(settings))
    file = task.markers / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{key} (was {before.get(key)}, is {settings.get(key)})"
            for key in before | settings
            if before.get(key) != settings.get(key)
        ]
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed, which makes {finished_blocks(task.markers)} finished blocks of "
                f"{task.name} of {task.sample} invalid: set DATA.DROP_DS_MONGOTABLE True to start over, or change back"
            )
        return
    with write_whole(file) as partial:
        partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _raise_if_incomplete(task, summary, first_error):
    left = summary.blocks - summary.done - summary.skipped
    if not left:
        return
    remedy = f"{left} of {summary.blocks} blocks are not done, and the same command does only these"
    stopped = task.folder / "stopped"
    if stopped.is_file():
        raise UserError(f"{stopped.read_text(encoding='utf-8')}; {remedy}")
    if not summary.failed:
        raise UserError(f"the process that looks after the workers was killed; {remedy}")
    print(f"\nThe first block that failed:\n{first_error}", file=sys.stderr)
    raise UserError(f"blocks of {task.name} of {task.sample} failed {RETRIES + 1} times, see {task.folder}; {remedy}")


@contextmanager
def _alone(folder: Path):
    """Keep other runs out of a folder. What is left of a run that was killed ends within seconds: it is waited for."""
    with open(folder / "lock", "w") as file:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another run works with {folder}: wait for its end, or start this one in another folder, "
                        "with another DATA.OUTFILE if it is the same volume and checkpoint"
                    ) from None
                time.sleep(0.2)
        yield


@contextmanager
def _heeding_all_signals():
    """Let SIGTERM and SIGHUP end daisy's run as Ctrl-C does; gives a list of those received."""
    received = []

    def interrupt(number, _):
        received.append(number)
        signal.raise_signal(signal.SIGINT)  # the one that daisy listens for

    with handled(interrupt, signal.SIGTERM, signal.SIGHUP):
        yield received


class _Progress:
    """daisy's observer: one bar that counts blocks."""

    def __init__(self, what, markers):
        self.what, self.markers = what, markers

    def on_start(self, states):
        (state,) = states.values()
        _allocate(self.markers)
        self.bar = tqdm(total=state.total_block_count, desc=self.what, unit="block")

    def on_progress(self, states):
        (state,) = states.values()
        self.bar.set_postfix(failed=state.failed_count, refresh=False)
        self.bar.update(state.completed_count - self.bar.n)

    def on_finish(self, states):
        self.on_progress(states)
        self.bar.close()
