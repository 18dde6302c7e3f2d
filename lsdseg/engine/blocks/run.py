"""Runs a step: which blocks are left, workers for them, progress, and how it went.

daisy does the scheduling, retries and timeouts. `markers.py` knows which blocks are done. `supervisor.py` keeps the
workers going, whatever they are (`workers.py`), and `worker.py` is one of them.
"""

import functools
import itertools
import json
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import daisy
import numpy as np
from daisy.logging import set_log_basedir
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.loader import dump_config
from lsdseg.engine.blocks.life import Listener
from lsdseg.engine.blocks.lock import run_lock, step_lock
from lsdseg.engine.blocks.markers import (
    BEGUN_ANEW,
    blocks_left,
    check_settings,
    finished,
    give_up,
    given_up,
    record_files,
    records_in,
)
from lsdseg.engine.blocks.rates import Rate, keep_rate
from lsdseg.engine.blocks.reports import MOST_LISTED, Report, clear_reports, failed_blocks
from lsdseg.engine.blocks.step import RETRIES, SKIPPED, STEP, BlockStep, Summary
from lsdseg.engine.blocks.supervisor import ALIVE, STOPPED, supervise
from lsdseg.engine.blocks.workers import workers_class
from lsdseg.engine.signals import signal_handlers
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk, write_whole

SECONDS_BETWEEN_LINES = 30  # in a log
SECONDS_OF_SILENCE = 30  # after which the supervisor is replaced


def run_blocks(cfg: CfgNode, step: BlockStep) -> Summary:
    """Do all blocks of a step that are not done yet, on SYSTEM.NUM_WORKERS workers.

    Writes daisy_logs/SAMPLE_STEP/config_0.yaml (no password is in it) and the workers' logs beside it. Ctrl-C, SIGTERM
    and SIGHUP end all workers; what is done stays done, and the next call does the rest.

    Returns:
        How it went; all blocks are done, or given up with CLUSTER.SKIP_FAILED.

    Raises:
        UserError: finished blocks were made with other settings; another run is at work here; the scheduler of
            CLUSTER.TYPE is missing or refuses jobs; workers cannot start; blocks failed RETRIES + 1 times.
    """
    workers_class(cfg).check_installed()
    with step_lock(step.markers), run_lock(step.folder / "lock", f"in {step.folder}"):
        with room_on_disk(step.markers), room_on_disk(step.folder):
            check_settings(step)
            if cfg.DATA.DROP_DS_MONGOTABLE:
                (step.markers / BEGUN_ANEW).touch()
            _prepare_folder(cfg, step)
        total, left = math.prod(step.grid), blocks_left(step)
        if not left:
            missing = given_up(step.markers)
            without = f" but {len(missing)}, which are given up" if missing else ""
            print(f"{step}: nothing to do, all {total} blocks are done{without}")
            return Summary(total, 0, total, 0)
        workers = min(max(cfg.SYSTEM.NUM_WORKERS, 1), left)
        print(f"{step}: {total} blocks, {total - left} of them done before or skipped")
        print(f"workers: {workers} ({cfg.CLUSTER.TYPE}), their logs are in {step.folder}")
        recorded_before, began = record_files(step.markers), time.monotonic()
        try:
            failed, error, reason = _do_all(cfg, step, workers)
        finally:
            files = record_files(step.markers) - recorded_before
            if step.rate:
                keep_rate(cfg, step.rate(workers), Rate.of_workers(records_in({file}) for file in files))
        records = records_in(files)
        summary = Summary(
            blocks=total,
            done=left - blocks_left(step),
            skipped=total - left,
            failed=failed,
            seconds_per_block=float(records["seconds"].mean()) if len(records) else 0.0,
            seconds=float(records["seconds"].sum(dtype=np.float64)),
            bytes=int(records["bytes"].sum(dtype=np.float64)),
            elapsed=time.monotonic() - began,
            peak_memory=int(records["megabytes"].max(initial=0) * 1e6),
        )
        print(summary)
        _end_incomplete(cfg, step, summary, error, reason)
        return summary


