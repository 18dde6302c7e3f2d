"""Blocks on local workers: nothing gets lost or done with mixed settings, whatever is killed."""

import contextlib
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import daisy
import numpy as np
import pytest
from funlib.geometry import Roi

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.engine.blocks import lock, run
from lsdseg.engine.blocks.markers import RECORD, blocks_left, discard_markers, finished, record_files
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.supervisor import ALIVE
from lsdseg.errors import UserError
from tests.block_master import (
    BLOCKS,
    CONTEXT,
    VOLUME,
    config,
    meanwhile,
    results,
    start_master,
    supervisor,
    toy_task,
    trouble,
    wait_for,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LSD_DB_URI", raising=False)
    return tmp_path


def worker_processes(folder):
    """The ids of all processes that have this folder in their command line, apart from masters."""
    ids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if f"{folder}/daisy_logs" in command:
            ids.append(int(process.name))
    return ids


def test_blocks_tile_the_volume_once_with_any_number_of_workers(folder):
    run_blocks(config(1), toy_task(folder))
    single = results(folder)
    covered = np.zeros(VOLUME.shape, int)
    for result in single.values():
        read_begin, read_end, begin, end = (np.array(corner) for corner in result["corners"])
        covered[tuple(slice(*span) for span in zip(begin - VOLUME.begin, end - VOLUME.begin, strict=True))] += 1
        assert (read_begin == begin - CONTEXT).all()
        assert (read_end == end + CONTEXT).all()
    assert (covered == 1).all()

    discard_markers(toy_task(folder).markers)
    for file in (folder / "output").iterdir():
        file.unlink()
    for file in folder.glob("started_*"):
        file.unlink()
    trouble(folder, "wait_for_3_workers")
    summary = run_blocks(config(3), toy_task(folder))
    assert (summary.blocks, summary.done, summary.skipped, summary.failed) == (BLOCKS, BLOCKS, 0, 0)
    assert summary.seconds_per_block > 0
    assert summary.peak_memory > 1e6
    triple = results(folder)
    assert {n: result["corners"] for n, result in triple.items()} == {n: r["corners"] for n, r in single.items()}
    assert len({result["worker"] for result in triple.values()}) == 3
    assert {result["threads"] for result in triple.values()} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}


def test_a_second_run_does_nothing_and_says_so(folder, capsys):
    run_blocks(config(2), toy_task(folder))
    for file in (folder / "output").iterdir():
        file.unlink()
    capsys.readouterr()
    summary = run_blocks(config(2), toy_task(folder))
    assert f"nothing to do, all {BLOCKS} blocks are done" in capsys.readouterr().out
    assert (summary.done, summary.skipped) == (0, BLOCKS)
    assert results(folder) == {}


def test_a_failing_block_is_shown_and_the_others_are_done(folder, capfd):
    cause = trouble(folder, "raise_4")
    with pytest.raises(UserError, match=f"1 of {BLOCKS} blocks are not done"):
        run_blocks(config(2), toy_task(folder))
    output = capfd.readouterr()
    assert "ValueError: block 4 is bad" in output.err.partition("The first block that failed")[2]
    table = [line.split() for line in output.out.splitlines()]
    assert [str(BLOCKS), str(BLOCKS - 1), "0", "1"] in [row[:4] for row in table]
    logs = "".join(log.read_text() for log in (folder / "daisy_logs" / "sample_toy").glob("worker_*.log"))
    assert logs.count("Traceback") >= 4
    assert len(results(folder)) == BLOCKS - 1

    cause.unlink()
    summary = run_blocks(config(2), toy_task(folder))
    assert (summary.done, summary.skipped) == (1, BLOCKS - 1)
    assert len(results(folder)) == BLOCKS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cannot_start", "this worker cannot start: mend it"),
        ("full_4", "no room on disk: delete something"),
        ("crash", "12 workers in a row ended before they finished a block"),
    ],
)
def test_what_no_retry_can_mend_ends_the_run(folder, name, message):
    trouble(folder, name)
    with pytest.raises(UserError, match=message):
        run_blocks(config(2), toy_task(folder))
    assert worker_processes(folder) == []


def test_a_block_that_hangs_is_done_by_another_worker(folder):
    trouble(folder, "hang_4")
    assert run_blocks(config(1), toy_task(folder, timeout=1)).done == BLOCKS


def test_workers_killed_at_random_change_nothing(folder):
    master = start_master(folder, "--seconds", 0.05, "SYSTEM.NUM_WORKERS", 2)
    rng = random.Random(0)

    def at_work():
        """Workers that have done a block: a new one that is killed before it has leaves no trace of its own."""
        return sorted(set(worker_processes(folder)) & {result["worker"] for result in results(folder).values()})

    for done in range(2, BLOCKS - 5, 4):
        wait_for(lambda done=done: len(results(folder)) >= done)
        wait_for(at_work)
        os.kill(rng.choice(at_work()), signal.SIGKILL)
    assert master.wait(60) == 0, (folder / "master.log").read_text()
    found = results(folder)
    assert len(found) == BLOCKS
    assert len({result["worker"] for result in found.values()}) > 2
    assert worker_processes(folder) == []


