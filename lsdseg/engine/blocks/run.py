"""Runs a step: which blocks are left, workers for them, progress, and how it went.

daisy does the scheduling, retries, timeouts and done markers (`markers.py`). `supervisor.py` keeps the workers going,
whatever they are (`workers.py`), and `worker.py` is one of them.
"""

import errno
import functools
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import daisy
from daisy.logging import set_log_basedir
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.loader import dump_config
from lsdseg.engine.blocks.lock import run_lock, step_lock
from lsdseg.engine.blocks.markers import (
    RETRIES,
    allocate_markers,
    blocks_left,
    check_settings,
    daisy_task,
    finished_blocks,
    total_blocks,
)
from lsdseg.engine.blocks.step import BlockStep, Summary
from lsdseg.engine.blocks.supervisor import STOPPED, supervise
from lsdseg.engine.blocks.workers import workers_class
from lsdseg.engine.signals import signal_handlers
from lsdseg.errors import UserError
from lsdseg.files import cannot_write, room_on_disk


def run_blocks(cfg: CfgNode, step: BlockStep) -> Summary:
    """Do all blocks of a step that are not done yet, on SYSTEM.NUM_WORKERS workers.

    Writes daisy_logs/SAMPLE_STEP/config_0.yaml (no password is in it) and the workers' logs beside it. Ctrl-C, SIGTERM
    and SIGHUP end all workers; what is done stays done, and the next call does the rest.

    Returns:
        How it went; all blocks are done.

    Raises:
        UserError: finished blocks were made with other settings; another run is at work here; the scheduler of
            CLUSTER.TYPE is missing or refuses jobs; workers cannot start; blocks failed RETRIES + 1 times.
    """
    workers_class(cfg).check_installed()
    with step_lock(step.markers), run_lock(step.folder / "lock", f"in {step.folder}"):
        with room_on_disk(step.markers), room_on_disk(step.folder):
            check_settings(step)
            _prepare_folder(cfg, step)
        total = total_blocks(step)
        skipped = total - blocks_left(step)
        if skipped >= total:
            print(f"{step}: nothing to do, all {total} blocks are done")
            return Summary(total, 0, total, 0)
        workers = min(max(cfg.SYSTEM.NUM_WORKERS, 1), total - skipped)
        print(f"{step}: {total} blocks, {skipped} of them done before or skipped")
        print(f"workers: {workers} ({cfg.CLUSTER.TYPE}), their logs are in {step.folder}")
        summary, first_error = _schedule(cfg, step, workers, total)
        print(summary)
        _raise_if_incomplete(step, summary, first_error)
        return summary


def _schedule(cfg: CfgNode, step: BlockStep, workers: int, total: int) -> tuple[Summary, str | None]:
    """Let daisy hand out the blocks; returns how it went, and the first error that a worker reported."""
    task = daisy_task(step)
    task.process_function = functools.partial(supervise, cfg, step.folder, step.markers, step.gpu, workers)
    server = daisy.Server()
    set_log_basedir(None)
    progress = _Progress(str(step), step.markers)
    try:
        with _interrupted_by_any_signal() as received:
            states = server.run_blockwise(task, progress=progress, host=workers_class(cfg).host(cfg), summary=False)
    except KeyboardInterrupt:
        finished = finished_blocks(step.markers)
        print(f"{step}: ended; {finished} of {total} blocks are done, the same command does the rest")
        if received:
            sys.exit(128 + received[0])
        raise
    except RuntimeError as error:  # how daisy reports what happens to its markers
        if "No space left on device" not in str(error):
            raise
        raise cannot_write(step.markers, OSError(errno.ENOSPC, "No space left on device")) from error
    state = states[step.name]
    resources: Any = server.last_tracking_summary
    costs = resources["per_task"][step.name]
    summary = Summary(
        blocks=total,
        done=state.completed_count - state.skipped_count,
        skipped=state.skipped_count,
        failed=state.failed_count,
        seconds_per_block=costs["mean_block_ms"] / 1000,
        peak_memory=costs["max_peak_rss_bytes"],
    )
    return summary, state.first_worker_error


def _prepare_folder(cfg: CfgNode, step: BlockStep) -> None:
    """Write what workers read, and remove the reason why the last run stopped."""
    dump_config(cfg, step.folder / "config_0.yaml")
    worker = {"open_worker": step.open_worker, "arguments": step.arguments}
    (step.folder / "step.json").write_text(json.dumps(worker, indent=1), encoding="utf-8")
    (step.folder / STOPPED).unlink(missing_ok=True)


def _raise_if_incomplete(step: BlockStep, summary: Summary, first_error: str | None) -> None:
    left = summary.blocks - summary.done - summary.skipped
    if not left:
        return
    remedy = f"{left} of {summary.blocks} blocks are not done, and the same command does only these"
    stopped = step.folder / STOPPED
    if stopped.is_file():
        raise UserError(f"{stopped.read_text(encoding='utf-8')}; {remedy}")
    if not summary.failed:
        raise UserError(f"the supervisor of the workers was killed; {remedy}")
    print(f"\nThe first block that failed:\n{first_error}", file=sys.stderr)
    raise UserError(f"blocks of {step} failed {RETRIES + 1} times, see {step.folder}; {remedy}")


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
    """daisy's observer: one bar that counts blocks."""

    def __init__(self, what: str, markers: Path):
        self.what, self.markers = what, markers

    def on_start(self, states: dict[str, Any]) -> None:
        (state,) = states.values()
        allocate_markers(self.markers)
        self.bar = tqdm(total=state.total_block_count, desc=self.what, unit="block")

    def on_progress(self, states: dict[str, Any]) -> None:
        (state,) = states.values()
        self.bar.set_postfix(failed=state.failed_count, refresh=False)
        self.bar.update(state.completed_count - self.bar.n)

    def on_finish(self, states: dict[str, Any]) -> None:
        self.on_progress(states)
        self.bar.close()
