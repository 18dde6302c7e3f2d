"""Workers as Slurm jobs, always submitted with `sbatch`.

`srun` from a master that is itself a job would make steps inside the master's own allocation. All jobs are watched with
one `squeue`, because a waiting process per job would ask the controller once for each.
"""

import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.engine.blocks.workers import Workers
from lsdseg.errors import UserError

SECONDS_BETWEEN_QUERIES = 2.0
NOT_ENDED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")


class SlurmWorkers(Workers):
    """One job for each worker; the section CLUSTER of the config says what it asks for."""

    def __init__(self, cfg: CfgNode, name: str, gpu: bool, count: int, environment: Mapping[str, str]):
        super().__init__(cfg, name, gpu, count, environment)
        cluster = cfg.CLUSTER
        options = {
            "job-name": name,
            "export": "ALL",
            "open-mode": "append",
            "ntasks": 1,
            "cpus-per-task": cluster.CPUS_PER_WORKER,
            "gres": f"gpu:{cluster.GPUS_PER_WORKER}" if gpu and cluster.GPUS_PER_WORKER else "",
            "partition": cluster.PARTITION,
            "account": cluster.ACCOUNT,
            "time": cluster.TIME,
            "mem": cluster.MEMORY,
        }
        self.options = [f"--{option}={value}" for option, value in options.items() if value] + list(cluster.EXTRA)
        self.jobs: list[str] = []
        self.states: dict[str, str] = {}
        self.queried = 0.0

    @classmethod
    def check_installed(cls) -> None:
        if not shutil.which("sbatch"):
            raise UserError(
                "CLUSTER.TYPE is 'slurm' but there is no sbatch here: start this on a machine of the cluster, "
                "or set CLUSTER.TYPE to 'local'"
            )

    def threads(self) -> int:
        return int(self.cfg.CLUSTER.CPUS_PER_WORKER)

    def start(self, number: int, command: Sequence[str], log: Path) -> str:
        """Submit a worker; the id of its job."""
        sbatch = ["sbatch", "--parsable", *self.options, f"--output={log}", f"--wrap=exec {shlex.join(command)}"]
        answer = subprocess.run(sbatch, env=self.environment, capture_output=True, text=True)
        if answer.returncode:
            reason = " ".join(answer.stderr.replace("sbatch: error: ", "").split())
            raise UserError(f"Slurm refuses the job: {reason}; see the section CLUSTER of the config")
        job = answer.stdout.strip().partition(";")[0]
        self.jobs.append(job)
        self.states[job] = "PENDING"
        return job

    def end_of(self, worker: str) -> str | None:
        if time.monotonic() - self.queried > SECONDS_BETWEEN_QUERIES:
            self._query()
        state = self.states.get(worker, "gone")
        if state in NOT_ENDED:
            return None
        return "" if state == "COMPLETED" else f"job {worker} is {state}"

    def stop(self) -> None:
        """Cancel every job that was ever submitted; scancel takes those that have ended, too."""
        if self.jobs:
            subprocess.run(["scancel", *self.jobs], env=self.environment, capture_output=True)

    def _query(self) -> None:
        squeue = ["squeue", "--me", "--states=all", "--noheader", "--format=%i %T"]
        answer = subprocess.run(squeue, env=self.environment, capture_output=True, text=True)
        if answer.returncode == 0:  # else the controller does not answer just now, which ends no job
            self.states = dict(line.split() for line in answer.stdout.splitlines())
        self.queried = time.monotonic()
