"""Keeps the workers of a run going: starts them, replaces those that die, and ends them all with the run.

daisy could start one process per worker, which would have to stay for as long as its worker does. It starts a single
process that runs `supervise` instead. So there is one place from which all workers are ended, and it outlives the
master: daisy's port is closed when the run is over, however it ended, and then every worker is killed and every job
canceled.
"""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import daisy
from yacs.config import CfgNode

from lsdseg.config.loader import CHECKOUT
from lsdseg.engine.blocks.life import Listener, end_with_parent, show_life
from lsdseg.engine.blocks.lock import workers_lock
from lsdseg.engine.blocks.markers import new_record_file, record_files
from lsdseg.engine.blocks.reports import failures, same_error
from lsdseg.engine.blocks.step import RETRIES, STEP
from lsdseg.engine.blocks.workers import Workers, workers_class
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk, write_whole

# Workers that may end one after the other without a block getting done, besides one for each that runs.
FAILURES_IN_A_ROW = 10
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_STOPPED = 5  # after which a worker that someone stopped is replaced
# Files in the folder of a run:
STOPPED = "stopped"  # why the supervisor gave up
ALIVE = "supervisor"  # its process, and its sign of life


def supervise(cfg: CfgNode, folder: Path, markers: Path, gpu: bool, count: int, patience: float) -> None:
    """Keep workers going until no blocks are left or the run has ended; daisy calls this in a process of its own.

    Args:
        cfg: the config; CLUSTER.TYPE says what workers are.
        folder: holds config_0.yaml and step.json for the workers and gets their logs, and the files STOPPED and ALIVE.
        markers: of the step, see `BlockStep`.
        gpu: workers use a GPU.
        count: number of workers.
        patience: seconds without a sign of life after which a worker is replaced.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the master decides; handlers, unlike SIG_IGN, are not inherited
    if workers_class(cfg).all_on_this_machine:
        end_with_parent()
    context = daisy.Context.from_env()
    # All workers share this context. A number that daisy has not given keeps it from taking them for this process.
    context["worker_id"] = -1
    try:
        with workers_lock(markers), room_on_disk(folder), room_on_disk(markers):
            (folder / ALIVE).write_text(str(os.getpid()), encoding="utf-8")
            show_life(folder / ALIVE)
            workers = workers_class(cfg)(cfg, folder, gpu, count, _environment(cfg, context))
            try:
                _Crew(workers, markers, patience).keep_going(int(context["port"]))
            finally:
                workers.stop()
    except UserError as error:
        with suppress(UserError), write_whole(folder / STOPPED) as partial:  # unless the disk is full
            partial.write_text(str(error), encoding="utf-8")
        sys.exit(str(error))  # not 0, which daisy takes for a worker that was not waited for


class _Crew:
    """The workers of a run; one that dies, or that will do nothing more, is replaced.

    Args:
        workers: starts and ends them.
        markers: of the step.
        patience: seconds without a sign of life after which a worker is replaced.
    """

    def __init__(self, workers: Workers, markers: Path, patience: float):
        self.workers, self.markers, self.patience = workers, markers, patience
        self.logs = [workers.folder / f"worker_{number}.log" for number in range(workers.count)]
        self.running: dict[int, Any] = {}
        self.listeners: dict[int, Listener] = {}
        self.stopped_since: dict[int, float] = {}
        self.failures, self.recorded, self.succeeded = 0, _bytes_recorded(markers), 0.0

    def keep_going(self, port: int) -> None:
        """Replace workers until the master's port is closed."""
        for number in range(self.workers.count):
            self._start(number)
        while _listens(port):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for number, worker in list(self.running.items()):
                end = self.workers.end_of(worker)
                if end is None:
                    self._kill_if_stuck(number, worker)
                    continue
                del self.running[number]
                if end and _listens(port):
                    self._count_failure(number, end)
                    self._start(number)
            if not self.running:
                # Nothing was left to hand out when the last one asked. If that lost a block with a worker that died,
                # which daisy notices after half a second, the port stays open.
                time.sleep(1)
                if _listens(port):
                    self._start(0)

    def _start(self, number: int) -> None:
        folder, records = self.workers.folder, new_record_file(self.markers)
        self._log(number, time.strftime("%Y-%m-%d %H:%M:%S"))
        files = [folder / "config_0.yaml", folder / STEP, records, self.logs[number]]
        command = [sys.executable, "-m", "lsdseg.engine.blocks.worker", *map(str, files)]
        self.listeners[number] = Listener(records)
        self.running[number] = self.workers.start(number, command, self.logs[number])

    def _kill_if_stuck(self, number: int, worker: Any) -> None:
        """Kill a worker that is stopped or silent; daisy ends those that run and take too long for a block."""
        now = time.monotonic()
        stopped_since = self.stopped_since.setdefault(number, now)
        if not self.workers.is_stopped(worker):
            del self.stopped_since[number]
        elif now - stopped_since > SECONDS_STOPPED:
            self._log(number, "killed, because it was stopped")
            self.workers.kill(worker)
        if self.listeners[number].silence() > self.patience:
            self._log(number, "killed, because it gave no sign of life")
            self.workers.kill(worker)

    def _count_failure(self, number: int, end: str) -> None:
        """Give up after too many failures in a row.

        Raises:
            UserError: the worker ended with a mistake of the user, there were too many, or different blocks failed with
                the same error.
        """
        last_words = _last_line(self.logs[number])
        before, self.recorded = self.recorded, _bytes_recorded(self.markers)
        self.failures = self.failures + 1 if self.recorded == before else 1
        if self.recorded != before:
            self.succeeded = time.time()
        same = same_error(failures(self.workers.folder), self.succeeded)
        if len(same) >= self.workers.cfg.CLUSTER.SAME_ERRORS:
            raise UserError(
                f"{same[0].error} -- so or almost so failed {len(same)} blocks in a row, the first of them at "
                f"{same[0].place}; {self.workers.folder / same[0].log} has all of it"
            )
        # Blocks that fail are tried again, however many, up to what SAME_ERRORS allows.
        allowed = FAILURES_IN_A_ROW + self.workers.count
        allowed += (RETRIES + 1) * self.workers.cfg.CLUSTER.SAME_ERRORS if same else 0
        if self.failures >= allowed:
            silent = last_words.startswith("=== ")
            raise UserError(
                f"{self.failures} workers in a row ended before they finished a block, the last one so: {end}; "
                f"{self.logs[number]} ends with: {'nothing; does its machine see it?' if silent else last_words}"
            )

    def _log(self, number: int, text: str) -> None:
        with self.logs[number].open("a", encoding="utf-8") as log:
            log.write(f"=== {text}\n")


def _bytes_recorded(markers: Path) -> int:
    return sum(file.stat().st_size for file in record_files(markers))


def _last_line(log: Path) -> str:
    """The last line of a worker's log; UserError in its place if that is the mistake for which the worker ended."""
    line = log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
    if line.startswith("error: "):
        raise UserError(line.removeprefix("error: "))
    return line


def _listens(port: int) -> bool:
    """Whether the master still hands out blocks: daisy closes its port when the run is over, however it ends."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass
    return True


def _environment(cfg: CfgNode, context: daisy.Context) -> dict[str, str]:
    """Environment variables of the workers."""
    environment = os.environ | {
        "DAISY_CONTEXT": context.to_env(),
        "LSD_WORKER": "1",  # this process belongs to a run that has begun
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
    }
    if cfg.DATA.DB_HOST:  # with the credentials, which config_0.yaml does not hold
        environment.setdefault("LSD_DB_URI", cfg.DATA.DB_HOST)
    return environment
