"""What a run shows of itself, and what it makes of blocks that fail one after the other."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.engine.blocks.markers import (
    RECORD,
    TIMED,
    UNTIMED,
    blocks_left,
    missing_blocks,
    new_record_file,
    record_files,
    records_in,
)
from lsdseg.engine.blocks.reports import Report, same_error
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.blocks.status import DONE, FAILED, LEFT, RUNNING, SKIP, draw_map, duration, statuses, text_map
from lsdseg.errors import UserError
from tests.block_master import BLOCKS, config, results, start_master, toy_task, trouble, wait_for


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status_script(*arguments):
    return subprocess.run(
        [sys.executable, CHECKOUT / "status.py", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_run_shows_how_far_it_is(folder):
    skip = np.zeros((3, 3, 3), bool)
    skip[0] = True
    run_blocks(config(2), toy_task(folder, skip=skip))
    (status,) = statuses(folder)
    assert (status.step, status.active, status.blocks) == ("sample_toy", False, BLOCKS)
    assert (status.done, status.skipped, status.running, status.failed) == (BLOCKS - 9, 9, [], [])
    assert (status.map[0] == SKIP).all()
    assert (status.map[1:] == DONE).all()
    block, seconds = status.slowest[0]
    assert seconds == pytest.approx(records_in(record_files(toy_task(folder).markers))["seconds"].max())
    assert tuple(block.begin) in {tuple(result["corners"][2]) for result in results(folder).values()}

    shown = status_script(folder, "--png", folder / "map.png")
    assert shown.returncode == 0
    assert f"sample_toy is done: {BLOCKS - 9} of {BLOCKS} blocks are done, 0 running, 0 left, 9 skipped" in shown.stdout
    draw_map(replace(status, step="a_long_name" * 12), folder / "long.png")
    for name in ("map.png", "long.png"):
        with Image.open(folder / name) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("L"))
        assert (pixels[:, [0, 1, -2, -1]] == 255).all()  # no text is cut
        assert (pixels[:40] < 128).any()
    (content,) = json.loads(status_script(folder / "daisy_logs" / "sample_toy", "--json").stdout)
    assert (content["done"], content["seconds_left"], content["active"]) == (BLOCKS - 9, None, False)


def test_a_run_can_be_watched_from_another_process(folder):
    trouble(folder, "hang_4")
    master = start_master(folder, "SYSTEM.NUM_WORKERS", 2)
    try:
        wait_for(lambda: (folder / "daisy_logs/sample_toy/step.json").is_file(), 30)
        wait_for(lambda: statuses(folder)[0].done >= BLOCKS - 2, 60)
        status = statuses(folder)[0]
        assert status.active
        assert status.per_minute > 0
        assert 0 < status.seconds_left < 3600
        running = status.running[0]
        assert status.map.reshape(-1)[running.block] == RUNNING
        assert running.log.startswith("worker_")
    finally:
        master.kill()
        master.wait()


def test_a_failed_block_is_named_with_its_place_and_its_log(folder):
    cause = trouble(folder, "raise_4")
    with pytest.raises(UserError, match="failed 4 times"):
        run_blocks(config(2), toy_task(folder))
    (status,) = statuses(folder)
    (failed,) = status.failed
    assert failed.error == "ValueError: block 4 is bad"
    assert (status.done, status.map.reshape(-1)[failed.block]) == (BLOCKS - 1, FAILED)
    assert "is bad" in (folder / "daisy_logs" / "sample_toy" / failed.log).read_text()
    text = status_script(folder).stdout
    assert "has ended before it was done" in text
    assert f"failed: block {failed.block}, {failed.place}: ValueError: block 4 is bad" in text
    assert "!" in text.rpartition("\n  done, seen")[0].splitlines()[-1] + text
    cause.unlink()
    run_blocks(config(2), toy_task(folder))
    assert statuses(folder)[0].failed == []


def test_a_run_goes_on_without_blocks_that_fail_where_it_may(folder, capfd):
    trouble(folder, "raise_4")
    trouble(folder, "kill_7")
    with pytest.raises(UserError, match=r"failed 4 times.*set CLUSTER.SKIP_FAILED True"):
        run_blocks(config(2), toy_task(folder))
    assert "ValueError: block 4 is bad (worker_" in capfd.readouterr().err
    go_on = config(2, "CLUSTER.SKIP_FAILED", True)
    with pytest.raises(UserError, match=r"failed 4 times, see \S+; 2 of 27 blocks .* only these$"):
        run_blocks(go_on, toy_task(folder, may_skip=False))
    summary = run_blocks(go_on, toy_task(folder))
    assert (summary.done, summary.failed) == (0, 2)
    assert "goes on without 2 blocks" in capfd.readouterr().out
    assert blocks_left(toy_task(folder)) == 0
    places = [result["corners"][2:] for result in results(folder).values()]
    missing = missing_blocks(toy_task(folder).markers)
    assert len(places) == BLOCKS - 2
    assert len(missing) == 2
    assert all([begin, [b + s for b, s in zip(begin, shape, strict=True)]] not in places for begin, shape in missing)
    (status,) = statuses(folder)
    assert (status.skipped, status.failed) == (2, [])
    run_blocks(config(2), toy_task(folder))
    assert "nothing to do, all 27 blocks are done but 2, which are given up" in capfd.readouterr().out


def test_a_run_in_which_all_blocks_fail_alike_ends_with_that_error_once(folder, capfd):
    for number in range(BLOCKS + 1):
        trouble(folder, f"raise_{number}")
    with pytest.raises(
        UserError, match=r"ValueError: block \d+ is bad -- .*failed [567] blocks in a row.*nm; .*worker_"
    ):
        run_blocks(config(2), toy_task(folder))
    output = capfd.readouterr()
    assert (output.err + output.out).count("is bad") <= 1
    assert "Traceback" not in output.err + output.out
    assert not results(folder)
    few = load_config(overrides=["SYSTEM.NUM_WORKERS", 2, "CLUSTER.SAME_ERRORS", 2])
    with pytest.raises(UserError, match=r"failed [234] blocks in a row"):
        run_blocks(few, toy_task(folder))


def test_only_blocks_that_fail_alike_since_the_last_success_count():
    def report(block, error, time):
        return Report(block, [0, 0, 0], [1, 1, 1], "worker_0.log", error, time)

    found = [report(1, "no chunk 3", 1), report(2, "full", 2), report(3, "no chunk 4", 3), report(3, "no chunk 4", 4)]
    assert [same.block for same in same_error(found, 0)] == [3]
    found += [report(4, "no chunk 5", 5)]
    assert [same.block for same in same_error(found, 0)] == [3, 4]
    assert [same.block for same in same_error(found, 4)] == [4]
    assert same_error([], 0) == []


def test_a_log_gets_lines_instead_of_a_bar(folder, capfd, monkeypatch):
    monkeypatch.setattr("lsdseg.engine.blocks.run.SECONDS_BETWEEN_LINES", 0.2)
    run_blocks(config(1), toy_task(folder, arguments={"folder": str(folder), "seconds": 0.05}))
    output = capfd.readouterr()
    assert "%|" not in output.err
    lines = [line for line in output.out.splitlines() if f"of {BLOCKS} blocks" in line and "toy of sample:" in line]
    assert len(lines) >= 2


def test_records_of_an_earlier_version_are_read(tmp_path):
    old, timed, new = tmp_path / "a", tmp_path / "b.timed", new_record_file(tmp_path)
    np.array([(3, 1.5, 200)], UNTIMED).tofile(old)
    np.array([(4, 2.5, 300, 17.0)], TIMED).tofile(timed)
    np.array([(5, 3.5, 400, 18.0, 7, 8, 9)], RECORD).tofile(new)
    records = np.sort(records_in({old, timed, new}), order="block")
    assert records[["block", "seconds", "megabytes"]].tolist() == [(3, 1.5, 200.0), (4, 2.5, 300.0), (5, 3.5, 400.0)]
    assert records["time"].tolist() == [old.stat().st_mtime, 17.0, 18.0]
    assert records[["computed", "written", "bytes"]].tolist() == [(0, 0, 0), (0, 0, 0), (7, 8, 9)]


def test_a_map_shows_what_is_done_and_what_failed():
    blocks = np.full((4, 2, 3), LEFT, np.uint8)
    blocks[:, 0, 0] = DONE
    blocks[:2, 0, 1] = DONE
    blocks[3, 0, 2] = RUNNING
    blocks[:, 1, 0] = SKIP
    blocks[0, 1, 1] = FAILED
    assert text_map(blocks, 80)[:2] == ["█▒+", " !·"]
    assert len(text_map(np.full((1, 500, 1000), DONE, np.uint8), 80)[0]) <= 80


def test_durations_in_words():
    texts = [duration(seconds) for seconds in (45, 720, 12000, 187200)]
    assert texts == ["45 s", "12 min", "3 h 20 min", "2 d 4 h"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    refused = status_script(tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: no blockwise step was run in {tmp_path}: name the folder")
    step = tmp_path / "daisy_logs" / "sample_toy"
    step.mkdir(parents=True)
    (step / "step.json").write_text(json.dumps({"open_worker": "x", "arguments": {}, "grid": [1, 1, 1]}))
    assert "is of an earlier version: start the step again" in status_script(tmp_path).stderr