def test_workers_of_a_killed_master_end_and_the_next_one_goes_on(folder):
    master = start_master(folder, "--seconds", 0.1, "SYSTEM.NUM_WORKERS", 2)
    wait_for(lambda: len(results(folder)) >= 5)
    master.kill()
    master.wait()
    wait_for(lambda: not worker_processes(folder), 20)
    before = results(folder)
    summary = run_blocks(config(2), toy_task(folder, 0.1))
    assert summary.skipped >= 3
    assert summary.done + summary.skipped == BLOCKS
    after = results(folder)
    assert len(after) == BLOCKS
    assert {n: after[n]["corners"] for n in before} == {n: before[n]["corners"] for n in before}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_master_ends_everything(folder, number, status):
    master = start_master(folder, "--seconds", 0.1, "SYSTEM.NUM_WORKERS", 2)
    wait_for(lambda: len(results(folder)) >= 3)
    master.send_signal(number)
    assert master.wait(20) == status
    assert worker_processes(folder) == []
    done = len(results(folder))
    assert 3 <= done < BLOCKS
    assert "the same command does the rest" in (folder / "master.log").read_text()


def test_two_runs_do_not_work_in_one_folder(folder, monkeypatch):
    """A run of another volume of that name would give its task to the workers of this one."""
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT", 0.3)
    task = toy_task(folder)
    for kept, file in ((task.folder, task.folder / "lock"), (task.markers, folder / "markers.lock")):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            with pytest.raises(UserError, match=rf"another run works in {kept}"):
                run_blocks(config(1), task)
    with open(folder / "markers.lock") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=rf"another run works in {task.markers}"):
            discard_markers(task.markers)
    assert run_blocks(config(1), task).done == BLOCKS


def test_other_settings_are_refused_until_the_finished_blocks_are_dropped(folder):
    cause = trouble(folder, "full_4")
    with pytest.raises(UserError, match="no room"):
        run_blocks(config(1), toy_task(folder))
    cause.unlink()
    other = toy_task(folder, settings={"INS_SEGMENT.CONTEXT": (1, 1, 1), "DATA.FIB": 1})
    message = r"INS_SEGMENT.CONTEXT \(was \[10, 10, 0\], is \[1, 1, 1\]\) changed, which makes (\d+) finished blocks"
    with pytest.raises(UserError, match=message) as raised:
        run_blocks(config(1), other)
    assert "DATA.DROP_DS_MONGOTABLE True" in str(raised.value)
    assert "DATA.FIB" not in str(raised.value)
    assert 0 < int(str(raised.value).partition("makes ")[2].split()[0]) < BLOCKS
    with pytest.raises(UserError, match="volume"):
        run_blocks(config(1), toy_task(folder, total_roi=VOLUME))
    discard_markers(other.markers)
    assert run_blocks(config(1), other).done == BLOCKS


def test_masked_blocks_are_skipped_and_not_recorded_as_done(folder):
    skip = np.ones((3, 3, 3), bool)
    skip[0, 0, :2] = False
    summary = run_blocks(config(1), toy_task(folder, skip=skip))
    assert (summary.done, summary.skipped) == (2, BLOCKS - 2)
    assert {tuple(result["corners"][2]) for result in results(folder).values()} == {(80, 0, 40), (80, 0, 70)}
    assert run_blocks(config(1), toy_task(folder, skip=skip)).done == 0
    assert run_blocks(config(1), toy_task(folder)).done == BLOCKS - 2


