"""The copy of a run for Weights & Biases, which tests keep offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import CHECKOUT, config, pairs
from test_training import home as home
from test_training import volume as volume

from lsdseg.engine.training.train import train
from lsdseg.errors import UserError


def run_trainer(home, mode, **overrides):
    settings = pairs(home, PREPROCESS__USE_WANDB=True, TRAIN__EPOCHS=2, **overrides)
    # Without a home folder, wandb finds no key of the user.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_MODE": mode, "HOME": str(home), "NETRC": str(home / "netrc")}
    command = [sys.executable, CHECKOUT / "trainer.py", *settings]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=180)


def test_a_run_is_kept_for_weights_and_biases(home):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    done = run_trainer(home, "offline", SYSTEM__NUM_WORKERS=1)
    assert done.returncode == 0, done.stderr
    logs = Path(config(home).MODEL.LOG_DIR)
    (kept,) = logs.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    events = EventAccumulator(str(logs)).Reload()
    for name in ("loss/lsds", "loss/affs", "learning_rate"):
        assert name.encode() in content
    # TensorBoard keeps float32, wandb what it is given.
    assert f"{events.Scalars('loss/total')[-1].value:.4f}".encode() in content
    assert b"TRAIN.INITIAL_LR" in content
    assert len(list(kept.parent.rglob("*.png"))) == 3


def test_without_a_key_a_run_says_what_to_do(home):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    done = run_trainer(home, "online")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "WANDB_MODE=offline" in lines[0]


def test_a_missing_package_is_named_before_anything_is_written(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train(config(home, PREPROCESS__USE_WANDB=True))
    assert not (home / "lsd_checkpoints").exists()