def _do_all(cfg: CfgNode, step: BlockStep, workers: int) -> tuple[int, str | None, str]:
    """Schedule the blocks that are left until all are done, some failed for good, or nothing gets done any more.

    Returns:
        As `_schedule`.
    """
    left, rounds_in_vain = blocks_left(step), 0
    while True:
        result = _schedule(cfg, step, workers)
        failed, _, reason = result
        before, left = left, blocks_left(step)
        rounds_in_vain = rounds_in_vain + 1 if left == before else 0
        if not left or failed or (step.folder / STOPPED).is_file() or rounds_in_vain > RETRIES:
            return result
        print(f"{step}: {reason}; starting new workers for the {left} blocks that are left", flush=True)


def _schedule(cfg: CfgNode, step: BlockStep, workers: int) -> tuple[int, str | None, str]:
    """Let daisy hand out the blocks that are left.

    Returns:
        How many blocks failed, the first error that was reported, and why blocks are left if none failed.
    """
    done = finished(step)
    task = daisy.Task(
        # Workers have to know the name of the task, so nobody else takes its blocks.
        f"{step.name}-{secrets.token_hex(8)}",
        step.total_roi,
        step.read_roi,
        step.write_roi,
        functools.partial(supervise, cfg, step.folder, step.markers, step.gpu, workers, step.timeout + step.silence),
        read_write_conflict=False,
        fit="shrink",
        max_workers=1,  # the supervisor, which starts the workers
        max_worker_restarts=0,
        max_retries=RETRIES,
        timeout=step.timeout,
        skip_mask=done if step.skip is None else done | step.skip,
    )
    set_log_basedir(None)
    progress = _Progress(str(step))
    try:
        with _interrupted_by_any_signal() as received, _watched(step.folder / ALIVE), _without_messages_of_daisy():
            states = daisy.Server().run_blockwise(
                task, progress=progress, host=workers_class(cfg).host(cfg), summary=False, block_tracking=False
            )
    except KeyboardInterrupt:
        print(f"{step}: ended; {blocks_left(step)} of {done.size} blocks are left, the same command does the rest")
        if received:
            sys.exit(128 + received[0])
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how daisy ends when it is asked for a task that it does not have
            raise
        return 0, None, "a program that is no worker of this run asked for blocks"
    state = states[task.task_id]
    if state.completed_count == state.total_block_count:
        reason = "a program that is no worker of this run said that it did blocks"
    else:
        last_line = (state.last_worker_error or "").strip().rpartition("\n")[2]
        reason = f"the supervisor of the workers was killed ({last_line})"
    return state.failed_count, state.first_worker_error, reason


def _prepare_folder(cfg: CfgNode, step: BlockStep) -> None:
    """Write what workers read, and remove the reason why the last run stopped."""
    _keep_those_of_another_volume(step)
    dump_config(cfg, step.folder / "config_0.yaml")
    first, block = step.first_block
    clear_reports(step.folder)
    worker = {"open_worker": step.open_worker, "arguments": step.arguments}
    grid = {"begin": first, "block": block, "grid": step.grid, "per_nanometer": step.per_nanometer}
    with write_whole(step.folder / STEP) as partial:
        partial.write_text(json.dumps(worker | grid | {"markers": str(step.markers)}, indent=1), encoding="utf-8")
    (step.folder / SKIPPED).unlink(missing_ok=True)
    if step.skip is not None:
        np.packbits(step.skip).tofile(step.folder / SKIPPED)
    for name in (STOPPED, ALIVE):
        (step.folder / name).unlink(missing_ok=True)


