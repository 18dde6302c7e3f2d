"""Workers as jobs of a real Slurm that the tests start on this machine."""

import os
import shlex
import signal
import subprocess

import pytest

from lsdseg.config.loader import CHECKOUT
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.status import as_text, statuses
from lsdseg.errors import UserError
from tests import slurm
from tests.block_master import (
    BLOCKS,
    config,
    master_command,
    meanwhile,
    results,
    start_master,
    supervisor,
    toy_task,
    trouble,
    wait_for,
)

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment variables of a running Slurm."""
    if slurm.missing():
        pytest.skip(f"Slurm cannot be started: {slurm.missing()}")
    with slurm.one_machine_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def folder(cluster, tmp_path, monkeypatch):
    """The current directory, empty, of a process that uses the cluster."""
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ON_SLURM = ["CLUSTER.TYPE", "slurm", "CLUSTER.CPUS_PER_WORKER", 1]


def test_every_worker_is_a_job_and_none_is_left(folder, cluster):
    trouble(folder, "wait_for_3_workers")
    limits = ["CLUSTER.PARTITION", slurm.PARTITION, "CLUSTER.TIME", "00:10:00", "CLUSTER.MEMORY", "100M"]
    # One job more than the node can run at a time: it still waits when all blocks are done.
    cfg = config(slurm.CPUS + 1, *ON_SLURM, *limits)
    assert run_blocks(cfg, toy_task(folder)).done == BLOCKS
    assert len({result["job"] for result in results(folder).values()}) >= 3
    assert {result["threads"] for result in results(folder).values()} == {"1"}
    wait_for(lambda: not slurm.job_ids(cluster))


def test_status_lists_jobs(folder, cluster, monkeypatch):
    workers = slurm.CPUS + 1
    master = start_master(folder, "--seconds", 0.5, "SYSTEM.NUM_WORKERS", workers, *ON_SLURM)
    wait_for(lambda: len(slurm.job_ids(cluster)) == workers and len(results(folder)) >= 2)
    (status,) = statuses(folder)
    assert [job.job for job in status.jobs] == sorted(slurm.job_ids(cluster), key=int)
    running = [job for job in status.jobs if job.state == "RUNNING"]
    assert len(running) == slurm.CPUS
    assert all(job.node for job in running)
    text = as_text(status)
    assert f"Slurm jobs: 1 pending ({status.jobs[-1].job} " in text
    assert f"{slurm.CPUS} running ({running[0].job} {running[0].node}, " in text
    assert status.to_json()["jobs"][0]["state"] == "RUNNING"
    monkeypatch.setenv("PATH", str(folder))
    assert f"{workers} of which squeue says nothing here (" in as_text(*statuses(folder))
    monkeypatch.undo()
    assert master.wait(60) == 0, (folder / "master.log").read_text()
    assert statuses(folder)[0].jobs == []


def test_a_cancelled_job_is_replaced(folder, cluster):
    master = start_master(folder, "--seconds", 0.15, "SYSTEM.NUM_WORKERS", 1, *ON_SLURM)
    wait_for(lambda: len(results(folder)) >= 2)
    (job,) = slurm.job_ids(cluster)
    subprocess.run(["scancel", job], check=True)
    assert master.wait(60) == 0, (folder / "master.log").read_text()
    jobs = {result["job"] for result in results(folder).values()}
    assert len(jobs) == 2
    assert job in jobs
    assert len(results(folder)) == BLOCKS


def test_a_job_that_is_stopped_is_replaced(folder, cluster):
    def stop_it():
        wait_for(lambda: len(results(folder)) >= 2)
        os.kill(next(iter(results(folder).values()))["worker"], signal.SIGSTOP)

    with meanwhile(stop_it):
        assert run_blocks(config(1, *ON_SLURM), toy_task(folder, 0.15, timeout=2, silence=4)).done == BLOCKS
    assert len({result["job"] for result in results(folder).values()}) == 2
    wait_for(lambda: not slurm.job_ids(cluster))


def test_jobs_of_a_killed_supervisor_are_cancelled(folder, cluster):
    def kill_it():
        wait_for(lambda: len(results(folder)) >= 2)
        os.kill(next(iter(results(folder).values()))["worker"], signal.SIGSTOP)
        os.kill(supervisor(folder), signal.SIGKILL)

    with meanwhile(kill_it):
        assert run_blocks(config(1, *ON_SLURM), toy_task(folder, 0.15)).done == BLOCKS
    assert len({result["job"] for result in results(folder).values()}) == 2
    wait_for(lambda: not slurm.job_ids(cluster))


def test_ctrl_c_and_sigkill_cancel_all_jobs(folder, cluster):
    for end, status in (("-INT", 130), ("-KILL", -9)):
        master = start_master(folder, "--seconds", 0.3, "SYSTEM.NUM_WORKERS", 6, *ON_SLURM)
        done = len(results(folder))
        wait_for(lambda done=done: len(results(folder)) > done)
        assert len(slurm.job_ids(cluster)) == 6
        subprocess.run(["kill", end, str(master.pid)], check=True)
        assert master.wait(20) == status
        wait_for(lambda: not slurm.job_ids(cluster))
    assert len(results(folder)) < BLOCKS


def test_refusals_of_slurm_are_passed_on(folder, cluster):
    for key, value, reason in [
        ("CLUSTER.PARTITION", "nope", "invalid partition specified: nope"),
        ("CLUSTER.EXTRA", ["--mem=900G"], "Memory specification can not be satisfied"),
    ]:
        with pytest.raises(UserError, match=f"Slurm refuses the job: .*{reason}"):
            run_blocks(config(2, *ON_SLURM, key, value), toy_task(folder))
    assert slurm.job_ids(cluster) == []


def test_the_master_may_be_a_job_itself(folder, cluster):
    command = shlex.join(master_command(folder, "SYSTEM.NUM_WORKERS", 2, *ON_SLURM))
    sbatch = ["sbatch", f"--output={folder}/master.log", f"--wrap=PYTHONPATH={CHECKOUT} {command}"]
    subprocess.run(sbatch, check=True, capture_output=True)
    wait_for(lambda: not slurm.job_ids(cluster))
    assert len(results(folder)) == BLOCKS
