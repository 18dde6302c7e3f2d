"""What workers do in tests of `lsdseg.engine.blocks`: a block writes a file, and fails, hangs or waits as files say."""

import json
import os
import signal
import time
from pathlib import Path

from lsdseg.engine.blocks.step import NOTHING, Work
from lsdseg.errors import UserError
from lsdseg.files import explain_os_errors


def open_worker(cfg, arguments):
    """Every block writes `output/NUMBER`. Files in `trouble` make workers, or the block of that NUMBER, go wrong."""
    folder = Path(arguments["folder"])
    trouble = folder / "trouble"
    if (trouble / "cannot_start").exists():
        raise UserError("this worker cannot start: mend it")
    if (trouble / "crash").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"started_{os.getpid()}").touch()
    report = {
        "worker": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "node": os.environ.get("SLURMD_NODENAME"),
        "threads": os.environ["OMP_NUM_THREADS"],
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "database": os.environ.get("LSD_DB_URI"),
        "seed": cfg.TRAIN.SEED,
    }

    def process(block):
        number = block.block_id[1]
        time.sleep(arguments["seconds"])
        while (trouble / "wait_for_3_workers").exists() and len(list(folder.glob("started_*"))) < 3:
            time.sleep(0.01)
        if (trouble / f"raise_{number}").exists():
            raise ValueError(f"block {number} is bad")
        if (trouble / f"kill_{number}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (trouble / f"full_{number}").exists():
            raise UserError("no room on disk: delete something")
        if (trouble / f"fill_{number}").exists():
            ballast = folder / "ballast"
            with explain_os_errors(ballast):
                ballast.write_bytes(bytes(10**7))
        if (trouble / f"hang_{number}").exists():
            (trouble / f"hang_{number}").unlink()
            time.sleep(1000)
        corners = [block.read_roi.begin, block.read_roi.end, block.write_roi.begin, block.write_roi.end]
        partial = folder / f"partial_{os.getpid()}"
        partial.write_text(json.dumps(report | {"corners": [list(corner) for corner in corners]}))
        partial.replace(folder / "output" / str(number))
        if number in arguments.get("empty", []):
            return NOTHING
        return Work(*arguments["work"]) if "work" in arguments else None

    return process