def _keep_those_of_another_volume(step: BlockStep) -> None:
    """Move config and logs aside that belong to another volume whose sample has the same name, of another home."""
    folder, volume = step.folder, step.arguments.get("volume")
    try:
        before = json.loads((folder / STEP).read_text(encoding="utf-8"))["arguments"]["volume"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before == volume:
        return
    number = next(n for n in itertools.count(1) if not (folder / f"earlier_{n}").exists())
    aside = folder / f"earlier_{number}"
    aside.mkdir()
    for file in [folder / "config_0.yaml", folder / STEP, *folder.glob("worker_*.log")]:
        if file.is_file():
            file.rename(aside / file.name)
    print(f"config and logs of {before} are now in {aside}")


def _end_incomplete(cfg: CfgNode, step: BlockStep, summary: Summary, error: str | None, reason: str) -> None:
    """Give up the blocks that are left, if all of them failed and that is allowed; else say why they are left."""
    left = summary.blocks - summary.done - summary.skipped
    if not left:
        return
    remedy = f"{left} of {summary.blocks} blocks are not done, and the same command does only these"
    stopped = step.folder / STOPPED
    if stopped.is_file():
        raise UserError(f"{stopped.read_text(encoding='utf-8')}; {remedy}")
    if not summary.failed:
        raise UserError(f"{reason}; {remedy}")
    failed = _blocks_that_failed(step) if summary.failed == left else []
    if cfg.CLUSTER.SKIP_FAILED and step.may_skip and failed:
        give_up(step.markers, failed + given_up(step.markers))
        print(f"{step}: goes on without {left} blocks that failed {RETRIES + 1} times:\n{_listed(failed)}")
        return
    print(f"\nThe first block that failed:\n{error}" if error else "", _listed(failed), sep="\n", file=sys.stderr)
    go_on = "; to go on without them, set CLUSTER.SKIP_FAILED True" if step.may_skip else ""
    raise UserError(f"blocks of {step} failed {RETRIES + 1} times, see {step.folder}; {remedy}{go_on}")


def _blocks_that_failed(step: BlockStep) -> list[Report]:
    """Describe each block that is not done. One that took its worker with it left no report."""
    reports = failed_blocks(step.folder)
    left = np.flatnonzero(~(finished(step) | (False if step.skip is None else step.skip))).tolist()
    silent = "it took too long, or its worker died"
    return [reports.get(number) or Report.at(number, step.grid, *step.first_block, error=silent) for number in left]


def _listed(failed: list[Report]) -> str:
    more = [f"  and {len(failed) - MOST_LISTED} more"] * (len(failed) > MOST_LISTED)
    return "\n".join(
        [f"  block {one.block}, {one.place}: {one.error}{one.log and f' ({one.log})'}" for one in failed[:MOST_LISTED]]
        + more
    )


@contextmanager
def _watched(alive: Path) -> Iterator[None]:
    """Kill the supervisor if it gives no sign of life; its workers end with it."""
    ended = threading.Event()

    def watch() -> None:
        listener = Listener(alive)
        while not ended.wait(1):
            if listener.silence() > SECONDS_OF_SILENCE:
                with suppress(OSError, ValueError):
                    os.kill(int(alive.read_text(encoding="utf-8")), signal.SIGKILL)
                listener = Listener(alive)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def _without_messages_of_daisy() -> Iterator[None]:
    """Keep out of the terminal what daisy writes there itself: the traceback of each block that failed, each time.

    It is in the workers' logs, and daisy names the task, which is the run's secret.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nowhere, open(terminal, "w", buffering=1, encoding="utf-8") as stderr:
        os.dup2(nowhere.fileno(), 2)
        before, sys.stderr = sys.stderr, stderr
        try:
            yield
        finally:
            sys.stderr = before
            os.dup2(terminal, 2)


@contextmanager
def _interrupted_by_any_signal() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP end daisy's run as Ctrl-C does; gives a list of those received."""
    received = []

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)  # the one that daisy listens for

    with signal_handlers(interrupt, signal.SIGTERM, signal.SIGHUP):
        yield received


class _Progress:
    """daisy's observer: one bar that counts blocks; where that is no terminal but a log, a line now and then."""

    def __init__(self, what: str):
        self.what = what

    def on_start(self, states: dict[str, Any]) -> None:
        (state,) = states.values()
        in_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=state.total_block_count, desc=self.what, unit="block", disable=not in_terminal)
        self.next_line = math.inf if in_terminal else time.monotonic() + SECONDS_BETWEEN_LINES

    def on_progress(self, states: dict[str, Any]) -> None:
        (state,) = states.values()
        self.bar.set_postfix(failed=state.failed_count, refresh=False)
        self.bar.update(state.completed_count - self.bar.n)
        if time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            failed = f", {state.failed_count} failed" if state.failed_count else ""
            print(f"{self.what}: {state.completed_count} of {state.total_block_count} blocks{failed}", flush=True)

    def on_finish(self, states: dict[str, Any]) -> None:
        self.on_progress(states)
        self.bar.close()
