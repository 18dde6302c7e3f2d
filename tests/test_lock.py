"""Two masters: whatever one works on, another neither replaces nor writes, from its first look on."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.data_utils.layout import data_folder, output_path
from lsdseg.data_utils.volumes import write_array
from lsdseg.engine.blocks import lock
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.post.steps.edges import agglomerate_blockwise
from lsdseg.engine.post.steps.fragments import extract_fragments_blockwise
from lsdseg.engine.post.steps.relabel import extract_segmentation
from lsdseg.engine.post.steps.tables import find_segments
from lsdseg.engine.post.whole import segment
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import save_untrained

SHAPE = (16, 16, 16)
SCRIPTS = {
    "predicter": predict,
    "super_predicter_daisy": predict_blockwise,
    "instance_segmenter": segment,
    "02": extract_fragments_blockwise,
    "03": agglomerate_blockwise,
    "04": lambda cfg: find_segments(cfg, "mean", 0.5),
    "05": lambda cfg: extract_segmentation(cfg, "mean", 0.5),
}
# What another run does -> the scripts that have to stay away.
KEEPS_OUT = {
    ("predict", ()): list(SCRIPTS),
    ("fragments", ("predict",)): list(SCRIPTS),
    ("agglomerate_mean", ("predict", "fragments")): list(SCRIPTS),
    ("tables_mean", ("predict", "fragments", "agglomerate_mean")): list(SCRIPTS),
    ("segmentation_mean_050", ("predict", "fragments", "agglomerate_mean", "tables_mean")): list(SCRIPTS),
}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """The config of a sample on which everything is done, block by block."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.chdir(home)
        settings = {
            "DATA.HOME": home,
            "TRAIN.CHECKPOINT": home / "run" / "model_checkpoint_1",
            "TRAIN.MODEL_TYPE": "AFF",
            "TRAIN.DEVICE": "cpu",
            "SYSTEM.NUM_WORKERS": 1,
            "MODEL_ISO.NUM_FMAPS": 1,
            "MODEL_ISO.NUM_FMAPS_OUT": 1,
            "MODEL_ISO.FMAP_INC_FACTOR": 1,
            "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2]],
            "MODEL_ISO.KERNEL_SIZE_DOWN": None,
            "MODEL_ISO.KERNEL_SIZE_UP": None,
            "MODEL_ISO.INPUT_SHAPE": (36, 36, 36),
            "MODEL_ISO.GROW_INPUT": (0, 0, 0),
            "INS_SEGMENT.BLOCK_SIZE": (16, 16, 16),
            "INS_SEGMENT.CONTEXT": (8, 8, 8),
            "INS_SEGMENT.MERGE_FUNCTION": "mean",
            "INS_SEGMENT.THRESHOLDS": [0.5],
        }
        cfg = load_config(overrides=[str(part) for item in settings.items() for part in item])
        torch.manual_seed(0)
        save_untrained(cfg.TRAIN.CHECKPOINT, build_model(cfg), cfg)
        raw = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
        write_array(sample(cfg), "volumes/raw", raw, voxel_size=(8, 8, 8), offset=(0, 0, 0))
        for name in ("super_predicter_daisy", "02", "03", "04", "05"):
            SCRIPTS[name](cfg)
        yield cfg


def sample(cfg):
    return data_folder(cfg, "test") / "sample.zarr"


def snapshot(cfg):
    """Path -> time of change of all that there is, apart from the locks themselves."""
    files = [*Path(cfg.DATA.HOME).rglob("*")]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file() and file.suffix != ".lock"}


@contextmanager
def another_run(output, step, reads):
    """A process that works on the output, held up for as long as the body takes."""
    work = f"working_on(Path({str(output)!r}), {step!r}, reads={reads!r})"
    code = f"from pathlib import Path; from lsdseg.engine.blocks.lock import working_on\nwith {work}: print(1); input()"
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        try:
            yield
        finally:
            process.communicate(b"\n")


@pytest.mark.parametrize(("work", "kept_out"), KEEPS_OUT.items(), ids=[step for step, _ in KEEPS_OUT])
def test_nothing_that_another_run_works_on_is_touched(cfg, work, kept_out, monkeypatch):
    monkeypatch.chdir(cfg.DATA.HOME)
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT", 0)
    before = snapshot(cfg)
    drop = load_config(Path(cfg.DATA.HOME) / "daisy_logs/sample_fragments/config_0.yaml")
    drop.defrost()
    drop.DATA.DROP_DS_MONGOTABLE = True
    with another_run(output_path(cfg, sample(cfg)), *work):
        for name in kept_out:
            with pytest.raises(UserError, match="another run works in"):
                SCRIPTS[name](drop)
    assert snapshot(cfg) == before


def test_what_does_not_meet_runs_side_by_side(cfg, monkeypatch):
    monkeypatch.chdir(cfg.DATA.HOME)
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT", 0)
    (_, reads) = list(KEEPS_OUT)[-1]
    other = cfg.clone()
    other.defrost()
    other.INS_SEGMENT.MERGE_FUNCTION = "hist_quant_50"
    with another_run(output_path(cfg, sample(cfg)), "segmentation_mean_070", reads):
        SCRIPTS["03"](other)
        SCRIPTS["05"](cfg)


def test_a_lock_is_given_back_and_may_be_taken_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT", 0)
    for _ in range(2):
        with working_on(tmp_path, "one"), working_on(tmp_path, "one"), working_on(tmp_path, "two", reads=["three"]):
            pass
    with another_run(tmp_path, "one", ()), pytest.raises(UserError, match="another run"), working_on(tmp_path, "one"):
        pass


def test_a_disk_that_fills_up_while_an_output_is_worked_on_is_one_line(small_disk):
    output = small_disk(100) / "a.zarr"
    full = working_on(output, "predict")
    with pytest.raises(UserError, match=r"cannot write .*a\.zarr: No space left on device; free some space"), full:
        output.with_name("other").write_bytes(bytes(200_000))
