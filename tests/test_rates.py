"""What runs measure for later estimates: which blocks count, and a file that several runs write and that may break."""

import json
import multiprocessing
import re

import daisy
import numpy as np
import pytest
from funlib.geometry import Roi

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import measured_path
from lsdseg.engine.blocks.markers import RECORD
from lsdseg.engine.blocks.rates import Rate, bytes_written, keep_rate, rate_name, read_rates
from lsdseg.engine.blocks.run import run_blocks
from lsdseg.engine.estimate import LARGE, seconds_at_once, voxels_with_context
from lsdseg.errors import UserError
from tests.block_master import BLOCKS, config, toy_task, trouble

COMPUTED, WRITTEN = 5000, 3000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_keeps_what_its_own_blocks_took_and_nothing_else(folder):
    cfg = config(1, "DATA.HOME", str(folder))
    skip = np.zeros((3, 3, 3), bool)
    skip[0] = True  # 9 blocks
    *empty, bad = [block_number(place) for place in ((1, 0, 0), (1, 1, 1), (2, 1, 0), (2, 2, 2))]
    arguments = {"folder": str(folder), "seconds": 0.01, "work": [COMPUTED, WRITTEN], "empty": empty}
    task = toy_task(folder, arguments=arguments, skip=skip, rate=lambda workers: f"toy, {workers} workers")
    cause = trouble(folder, f"raise_{bad}")
    with pytest.raises(UserError, match="blocks of toy of sample failed"):
        run_blocks(cfg, task)
    (rates,) = read_rates([measured_path(cfg)]).items()
    name, rate = rates
    assert name == "toy, 1 workers"
    # Not those that are skipped, empty or failed, nor the first of each worker, which ends after a block that fails.
    assert 9 <= rate.blocks <= BLOCKS - 9 - 3 - 1 - 1
    assert (rate.computed, rate.written, rate.largest) == (rate.blocks * COMPUTED, rate.blocks * WRITTEN, COMPUTED)
    assert rate.seconds >= 0.01 * rate.blocks
    assert rate.bytes > 100 * rate.blocks
    assert rate.peak > 10**7

    cause.unlink()
    task.rate = lambda workers: "toy"
    run_blocks(cfg, task)  # one block is left
    run_blocks(cfg, task)  # none is
    after = read_rates([measured_path(cfg)])
    assert after["toy"].blocks == 1
    assert after["toy, 1 workers"] == rate


def block_number(place):
    """The number that daisy gives to a block of a grid of 3 x 3 x 3."""
    block = Roi(place, (1, 1, 1))
    return daisy.Block(Roi((0, 0, 0), (3, 3, 3)), block, block).block_id[1]


def records(*blocks):
    return np.array([(n + 1, seconds, 100, 0, computed, 1, 1) for n, (seconds, computed) in enumerate(blocks)], RECORD)


def test_empty_blocks_and_the_first_of_a_worker_are_left_out():
    several = [records((50, 10), (2, 10), (0.001, 0), (4, 20)), records((60, 10), (6, 20)), records((0.001, 0))]
    assert (Rate.of_workers(several).blocks, Rate.of_workers(several).computed) == (3, 50)
    assert Rate.of_workers(several).seconds_for(100) == pytest.approx(24)
    single = Rate.of_workers([records((5, 10)), records((7, 20))])
    assert (single.blocks, single.seconds, single.largest) == (2, 12, 20)
    assert Rate.of_workers([records((1, 0))]) == Rate.of_workers([]) == Rate()


def test_memory_is_that_of_the_largest_blocks():
    small, large = Rate(1, 10, 10, 1.0, 1, peak=90, largest=10), Rate(1, 50, 50, 1.0, 1, peak=80, largest=50)
    assert (small + large) == (large + small)
    assert (small + large).peak_for(100, libraries=30) == 30 + 100


