"""Workers as Slurm jobs, always submitted with `sbatch`.

`srun` from a master that is itself a job would make steps inside the master's own allocation. All jobs are watched with
one `squeue`, because a waiting process per job would ask the controller once for each.
"""

import shlex
import shutil
import subprocess
import time

from lsdseg.errors import UserError

SECONDS_BETWEEN_QUERIES = 2.0


def check_installed():
    """Raises UserError if there is no sbatch here."""
    if not shutil.which("sbatch"):
        raise UserError(
            "CLUSTER.TYPE is 'slurm' but there is no sbatch here: start this on a machine of the cluster, "
            "or set CLUSTER.TYPE to 'local'"
        )


class SlurmWorkers:
    """Start, watch and end workers as jobs.

    Args:
        cluster: the config's section CLUSTER.
        name: of the jobs.
        gpu: ask for CLUSTER.GPUS_PER_WORKER.
        environment: of sbatch; the jobs get it, too.
    """

    def __init__(self, cluster, name, gpu, environment):
        settings = {
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
        self.options = [f"--{option}={value}" for option, value in settings.items() if value] + list(cluster.EXTRA)
        self.environment = environment
        self.jobs = []
        self.states = {}
        self.queried = 0.0

    def start(self, number, command, log):
        """Submit a worker; the id of its job. Raises UserError with Slurm's reason if it is refused."""
        sbatch = ["sbatch", "--parsable", *self.options, f"--output={log}", f"--wrap=exec {shlex.join(command)}"]
        answer = subprocess.run(sbatch, env=self.environment, capture_output=True, text=True)
        if answer.returncode:
            reason = " ".join(answer.stderr.replace("sbatch: error: ", "").split())
            raise UserError(f"Slurm refuses the job: {reason}; see the section CLUSTER of the config")
        job = answer.stdout.strip().partition(";")[0]
        self.jobs.append(job)
        self.states[job] = "PENDING"
        return job

    def ended(self, job):
        """How a job ended: None if it waits or runs, "" if its worker ended well, else a description."""
        if time.monotonic() - self.queried > SECONDS_BETWEEN_QUERIES:
            self._query()
        state = self.states.get(job, "gone")
        if state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED"):
            return None
        return "" if state == "COMPLETED" else f"job {job} is {state}"

    def stop(self):
        """Cancel every job that was ever submitted; those that have ended do not mind."""
        if self.jobs:
            subprocess.run(["scancel", *self.jobs], env=self.environment, capture_output=True)

    def _query(self):
        squeue = ["squeue", "--me", "--states=all", "--noheader", "--format=%i %T"]
        answer = subprocess.run(squeue, env=self.environment, capture_output=True, text=True)
        if answer.returncode == 0:  # else the controller does not answer just now, which ends no job
            self.states = dict(line.split() for line in answer.stdout.splitlines())
        self.queried = time.monotonic()
