"""Workers as jobs of a real Slurm that the tests start on this machine."""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.data_utils.layout import data_folder
from lsdseg.data_utils.volumes import open_array, read
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
from tests.torture import prepare

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster():
    """The environment variables of a running Slurm."""
    if slurm.missing():
        pytest.skip(f"Slurm cannot be started: {slurm.missing()}")
    with slurm.one_machine_slurm() as environment:
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
    assert f"{slurm.CPUS} running ({running[0].job} {running[0].node} {running[0].time}, " in text
    assert status.to_json()["jobs"][0] == asdict(running[0])
    nobody = folder / "slurm.conf"
    nobody.write_text(Path(cluster["SLURM_CONF"]).read_text().replace("SlurmctldPort=", "#"))
    for name, value in (("PATH", folder), ("SLURM_CONF", nobody)):  # no squeue, then one without an answer
        with monkeypatch.context() as patch:
            patch.setenv(name, str(value))
            assert f"{workers} of which squeue says nothing here (" in as_text(*statuses(folder))
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


@pytest.mark.parametrize("with_jobs", [False, True], ids=["slurmd", "all of it"])
def test_a_node_that_dies_ends_no_run(tmp_path, monkeypatch, with_jobs):
    monkeypatch.chdir(tmp_path)
    with slurm.one_machine_slurm(nodes=2) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        master = start_master(tmp_path, "--seconds", 0.15, "SYSTEM.NUM_WORKERS", 1, *ON_SLURM)
        try:
            wait_for(lambda: len(results(tmp_path)) >= 2)
            (job,) = statuses(tmp_path)[0].jobs
            slurm.kill_node(environment, job.node, with_jobs)
            assert master.wait(60) == 0, (tmp_path / "master.log").read_text()
        finally:
            master.kill()
            master.wait()
    nodes = [result["node"] for result in results(tmp_path).values()]
    assert len(nodes) == BLOCKS
    assert set(nodes) == {"node1", "node2"} or not with_jobs  # Slurm no longer sees a worker, but it still works


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


def test_segment_works_from_a_login_shell_and_goes_on_as_a_job(folder, cluster):
    config = prepare(folder / "home", seed=1)
    volume = data_folder(load_config(config), "test") / "sample_A.zarr"
    script = [sys.executable, str(CHECKOUT / "segment.py"), "-c", str(config), "--raw", str(volume), "--blockwise"]
    script += ["--out", str(folder / "out.zarr"), "SYSTEM.NUM_WORKERS", "1", *map(str, ON_SLURM)]
    script += ["INS_SEGMENT.BLOCK_SIZE", "(24, 32, 32)", "INS_SEGMENT.THRESHOLDS", "[0.3]"]
    shell_log = folder / "shell.log"
    with shell_log.open("w") as log:
        shell = subprocess.Popen(script, stdout=log, stderr=log)
    wait_for(lambda: shell.poll() is not None or "$ python 02_" in shell_log.read_text(), 300)
    assert shell.poll() is None, shell_log.read_text()
    shell.kill()
    shell.wait()

    sbatch = ["sbatch", f"--output={folder}/job.log", f"--wrap=PYTHONPATH={CHECKOUT} {shlex.join(script)}"]
    subprocess.run(sbatch, check=True, capture_output=True)
    wait_for(lambda: not slurm.job_ids(cluster), 400)
    printed = (folder / "job.log").read_text()
    assert "$ python super_predicter" not in printed
    segmentation = read(open_array(folder / "out.zarr", "volumes/segmentation_030"))
    assert len(np.unique(segmentation)) > 2, printed
    assert (shell_log.read_text() + printed).count("workers: 1 (slurm)") >= 4  # prediction, 02, 03 and 05
