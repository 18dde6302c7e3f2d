"""Keeps the workers of a run going: starts them, replaces those that die, and ends them all with the run.

daisy could start one process per worker, which would have to stay for as long as its worker does. It starts a single
process that runs `keep_workers` instead. So there is one place from which all workers are ended, and it outlives the
master: daisy's port is closed when the run is over, however it ended, and then every worker is killed and every job
cancelled.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import daisy
import numpy as np
from yacs.config import CfgNode

from lsdseg.config.loader import CHECKOUT
from lsdseg.engine.blocks.slurm import SlurmWorkers
from lsdseg.errors import UserError

# Workers that may end one after the other without a block getting done, besides one for each that runs.
FAILURES_IN_A_ROW = 10
SECONDS_BETWEEN_LOOKS = 0.2


def keep_workers(cfg: CfgNode, folder: Path, markers: Path, gpu: bool, count: int) -> None:
    """Keep workers going until no blocks are left or the run has ended; daisy calls this in a process of its own.

    Args:
        cfg: the config; CLUSTER.TYPE says what workers are.
        folder: holds config_0.yaml and task.json for the workers and gets their logs. Why this gave up, if it did, is
            left in its file `stopped`.
        markers: of the task, see `lsdseg.engine.blocks.run.BlockTask`.
        gpu: workers use a GPU.
        count: number of workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the master decides; handlers, unlike SIG_IGN, are not inherited
    context = daisy.Context.from_env()
    # All workers share this context. A number that daisy has not given keeps it from taking them for this process.
    context["worker_id"] = -1
    slurm = cfg.CLUSTER.TYPE == "slurm"
    threads = cfg.CLUSTER.CPUS_PER_WORKER if slurm else max(1, len(os.sched_getaffinity(0)) // count)
    environment = _environment(cfg, context, threads)
    if slurm:
        workers = SlurmWorkers(cfg.CLUSTER, folder.name, gpu, environment)
    else:
        workers = LocalWorkers(_devices(cfg) if gpu else [], environment)
    try:
        _keep_going(workers, folder, markers, count, int(context["port"]))
    except UserError as error:
        (folder / "stopped").write_text(str(error), encoding="utf-8")
        sys.exit(str(error))  # not 0, which daisy takes for a worker that was not waited for
    finally:
        workers.stop()


def finished_blocks(markers: Path) -> int:
    """Number of blocks that are recorded as done (daisy keeps one byte for each)."""
    files = (file for file in (markers / "blocks" / "done" / "c").rglob("*") if file.is_file())
    return sum(int(np.count_nonzero(np.fromfile(file, np.uint8))) for file in files)


class LocalWorkers:
    """Start, watch and end workers on this machine; those on GPUs share out `devices`, a list of CUDA numbers."""

    def __init__(self, devices, environment):
        self.devices = devices
        self.environment = environment
        self.processes = []

    def start(self, number, command, log):
        """Start a worker; its process."""
        device = {"CUDA_VISIBLE_DEVICES": self.devices[number % len(self.devices)]} if self.devices else {}
        with open(log, "ab") as out:
            # In a session of its own, for Ctrl-C to reach the master alone.
            process = subprocess.Popen(
                command, env=self.environment | device, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        return process

    def ended(self, process):
        """How a worker ended: None if it runs, "" if it ended well, else a description."""
        status = process.poll()
        if status is None:
            return None
        return f"process {process.pid} ended with status {status}" if status else ""

    def stop(self):
        """End all workers at once: a block may be broken off anywhere."""
        for process in self.processes:
            process.kill()
            process.wait()


def _keep_going(workers, folder, markers, count, port):
    """Replace workers that die until the master's port is closed."""
    files = [str(folder / name) for name in ("config_0.yaml", "task.json")]
    command = [sys.executable, "-m", "lsdseg.engine.blocks.worker", *files]
    logs = [folder / f"worker_{number}.log" for number in range(count)]

    def start(number):
        with logs[number].open("a", encoding="utf-8") as log:
            log.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        return workers.start(number, command, logs[number])

    running = {number: start(number) for number in range(count)}
    failures, finished = 0, finished_blocks(markers)
    while _listens(port):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        ends = {number: workers.ended(worker) for number, worker in running.items()}
        for number, end in ends.items():
            if end is None:
                continue
            del running[number]
            if not end or not _listens(port):
                continue
            last_words = logs[number].read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
            if last_words.startswith("error: "):
                raise UserError(last_words.removeprefix("error: "))
            before, finished = finished, finished_blocks(markers)
            failures = failures + 1 if finished == before else 1
            if failures >= FAILURES_IN_A_ROW + count:
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


def _listens(port):
    """Whether the master still hands out blocks: daisy closes its port when the run is over, however it ends."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass
    return True


def _environment(cfg, context, threads):
    """Environment variables of the workers."""
    environment = os.environ | {
        "DAISY_CONTEXT": context.to_env(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        # Threads that share a core with another worker wait for each other.
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),
    }
    if "@" in cfg.DATA.DB_HOST:  # the password, which config_0.yaml does not hold
        environment.setdefault("LSD_DB_URI", cfg.DATA.DB_HOST)
    return environment


def _devices(cfg):
    """CUDA numbers of the GPUs that workers here share out; none unless TRAIN.DEVICE is multi_gpu."""
    if cfg.TRAIN.DEVICE != "multi_gpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    return [device for device in visible.split(",") if device][: cfg.SYSTEM.NUM_GPUS]
