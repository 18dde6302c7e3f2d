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
from pathlib import Path

import daisy
from yacs.config import CfgNode

from lsdseg.config.loader import CHECKOUT
from lsdseg.engine.blocks.markers import finished_blocks
from lsdseg.engine.blocks.workers import Workers, workers_class
from lsdseg.errors import UserError

# Workers that may end one after the other without a block getting done, besides one for each that runs.
FAILURES_IN_A_ROW = 10
SECONDS_BETWEEN_LOOKS = 0.2
STOPPED = "stopped"  # file in the folder of a run: why the supervisor gave up


def supervise(cfg: CfgNode, folder: Path, markers: Path, gpu: bool, count: int) -> None:
    """Keep workers going until no blocks are left or the run has ended; daisy calls this in a process of its own.

    Args:
        cfg: the config; CLUSTER.TYPE says what workers are.
        folder: holds config_0.yaml and step.json for the workers and gets their logs, and the file STOPPED.
        markers: of the step, see `BlockStep`.
        gpu: workers use a GPU.
        count: number of workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the master decides; handlers, unlike SIG_IGN, are not inherited
    context = daisy.Context.from_env()
    # All workers share this context. A number that daisy has not given keeps it from taking them for this process.
    context["worker_id"] = -1
    workers = workers_class(cfg)(cfg, folder.name, gpu, count, _environment(cfg, context))
    try:
        _keep_going(workers, folder, markers, int(context["port"]))
    except UserError as error:
        (folder / STOPPED).write_text(str(error), encoding="utf-8")
        sys.exit(str(error))  # not 0, which daisy takes for a worker that was not waited for
    finally:
        workers.stop()


def _keep_going(workers: Workers, folder: Path, markers: Path, port: int) -> None:
    """Replace workers that die until the master's port is closed."""
    files = [str(folder / name) for name in ("config_0.yaml", "step.json")]
    command = [sys.executable, "-m", "lsdseg.engine.blocks.worker", *files]
    logs = [folder / f"worker_{number}.log" for number in range(workers.count)]

    def start(number: int) -> object:
        with logs[number].open("a", encoding="utf-8") as log:
            log.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        return workers.start(number, command, logs[number])

    running = {number: start(number) for number in range(workers.count)}
    failures, finished = 0, finished_blocks(markers)
    while _listens(port):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        ends = {number: workers.end_of(worker) for number, worker in running.items()}
        for number, end in ends.items():
            if end is None:
                continue
            del running[number]
            if not end or not _listens(port):
                continue
            last_words = _last_line(logs[number])
            before, finished = finished, finished_blocks(markers)
            failures = failures + 1 if finished == before else 1
            if failures >= FAILURES_IN_A_ROW + workers.count:
                silent = last_words.startswith("=== ")
                raise UserError(
                    f"{failures} workers in a row ended before they finished a block, the last one so: {end}; "
                    f"{logs[number]} ends with: {'nothing; does its machine see it?' if silent else last_words}"
                )
            running[number] = start(number)
        if not running:
            # Nothing was left to hand out when the last one asked. If that lost a block with a worker that died, which
            # daisy notices after half a second, the port stays open.
            time.sleep(1)
            if _listens(port):
                running[0] = start(0)


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
