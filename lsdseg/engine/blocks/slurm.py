"""Workers as Slurm jobs, always submitted with `sbatch`.

`srun` from a master that is itself a job would make steps inside the master's own allocation. All jobs are watched with
one `squeue`, because a waiting process per job would ask the controller once for each.
"""

import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.engine.blocks.workers import Workers
from lsdseg.errors import UserError

SECONDS_BETWEEN_QUERIES = 2.0
SECONDS_TO_ANSWER = 60  # of a command of Slurm
SECONDS_TO_STATUS = 10  # for who only looks
SECONDS_TO_END = 10  # of jobs that are canceled
JOBS = "jobs"  # file in the folder of a step, with the ids of its jobs
NOT_ENDED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")


@dataclass
class Job:
    """A job of a step.

    Attributes:
        job: its id.
        state: RUNNING, PENDING and so on; "" if Slurm does not say.
        node: where it runs.
        time: how long it has run, as Slurm writes it.
        reason: why it waits.
    """

    job: str
    state: str = ""
    node: str = ""
    time: str = ""
    reason: str = ""


def jobs_of(folder: Path) -> list[Job]:
    """Return the jobs of the step whose logs are in a folder; those that have ended are left out if Slurm says so."""
    try:
        ids = (folder / JOBS).read_text(encoding="utf-8").split()
    except OSError:
        ids = []
    if not ids:
        return []
    known = ["--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%N|%M|%r"]
    try:
        answer = subprocess.run(["squeue", *known], capture_output=True, text=True, timeout=SECONDS_TO_STATUS)
    except (OSError, subprocess.TimeoutExpired):
        return [Job(job) for job in ids]
    if answer.returncode:
        return [Job(job) for job in ids]
    found = {line.partition("|")[0]: Job(*line.split("|", 4)) for line in answer.stdout.splitlines()}
    return [found[job] for job in ids if job in found and found[job].state in NOT_ENDED]


class SlurmWorkers(Workers):
    """One job for each worker; the section CLUSTER of the config says what it asks for."""

    def __init__(self, cfg: CfgNode, folder: Path, gpu: bool, count: int, environment: Mapping[str, str]):
        super().__init__(cfg, folder, gpu, count, environment)
        cluster = cfg.CLUSTER
        options = {
            "job-name": folder.name,
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
        # The supervisor replaces a job whose node died. One that Slurm requeues would wait for minutes before that.
        self.options = ["--no-requeue", *(f"--{option}={value}" for option, value in options.items() if value)]
        self.options += cluster.EXTRA
        self.jobs: list[str] = []
        self.states: dict[str, str] = {}
        self.queried = 0.0
        self.file = folder / JOBS  # outlives a supervisor that is killed
        if self.file.is_file():
            self.jobs = self.file.read_text(encoding="utf-8").split()
            self.stop()

    @classmethod
    def check_installed(cls) -> None:
        if not shutil.which("sbatch"):
            raise UserError(
                "CLUSTER.TYPE is 'slurm' but there is no sbatch here: start this on a machine of the cluster, "
                "or set CLUSTER.TYPE to 'local'"
            )

    @classmethod
    def threads(cls, cfg: CfgNode, count: int) -> int:
        return int(cfg.CLUSTER.CPUS_PER_WORKER)

    def start(self, number: int, command: Sequence[str], log: Path) -> str:
        """Submit a worker; the id of its job."""
        sbatch = ["sbatch", "--parsable", *self.options, f"--output={log}", f"--wrap=exec {shlex.join(command)}"]
        answer = self._run(*sbatch)
        if answer.returncode:
            reason = " ".join(answer.stderr.replace("sbatch: error: ", "").split())
            raise UserError(f"Slurm refuses the job: {reason}; see the section CLUSTER of the config")
        job = answer.stdout.strip().partition(";")[0]
        self.jobs.append(job)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{job}\n")
        self.states[job] = "PENDING"
        return job

    def end_of(self, worker: str) -> str | None:
        if time.monotonic() - self.queried > SECONDS_BETWEEN_QUERIES:
            self._query()
        state = self.states.get(worker, "gone")
        if state in NOT_ENDED:
            return None
        return "" if state == "COMPLETED" else f"job {worker} is {state}"

    def kill(self, worker: str) -> None:
        self._run("scancel", worker)

    def stop(self) -> None:
        """Cancel every job that was ever submitted, ended or not, and wait for their end."""
        if self.jobs:
            self._run("scancel", *self.jobs)
            deadline = time.monotonic() + SECONDS_TO_END
            self._query()
            while any(self.end_of(job) is None for job in self.jobs) and time.monotonic() < deadline:
                time.sleep(0.2)
                self._query()
        self.jobs = []
        self.file.unlink(missing_ok=True)

    def _query(self) -> None:
        answer = self._run("squeue", "--me", "--states=all", "--noheader", "--format=%i %T")
        if answer.returncode == 0:  # else the controller does not answer just now, which ends no job
            self.states = dict(line.split() for line in answer.stdout.splitlines())
        self.queried = time.monotonic()

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm; one that gives no answer fails."""
        try:
            return subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", f"{command[0]} does not answer")
