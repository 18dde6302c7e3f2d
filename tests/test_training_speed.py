"""Options that make training faster or better, but do not change what it computes: ranks, accumulation, averages."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_training import CHECKOUT, config, pairs, weights_at
from test_training import home as home
from test_training import volume as volume

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import PREDICT_CONFIG, data_folder
from lsdseg.data_utils.volumes import open_array
from lsdseg.engine.device import explain_device_errors
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.training.train import train
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, read_checkpoint

SHORT = {"TRAIN__EPOCHS": 3, "TRAIN__SAVE_EVERY": 3, "MODEL_ISO__PAD_CONV": "same", "MODEL_ISO__INPUT_SHAPE": (20,) * 3}

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def short(home, name, **overrides):
    return config(home, **SHORT, MODEL_ISO__CKPT_FOLDER=home / name, **overrides)


def assert_same_weights(one, other):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-6)


def test_two_processes_train_as_one_with_twice_the_batch(home):
    whole = short(home, "whole", TRAIN__BATCH_SIZE=2)
    train(whole)
    settings = pairs(home, **SHORT, MODEL_ISO__CKPT_FOLDER=home / "ranks")
    run = subprocess.run(
        [*TORCHRUN, CHECKOUT / "trainer.py", *settings],
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("trained at iteration 3") == 1
    assert_same_weights(weights_at(whole, 3), weights_at(short(home, "ranks"), 3))
    half = short(home, "half")
    train(half)
    with pytest.raises(AssertionError):
        assert_same_weights(weights_at(whole, 3), weights_at(half, 3))


def test_a_signal_ends_all_ranks_with_a_checkpoint(home):
    cfg = short(home, "ranks")
    settings = pairs(home, **SHORT | {"TRAIN__EPOCHS": 10**6}, MODEL_ISO__CKPT_FOLDER=home / "ranks")
    run = subprocess.Popen(
        [*TORCHRUN, CHECKOUT / "trainer.py", *settings],
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while latest_checkpoint(cfg.MODEL.CKPT_FOLDER) is None and run.poll() is None:
        time.sleep(0.2)
    run.terminate()
    output, _ = run.communicate(timeout=120)
    iteration = int(latest_checkpoint(cfg.MODEL.CKPT_FOLDER).name.rpartition("_")[2])
    assert output.count(f"stopped at iteration {iteration} of") == 1
    assert not list(Path(cfg.MODEL.CKPT_FOLDER).glob("*.partial"))
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_to_the_same_weights(home):
    plain, compiled = short(home, "plain"), short(home, "compiled", TRAIN__COMPILE=True)
    train(plain)
    counters = torch._dynamo.utils.counters
    counters.clear()
    train(compiled)
    assert counters["stats"]["unique_graphs"] > 0
    assert_same_weights(weights_at(plain, 3), weights_at(compiled, 3))


def test_a_failed_compilation_says_what_to_do(home):
    run = subprocess.run(
        [sys.executable, CHECKOUT / "trainer.py", *pairs(home, **SHORT, TRAIN__COMPILE=True)],
        cwd=home,
        env=os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(home / "cache")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 2, run.stderr
    (error,) = (line for line in run.stderr.splitlines() if line.startswith("error:"))
    assert "TRAIN.COMPILE" in error
    assert "compiler" in error
    assert "Traceback" not in run.stderr
    assert not list(home.rglob("model_checkpoint_*"))


def test_too_little_memory_says_what_to_do():
    with pytest.raises(UserError, match="make it smaller"), explain_device_errors("make it smaller"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), explain_device_errors("make it smaller"):
        torch.ones(2) @ torch.ones(3, 2)


def test_accumulated_gradients_are_those_of_a_larger_batch(home):
    whole, parts = short(home, "whole", TRAIN__BATCH_SIZE=2), short(home, "parts", TRAIN__ACCUMULATE=2)
    train(whole)
    train(parts)
    assert_same_weights(weights_at(whole, 3), weights_at(parts, 3))


def test_averaged_weights_predict_and_survive_a_resume(home):
    ema = {"TRAIN__EMA": 0.5, "TRAIN__EPOCHS": 4, "TRAIN__SAVE_EVERY": 1}
    whole, parts = (config(home, **SHORT | ema, MODEL_ISO__CKPT_FOLDER=home / name) for name in ("whole", "parts"))
    train(whole)
    train(config(home, **SHORT | ema | {"TRAIN__EPOCHS": 2}, MODEL_ISO__CKPT_FOLDER=home / "parts"))
    train(parts)
    states = [read_checkpoint(checkpoint_path(whole.MODEL.CKPT_FOLDER, iteration)) for iteration in (1, 2, 3, 4)]
    name = "lsd_head.conv_pass.0.weight"
    average = states[0]["model_state_dict"][name]
    for state in states[1:]:
        average = 0.5 * average + 0.5 * state["model_state_dict"][name]
    torch.testing.assert_close(states[-1]["ema_state_dict"][name], average)
    resumed = read_checkpoint(checkpoint_path(parts.MODEL.CKPT_FOLDER, 4))
    assert_same_weights(states[-1]["ema_state_dict"], resumed["ema_state_dict"])
    assert_same_weights(states[-1]["model_state_dict"], resumed["model_state_dict"])

    model = build_model(whole)
    load_checkpoint(checkpoint_path(whole.MODEL.CKPT_FOLDER, 4), model, whole)
    torch.testing.assert_close(model.state_dict()[name], average)


@pytest.mark.parametrize("flat", [False, True], ids=["3D", "2D"])
def test_validation_keeps_the_best_weights(home, volume, flat, capsys):
    validation = {
        "TRAIN__VALIDATE_EVERY": 1,
        "TRAIN__VALIDATION_VOLUME": volume,
        "TRAIN__VALIDATION_SHAPE": (16, 24, 24),
    }
    settings = validation | {"DATA__DIM_2D": flat, "INS_SEGMENT__EPSILON_AGGLOMERATE": 0.0}
    if flat:
        settings |= {"MODEL_ISO__DOWNSAMPLE_FACTORS_2D": [[2, 2]], "MODEL_ISO__INPUT_SHAPE_2D": (20, 20)}
        settings |= {"MODEL_ISO__KERNEL_SIZE_DOWN_2D": None, "MODEL_ISO__KERNEL_SIZE_UP_2D": None}
    cfg = short(home, "run", **settings)
    train(cfg)
    lines = [line for line in capsys.readouterr().out.splitlines() if "VOI sum" in line]
    assert len(lines) == 3
    scores = {int(line.split()[1].rstrip(":")): float(line.split("VOI sum ")[1].split()[0]) for line in lines}
    best = read_checkpoint(Path(cfg.MODEL.CKPT_FOLDER) / "model_checkpoint_best")
    assert scores[best["iteration"]] == min(scores.values()) == pytest.approx(best["validation_voi"], abs=1e-3)

    predict_cfg = load_config(
        Path(cfg.MODEL.CKPT_FOLDER) / PREDICT_CONFIG,
        ["TRAIN.CHECKPOINT", str(Path(cfg.MODEL.CKPT_FOLDER) / "model_checkpoint_best")],
    )
    predict(predict_cfg)


def test_validation_needs_a_volume_that_is_not_used_for_training(home, volume):
    with pytest.raises(UserError, match=r"VALIDATION_VOLUME"):
        train(config(home, TRAIN__VALIDATE_EVERY=1))
    with pytest.raises(UserError, match=r"LSD predicts no affinities"):
        train(config(home, TRAIN__VALIDATE_EVERY=1, TRAIN__VALIDATION_VOLUME=volume, TRAIN__MODEL_TYPE="LSD"))
    validated = {"TRAIN__VALIDATE_EVERY": 1, "TRAIN__VALIDATION_VOLUME": volume}
    with pytest.raises(UserError, match=r"METHOD mutex"):
        train(config(home, **validated, INS_SEGMENT__METHOD="mutex"))
    unlabeled = home / "unlabeled.zarr"
    shutil.copytree(volume, unlabeled)
    labels = open_array(unlabeled, "volumes/labels/neuron_ids", "r+")
    labels[1:-1] = 0
    with pytest.raises(UserError, match=r"labels nothing in .*VALIDATION_SHAPE"):
        train(config(home, **validated | {"TRAIN__VALIDATION_VOLUME": unlabeled}, TRAIN__VALIDATION_SHAPE=(4, 4, 4)))
    assert not list(home.rglob("model_checkpoint_*"))
    (data_folder(config(home), "train") / "second.zarr").symlink_to(volume)
    cfg = short(home, "run", TRAIN__VALIDATE_EVERY=3, DATA__TRAIN_TEST_SPLIT=0.5, TRAIN__VALIDATION_SHAPE=(16, 16, 16))
    train(cfg)
    assert (Path(cfg.MODEL.CKPT_FOLDER) / "model_checkpoint_best").is_file()