def test_workers_get_the_resolved_config_the_password_and_a_gpu_each(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7,8")
    cfg = config(
        3,
        "DATA.DB_HOST",
        "mongodb://me:secret@host",
        "TRAIN.SEED",
        5,
        "TRAIN.DEVICE",
        "multi_gpu",
        "SYSTEM.NUM_GPUS",
        2,
    )
    (folder / "experiment.yaml").write_text("TRAIN: {SEED: 6}")
    trouble(folder, "wait_for_3_workers")
    run_blocks(cfg, toy_task(folder, gpu=True))
    found = results(folder).values()
    assert {result["seed"] for result in found} == {5}
    assert {result["database"] for result in found} == {"mongodb://me:secret@host"}
    assert {result["device"] for result in found} == {"3", "7"}
    for file in (folder / "daisy_logs").rglob("*"):
        assert file.is_dir() or "secret" not in file.read_text()
    (folder / "experiment.yaml").unlink()
    assert load_config(folder / "daisy_logs" / "sample_toy" / "config_0.yaml").TRAIN.SEED == 5


def test_a_worker_that_does_not_see_the_files_says_so(folder):
    names = ("config_0.yaml", "step.json", "records", "worker_0.log")
    command = [sys.executable, "-m", "lsdseg.engine.blocks.worker", *(f"/nowhere/{name}" for name in names)]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    worker = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert worker.returncode == 2
    assert "does not see /nowhere/config_0.yaml" in worker.stdout


def test_a_stopped_worker_is_replaced(folder):
    def stop_one():
        wait_for(lambda: len(results(folder)) >= 3)
        os.kill(worker_processes(folder)[0], signal.SIGSTOP)

    with meanwhile(stop_one):
        assert run_blocks(config(1), toy_task(folder, 0.05)).done == BLOCKS
    assert len({result["worker"] for result in results(folder).values()}) == 2
    assert "killed, because it was stopped" in (folder / "daisy_logs/sample_toy/worker_0.log").read_text()
    assert worker_processes(folder) == []


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_supervisor_that_is_silent_or_gone_is_replaced(folder, number, monkeypatch, capsys):
    monkeypatch.setattr(run, "SECONDS_OF_SILENCE", 5)
    first_workers = []

    def strike():
        wait_for(lambda: len(results(folder)) >= 3)
        first_workers.extend(worker_processes(folder))
        os.kill(supervisor(folder), number)
        if number == signal.SIGSTOP:  # else they end with it
            for worker in first_workers:
                os.kill(worker, signal.SIGKILL)

    with meanwhile(strike):
        assert run_blocks(config(2), toy_task(folder, 0.3)).done == BLOCKS
    assert len(results(folder)) == BLOCKS
    assert "the supervisor of the workers was killed" in capsys.readouterr().out
    assert not {result["worker"] for result in results(folder).values()} <= set(first_workers)
    assert worker_processes(folder) == []


def test_nothing_that_is_stopped_outlives_a_killed_master(folder):
    trouble(folder, "wait_for_3_workers")  # one that is stopped while it starts is not bound to its parent yet
    master = start_master(folder, "--seconds", 0.2, "SYSTEM.NUM_WORKERS", 3)
    wait_for(lambda: len(results(folder)) >= 3)
    processes = [*worker_processes(folder), supervisor(folder)]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    master.kill()
    master.wait()
    wait_for(lambda: not any(Path(f"/proc/{process}/cmdline").exists() for process in processes))


def test_a_run_waits_for_the_workers_of_one_that_was_killed(folder, monkeypatch):
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT", 0.3)
    with open(folder / "markers.workers.lock", "w") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="another run works in"):
            run_blocks(config(1), toy_task(folder))
    assert run_blocks(config(1), toy_task(folder)).done == BLOCKS


INTRUDER = """
import sys
import daisy
from daisy import Client, Context
context = Context.from_env()
context["task_id"] = sys.argv[1] or context["task_id"]
client = Client(context)
for _ in range(9):
    with client.acquire_block() as block:
        print(block, flush=True)
"""


@pytest.mark.parametrize("name", ["", "toy"], ids=["knows the secret", "does not know the secret"])
def test_blocks_that_others_report_as_done_are_done(folder, name, capfd):
    def intrude():
        wait_for(lambda: len(results(folder)) >= 2)
        environment = Path(f"/proc/{worker_processes(folder)[0]}/environ").read_bytes().decode().split("\0")
        (context,) = (entry for entry in environment if entry.startswith("DAISY_CONTEXT="))
        secret = re.search("task_id=(toy-[0-9a-f]+)", context)[1]
        (folder / "secret").write_text(secret)
        intruder = [sys.executable, "-c", INTRUDER, name]
        variables = os.environ | {"DAISY_CONTEXT": context.partition("=")[2]}
        taken = subprocess.run(intruder, env=variables, capture_output=True, text=True)
        assert (taken.stdout.count(secret) == 9) == (not name), taken

    with meanwhile(intrude):
        summary = run_blocks(config(1), toy_task(folder, 0.1))
    assert (summary.done, summary.failed) == (BLOCKS, 0)
    assert len(results(folder)) == BLOCKS
    assert "a program that is no worker of this run" in capfd.readouterr().out


def test_the_secret_of_a_run_is_in_no_file(folder):
    """Whoever may read the logs may not take part."""
    trouble(folder, "raise_4")
    with pytest.raises(UserError, match="failed"):
        run_blocks(config(1), toy_task(folder))
    logs = "".join(file.read_text() for file in (folder / "daisy_logs/sample_toy").iterdir())
    assert logs.count("ValueError: block 4 is bad") == 8  # in the log and in the report of each try
    assert not re.search("toy-[0-9a-f]{8}", logs)