def test_several_runs_keep_theirs_at_once(folder):
    cfg = load_config(None, ["DATA.HOME", str(folder)])
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=_keep_often, args=(cfg, name)) for name in ("a", "a", "b")]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    found = read_rates([measured_path(cfg)])
    assert {name: (rate.blocks, rate.computed) for name, rate in found.items()} == {"a": (20, 60), "b": (10, 30)}
    assert sorted(path.name for path in measured_path(cfg).parent.iterdir()) == ["measured.json", "measured.lock"]


def _keep_often(cfg, name):
    for _ in range(10):
        keep_rate(cfg, name, Rate(1, 3, 3, 0.5))


GOOD = {"blocks": 1, "computed": 3, "written": 3, "seconds": 1.0, "bytes": 0, "peak": 0, "largest": 3}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        '{"a": {"blocks": 1',
        "[]",
        "\0" * 100,
        "[" * 100_000,
        '{"a": 3}',
        '{"a": {"steps": 3}}',
        json.dumps({"a": GOOD | {"seconds": "long"}}),
        json.dumps({"a": GOOD | {"seconds": float("nan")}}),
        json.dumps({"a": GOOD | {"blocks": -1}}),
        json.dumps({"a": GOOD | {"computed": 0}}),
    ],
)
def test_a_damaged_file_is_named_in_one_line_and_written_anew(folder, capsys, damage):
    cfg = load_config(None, ["DATA.HOME", str(folder)])
    path = measured_path(cfg)
    path.parent.mkdir()
    path.write_text(damage)
    assert read_rates([path]) == {}
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: .*measured\.json .*: .* the next run writes it anew\n", said)
    keep_rate(cfg, "a", Rate(**GOOD))
    capsys.readouterr()
    assert read_rates([path, folder / "none.json"]) == {"a": Rate(**GOOD)}
    assert capsys.readouterr().err == ""


def test_a_run_does_not_fail_because_its_measurements_cannot_be_written(folder, capsys):
    cfg = load_config(None, ["DATA.HOME", str(folder), "DATA.OUTFILE", str(folder / "file" / "outputs")])
    (folder / "file").write_text("")
    keep_rate(cfg, "a", Rate(**GOOD))
    assert re.fullmatch(r"warning: what this run measured .* is lost: cannot write .*\n", capsys.readouterr().err)


def test_what_was_measured_elsewhere_has_another_name(monkeypatch):
    here, job = load_config(), load_config(None, ["CLUSTER.TYPE", "slurm", "CLUSTER.PARTITION", "gpu"])
    assert rate_name(job, "fragments") == "fragments on slurm gpu"
    assert rate_name(here, "fragments") not in ("fragments on ", rate_name(job, "fragments"))
    monkeypatch.setattr("lsdseg.engine.blocks.rates.processor", lambda: "another")
    assert rate_name(here, "fragments") == "fragments on another"


def test_bytes_are_those_that_go_into_files(tmp_path):
    before = bytes_written()
    (tmp_path / "file").write_bytes(bytes(12345))
    assert 12345 <= bytes_written() - before < 12345 + 1000


def test_voxels_are_counted_with_the_context_that_lies_in_the_volume():
    shape, block, context = (50, 20, 7), (16, 20, 3), (5, 40, 0)
    inside = 0
    for z in range(0, 50, 16):
        for x in range(0, 7, 3):
            inside += len(range(max(0, z - 5), min(50, z + 21))) * 20 * len(range(x, min(7, x + 3)))
    assert voxels_with_context(shape, block, context) == inside


def test_a_small_volume_does_not_say_how_long_a_large_one_takes():
    typical, started = 1e-8, Rate(2, computed=2 * 10**6, seconds=10.0)
    assert seconds_at_once(started, 10**6, typical) == 5  # as it was
    assert seconds_at_once(started, 10**12, typical) == pytest.approx(1e12 * typical, rel=0.5)
    slow = Rate(1, computed=100 * LARGE, seconds=100 * LARGE * 2e-8)
    assert seconds_at_once(slow, 10**12, typical) == pytest.approx(2e4, rel=0.02)
    assert 0 < seconds_at_once(slow, 10**6, typical) < 0.01 * slow.seconds
