"""The precision that TRAIN.MIXED_PRECISION "auto" stands for."""

import time

import pytest
import torch
from test_predict import ANEW, config, home  # noqa: F401
from torch import nn

from lsdseg.data_utils.volumes import open_array
from lsdseg.engine import fastest
from lsdseg.engine.device import Precision
from lsdseg.engine.fastest import find_precision, time_precisions
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.engine.training.trainer import training_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lsdseg"


def run_that_is_slow_in(*names, change=0.0):
    """A pass that sleeps in these precisions, and whose output in bf16 is off by `change`."""
    calls = []

    def run(network, precision):
        name = "bf16" if precision.dtype else "no"
        calls.append(name)
        time.sleep(0.05 * (name in names))
        return [network(torch.ones(1, 3)) * 0 + change * (name == "bf16")]

    return run, calls


@pytest.mark.parametrize(("slow", "fast"), [("no", "bf16"), ("bf16", "no")])
def test_the_faster_precision_is_chosen_and_timed_only_once(slow, fast, cache):
    network = nn.Linear(3, 2)
    run, calls = run_that_is_slow_in(slow)
    chosen = find_precision("auto", CPU, network, run)
    assert chosen.dtype == Precision.DTYPES[fast]
    timed = len(calls)
    assert timed >= 2
    assert find_precision("auto", CPU, network, run).dtype == chosen.dtype
    assert len(calls) == timed
    find_precision("auto", CPU, nn.Linear(3, 4), run)
    assert len(calls) == 2 * timed
    for file in cache.iterdir():
        file.write_text("{")
    assert find_precision("auto", CPU, network, run).dtype == chosen.dtype
    assert len(calls) == 3 * timed


def test_a_precision_that_changes_the_outputs_is_not_chosen():
    run, _ = run_that_is_slow_in("no", change=0.01)
    assert time_precisions(CPU, nn.Linear(3, 2), run) == "no"
    run, _ = run_that_is_slow_in("no", change=0.003)
    assert time_precisions(CPU, nn.Linear(3, 2), run) == "bf16"


def test_without_a_folder_to_keep_it_in_the_precision_is_found_anyway(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    run, calls = run_that_is_slow_in("no")
    for _ in range(2):
        assert find_precision("auto", CPU, nn.Linear(3, 2), run).dtype == torch.bfloat16
    assert len(calls) == 2 * 2 * fastest.REPEATS


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_auto_is_timed_with_the_network_that_predicts(home, padding, cache):  # noqa: F811
    cfg = config(home, "TRAIN.MIXED_PRECISION", "auto", padding=padding)
    predictor = TilePredictor(cfg)
    assert len(list(cache.iterdir())) == 1
    raw = open_array(home / "connexion/data/HEMI/data_3d/test/sample.zarr", "volumes/raw")
    expected = TilePredictor(config(home, padding=padding))(raw, (0, 0, 0), (8, 8, 8))
    found = predictor(raw, (0, 0, 0), (8, 8, 8))
    assert max(abs(found[task] - expected[task]).max() for task in expected) < 0.03


def test_auto_leaves_the_random_numbers_of_a_training_as_they_are(home):  # noqa: F811
    drawn = []
    for name in ("no", "auto"):
        torch.manual_seed(0)
        training_precision(config(home, "TRAIN.MIXED_PRECISION", name), CPU)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_prediction_says_how_long_it_will_take_once_it_is_known(home, capsys):  # noqa: F811
    cfg = config(home, *ANEW)
    for known in (False, True):
        predict(cfg)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiles: ")]
        assert ("about" in line) == known