def test_a_disk_that_a_block_fills_is_named(small_disk, monkeypatch):
    """Not even the reason can be written there."""
    disk = small_disk(2000)
    monkeypatch.chdir(disk)
    cause = trouble(disk, "fill_4")
    with pytest.raises(UserError, match=r"No space left on device"):
        run_blocks(config(1), toy_task(disk))
    cause.unlink()
    (disk / "ballast").unlink()
    run_blocks(config(1), toy_task(disk))
    assert len(results(disk)) == BLOCKS


@pytest.mark.parametrize("free", [0, 1])
def test_a_disk_that_fills_at_the_markers_spoils_nothing(folder, small_disk, free):
    disk = small_disk(200)
    task = toy_task(folder, markers=disk / "markers")
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 4096 * free)
    with pytest.raises(UserError, match=r"No space left on device; free some space, then run the same command again"):
        run_blocks(config(2), task)
    filler.unlink()
    assert run_blocks(config(2), task).done <= BLOCKS
    assert len(results(folder)) == BLOCKS


def test_damaged_markers_are_recognized(folder):
    task = toy_task(folder)
    run_blocks(config(1), task)
    (file,) = record_files(task.markers)
    whole = file.read_bytes()
    assert len(whole) == BLOCKS * RECORD.itemsize
    for damage, left in [
        (whole[:-5], 1),  # a worker that was killed, a full disk
        (whole[: -RECORD.itemsize] + bytes(RECORD.itemsize), 1),  # a machine that crashed
        (b"\xff" * RECORD.itemsize + whole, 0),
        (b"", BLOCKS),
    ]:
        file.write_bytes(damage)
        assert blocks_left(task) == left
    for damage in ("", "{", "[]", "\0" * 100, "[" * 100_000):
        (task.markers / "settings.json").write_text(damage)
        with pytest.raises(UserError, match=r"settings.json cannot be read .*: set DATA.DROP_DS_MONGOTABLE True"):
            run_blocks(config(1), task)
    discard_markers(task.markers)
    assert run_blocks(config(1), task).done == BLOCKS


def test_damaged_files_of_a_run_are_written_anew(folder):
    cause = trouble(folder, "full_4")
    with pytest.raises(UserError, match="no room"):
        run_blocks(config(1), toy_task(folder))
    cause.unlink()
    for name in ("config_0.yaml", "step.json", "stopped", ALIVE):
        (folder / "daisy_logs/sample_toy" / name).write_bytes(b"\0{[")
    run_blocks(config(1), toy_task(folder))
    assert len(results(folder)) == BLOCKS


def test_markers_of_another_grid_are_no_markers_of_this_one(folder):
    run_blocks(config(1), toy_task(folder))
    block = Roi(VOLUME.begin, (20, 40, 30))
    other = toy_task(folder, read_roi=block.grow(CONTEXT, CONTEXT), write_roi=block)
    with pytest.raises(UserError, match=r"blocks of another size or volume \(block \(nm\) was .*BLOCK_SIZE"):
        blocks_left(other)


def test_the_markers_of_version_0_1_count(folder):
    """daisy wrote them; its grid begins with the context, which is more than two blocks here."""
    context = (0, 100, 10)
    task = toy_task(
        folder, total_roi=VOLUME.grow(context, context), read_roi=Roi(VOLUME.begin, (40, 40, 30)).grow(context, context)
    )
    done = []

    def process(block):
        if len(done) == 10:
            raise KeyError
        done.append(tuple((block.write_roi.begin - VOLUME.begin) / block.write_roi.shape))

    earlier = daisy.Task(
        "toy", task.total_roi, task.read_roi, task.write_roi, process, read_write_conflict=False, fit="shrink",
        max_retries=0, tracking_path=str(task.markers / "blocks"),
    )  # fmt: skip
    assert tuple(earlier.block_grid_shape) == task.grid == (3, 3, 3)
    with contextlib.suppress(RuntimeError, KeyError):
        daisy.run_blockwise(earlier, multiprocessing=False, progress=False, summary=False)
    assert len(done) == 10
    assert {tuple(map(int, index)) for index in np.argwhere(finished(task))} == set(done)
    assert run_blocks(config(1), task).skipped == 10


def test_a_second_run_counts_blocks_that_are_both_done_and_skipped_once(folder):
    run_blocks(config(1), toy_task(folder))
    assert blocks_left(toy_task(folder, skip=np.ones((3, 3, 3), bool))) == 0


def test_slurm_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UserError, match=r"CLUSTER.TYPE is 'slurm' but there is no sbatch here"):
        run_blocks(config(1, "CLUSTER.TYPE", "slurm"), toy_task(folder))
    assert not (folder / "markers").exists()
