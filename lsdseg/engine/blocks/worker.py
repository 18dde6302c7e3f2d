"""One worker process: opens what its step needs once, then takes blocks until none are left.

    cd daisy_logs/SAMPLE_STEP; python -m lsdseg.engine.blocks.worker config_0.yaml step.json RECORDS worker_0.log

The supervisor starts it, here or as a job; the environment variable DAISY_CONTEXT says where the blocks come from. A
worker ends after a block that failed, and another takes its place: nothing that broke, such as a GPU's context, is used
again.
"""

import logging
import os
import resource
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import daisy
import numpy as np
from daisy.logging import set_log_basedir, set_log_mode
from funlib.geometry import Roi

from lsdseg.config.implementations import resolve
from lsdseg.config.loader import load_config
from lsdseg.data_utils.placement import to_nanometers
from lsdseg.engine.blocks.life import end_with_parent, show_life
from lsdseg.engine.blocks.markers import record_block
from lsdseg.engine.blocks.rates import bytes_written
from lsdseg.engine.blocks.reports import Report, report_begin, report_end, report_failure
from lsdseg.engine.blocks.step import NOTHING
from lsdseg.errors import DamagedError, UserError
from lsdseg.files import explain_os_errors, read_json

# An error that is longer is cut off in reports; the log has all of it.
MOST_CHARACTERS = 500


def work(config: Path, step: Path, records: Path, log: Path) -> None:
    """Process blocks until the master has none left.

    Args:
        config: config_0.yaml of the run.
        step: step.json beside it: `BlockStep.open_worker`, its arguments, and the grid of blocks.
        records: file to record finished blocks in, see `markers.new_record_file`; it is also the sign of life.
        log: file that gets what this process prints; `reports.py` names other files like it.

    Raises:
        UserError: this machine does not see the files, or does not reach the master.
    """
    parent = os.getppid()
    end_with_parent()
    host = socket.gethostname()
    for file in (config, step, records):
        if not file.is_file():
            raise UserError(
                f"{host} does not see {file}: workers need the folder in which the script was started, the data and "
                "the results on a file system that all machines share"
            )
    show_life(records)
    # Away from the master's folder: an experiment.yaml there is in this config already, and must not win again.
    os.chdir(config.parent)
    cfg = load_config(config)
    what = read_json(step, "run the same command again")
    client = _connect(host)
    process = resolve(what["open_worker"])(cfg, what["arguments"])
    print(f"{host}: process {os.getpid()} is ready", flush=True)
    damaged = 0
    while os.getppid() == parent:  # else the supervisor was killed
        with client.acquire_block() as block:
            if block is None:
                return
            wall, cpu, written = time.monotonic(), time.process_time(), bytes_written()
            report = _report(block.write_roi, what, log.name)
            report_begin(log, report)
            try:
                work_done = process(block) or NOTHING
            except Exception as error:
                words = " ".join(f"{type(error).__name__}: {error}".split())
                report_failure(log, replace(report, error=words[:MOST_CHARACTERS], time=time.time()))
                damaged += 1
                if not isinstance(error, DamagedError) or damaged >= cfg.CLUSTER.SAME_ERRORS:
                    raise
                print(f"block {block.block_id[1]} failed: {error}", flush=True)
                block.status = daisy.BlockStatus.FAILED
                continue
            finally:
                report_end(log)
            damaged = 0
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            with explain_os_errors(records):
                record_block(records, report.block, wall, megabytes, work_done, bytes_written() - written)
            print(f"block {block.block_id[1]}: {wall:.4f} s, {cpu:.4f} s CPU", flush=True)


def _report(roi: Roi, what: dict[str, Any], log: str) -> Report:
    """Say where a block is that a worker begins; `what` is what step.json says."""
    begin, shape = (list(to_nanometers(edge, what["per_nanometer"])) for edge in (roi.begin, roi.shape))
    position = np.rint((np.array(begin) - what["begin"]) / what["block"]).astype(int)
    return Report(int(np.ravel_multi_index(position, what["grid"])), begin, shape, log)


def _connect(host: str) -> daisy.Client:
    client = daisy.Client()
    if not client.connected:
        raise UserError(
            f"{host} cannot connect to {client.host}:{client.port}: either the run has ended, or CLUSTER.HOST has "
            "to be the address under which workers reach the machine that runs the script"
        )
    # What daisy says of a block that failed names the task, which is the run's secret; Python reports the error itself.
    logging.getLogger("daisy").setLevel(logging.CRITICAL)
    set_log_basedir(Path.cwd())
    set_log_mode("file")  # which is none
    return client


if __name__ == "__main__":
    try:
        work(*(Path(argument).absolute() for argument in sys.argv[1:]))
    except DamagedError as error:  # the next worker goes on with other blocks
        sys.exit(str(error))
    except UserError as error:
        print("error:", " ".join(str(error).split()), flush=True)
        sys.exit(2)
