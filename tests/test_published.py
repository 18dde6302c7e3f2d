"""What users of the published scripts do, and what those scripts left on disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch
import zarr

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.checks import check_training_volumes
from lsdseg.data_utils.layout import data_folder, lut_path, output_path
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.device import resolve_device
from lsdseg.engine.post.steps.relabel import extract_segmentation
from lsdseg.engine.post.steps.tables import find_segments
from lsdseg.engine.post.whole import segment
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import load_checkpoint
from lsdseg.rag import open_store

SHAPE = (8, 16, 16)
PLACE = {"voxel_size": (8, 8, 8), "offset": (0, 0, 0)}
BLOCK = "(8, 8, 8)"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a test volume and its affinities, as predicted by published scripts: without a record."""
    monkeypatch.chdir(tmp_path)
    cfg = config(tmp_path)
    sample = data_folder(cfg, "test") / "sample_A.zarr"
    write_array(sample, "volumes/raw", np.zeros(SHAPE, np.uint8), **PLACE)
    affinities = np.random.default_rng(0).integers(0, 255, (3, *SHAPE), np.uint8)
    write_array(output_path(cfg, sample), "volumes/pred_affs", affinities, **PLACE)
    return tmp_path


def config(home, *overrides):
    pairs = ["DATA.HOME", home, "TRAIN.CHECKPOINT", Path(home) / "lsd_checkpoints/run/model_checkpoint_1"]
    blocks = ["INS_SEGMENT.BLOCK_SIZE", BLOCK, "INS_SEGMENT.CONTEXT", "(4, 4, 4)", "SYSTEM.NUM_WORKERS", 1]
    return load_config(overrides=[str(part) for part in (*pairs, *blocks, *overrides)])


def of_published_scripts(home):
    """What 02 and 03 of the published scripts leave: fragments under their name, a graph and a config_0.yaml."""
    cfg = config(home)
    output = output_path(cfg, "sample_A.zarr")
    voxels_in_block, blocks = 8**3, [(0, 0), (0, 1), (1, 0), (1, 1)]
    fragments = np.zeros(SHAPE, np.uint64)
    store = open_store(cfg, output, "r+")
    for number, (y, x) in enumerate(blocks):
        ids = np.uint64(number * voxels_in_block + 1) + np.arange(2, dtype=np.uint64)
        fragments[:4, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] = ids[0]
        fragments[4:, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] = ids[1]
        store.write_nodes(number, ids, np.zeros((2, 3)))
        store.write_edges("hist_quant_35", number, ids[:1], ids[1:], np.array([0.2 + 0.1 * number], np.float32))
    write_array(output, "volumes/segmentation_025", fragments, **PLACE)
    for record in output.with_suffix(".rag").glob("*.json"):
        record.unlink()
    folder = home / "daisy_logs" / "sampleA_fragments"
    folder.mkdir(parents=True)
    text = f"""
    DATA: {{HOME: {home}, OUTFILE: {output}, SAMPLE: {output}, SAMPLE_NAME: sampleA, CONTEXT: [800, 800, 800],
           DB_COLLECTION_NAME: sampleA_agglom_blocks_completed_035, SAMPLE_SLICE: 0}}
    TRAIN: {{CHECKPOINT: {cfg.TRAIN.CHECKPOINT}}}
    INS_SEGMENT: {{AFFS_DS: volumes/pred_affs, OUT_FRAGS_DS: volumes/segmentation_025, NUM_VOXELS_IN_BLOCK: 512,
                  MERGE_FUNCTION: hist_quant_35, THRESHOLD: 0.35, BLOCK_SIZE: {list(eval(BLOCK))}, CONTEXT: [4, 4, 4]}}
    MODEL: {{VOXEL_SIZE: [8, 8, 8]}}
    """
    (folder / "config_0.yaml").write_text(text)
    return output, fragments, folder / "config_0.yaml"


def test_04_and_05_go_on_where_published_02_and_03_stopped(home):
    output, fragments, config_0 = of_published_scripts(home)
    run = {"cwd": home, "check": True, "capture_output": True, "text": True}
    # The config as a bare argument, without -mf: that of the config.
    command = [sys.executable, CHECKOUT / "04_find_segments_full.py", config_0, "-th", "0.29"]
    assert "-mf hist_quant_35, and -th one of 0.29" in subprocess.run(command, **run).stdout
    command = [sys.executable, CHECKOUT / "05_extract_segmentation_from_lut.py", config_0]
    subprocess.run([*command, "-mf", "hist_quant_35", "-th", "0.29", "SYSTEM.NUM_WORKERS", "1"], **run)
    found = read(open_array(output, "volumes/final_segmentation_hist_quant_35_029"))
    expected = fragments.copy()
    expected[fragments == 2] = 1  # the only edge up to 0.29
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read(open_array(output, "volumes/segmentation_025")), fragments)


def test_the_table_of_a_truncated_name_is_found(home):
    output, _, config_0 = of_published_scripts(home)
    cfg = load_config(config_0)
    (path,) = find_segments(cfg, None, 0.29)
    lut = np.load(path)["fragment_segment_lut"]
    path.unlink()
    assert int(0.29 * 100) == 28
    np.savez_compressed(lut_path(output, "hist_quant_35", 0.28), fragment_segment_lut=lut)
    extract_segmentation(cfg, "hist_quant_35", 0.29)
    assert "volumes/final_segmentation_hist_quant_35_029" in list_arrays(output)


def test_05_without_options_takes_the_published_ones_and_says_which_tables_there_are(home):
    _, _, config_0 = of_published_scripts(home)
    find_segments(load_config(config_0), None, 0.6)
    command = [sys.executable, CHECKOUT / "05_extract_segmentation_from_lut.py", config_0]
    refused = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "-mf hist_quant_50 -th 0.3 (of hist_quant_50, there are none yet)" in refused.stderr
    with pytest.raises(UserError, match="of hist_quant_35, there are tables at 60 hundredths"):
        extract_segmentation(load_config(config_0), "hist_quant_35", 0.3)


def test_folders_below_the_home_of_a_file_move_with_it(tmp_path):
    file = tmp_path / "published.py"
    file.write_text("""
from yacs.config import CfgNode
_C = CfgNode(dict(
    DATA=dict(HOME="/old/lab", OUTFILE="/old/lab/lsd_outputs"),
    TRAIN=dict(CHECKPOINT="/old/lab/lsd_checkpoints/run/model_checkpoint_1"),
    MODEL_ISO=dict(LOG_DIR="/old/lab/logs/x", CKPT_FOLDER="/old/lab/ckpt/x", OUTPUT_DIR="/elsewhere/snapshots"),
))
""")
    cfg = load_config(file, ["DATA.HOME", "/new"])
    assert (cfg.DATA.OUTFILE, cfg.MODEL.LOG_DIR, cfg.MODEL.CKPT_FOLDER) == (
        "/new/lsd_outputs",
        "/new/logs/x",
        "/new/ckpt/x",
    )
    assert cfg.MODEL.OUTPUT_DIR == "/elsewhere/snapshots"  # lies elsewhere
    assert cfg.TRAIN.CHECKPOINT.startswith("/old/lab")  # a file to read, which does not move
    named = load_config(file, ["DATA.HOME", "/new", "DATA.OUTFILE", "/out"])
    assert named.DATA.OUTFILE == "/out"
    assert load_config(file).DATA.OUTFILE == "/old/lab/lsd_outputs"


def test_in_memory_a_config_without_a_merge_function_takes_the_mean_without_a_merge_in_advance(home):
    output = output_path(config(home), "sample_A.zarr")
    segment(config(home, "INS_SEGMENT.THRESHOLDS", "[0.5]"))
    unnamed = open_array(output, "volumes/segmentation_050")
    assert unnamed.attrs["merge_function"] == "mean"
    labels = read(unnamed)
    named = [
        "INS_SEGMENT.MERGE_FUNCTION",
        "mean",
        "INS_SEGMENT.EPSILON_AGGLOMERATE",
        "0",
        "INS_SEGMENT.THRESHOLDS",
        "[0.5]",
    ]
    segment(config(home, *named))
    np.testing.assert_array_equal(read(open_array(output, "volumes/segmentation_050")), labels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda:0", "cuda"])
def test_the_published_device_falls_back_to_the_cpu(tmp_path, capsys, name):
    assert resolve_device(config(tmp_path, "TRAIN.DEVICE", name)).type == "cpu"
    assert capsys.readouterr().out == f"TRAIN.DEVICE is {name}, but this machine has no GPU: using the CPU\n"


def test_bare_weights_load(tmp_path):
    small = ["MODEL_ISO.NUM_FMAPS", 2, "MODEL_ISO.NUM_FMAPS_OUT", 2, "MODEL_ISO.FMAP_INC_FACTOR", 2]
    cfg = config(tmp_path, *small)
    torch.manual_seed(1)
    saved = build_model(cfg)
    torch.save(saved.state_dict(), tmp_path / "model_checkpoint_300")
    loaded = build_model(cfg)
    assert load_checkpoint(tmp_path / "model_checkpoint_300", loaded, cfg) == 300
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_help_of_the_demo_starts_nothing():
    shown = subprocess.run(
        [sys.executable, CHECKOUT / "demo.py", "--help"], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0
    assert "python demo.py" in shown.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal only on Linux")
def test_a_command_ends_with_the_script_that_called_it(tmp_path):
    (tmp_path / "long.py").write_text("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(300)\n")
    program = f"from lsdseg.cli import call_script\ncall_script({str(tmp_path / 'long.py')!r})"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    called = psutil.Process(int((tmp_path / "pid").read_text()))
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    called.wait(timeout=60)


def test_labels_masks_of_a_folder_with_published_options(tmp_path):
    labels = np.arange(8 * 16 * 16, dtype=np.uint64).reshape(SHAPE) % 3 * 2**62
    write_array(tmp_path / "a.zarr", "volumes/ids", labels, **PLACE)
    script = [sys.executable, CHECKOUT / "data_utils/create_labels_mask.py", "-dir", tmp_path]
    for unlabeled in (0, 2**63):
        named = ["-labels_ds", "volumes/ids", "--mask", f"volumes/mask_{unlabeled}", "-bg_val", str(unlabeled)]
        subprocess.run([*script, *named], check=True)
        mask = read(open_array(tmp_path / "a.zarr", f"volumes/mask_{unlabeled}"))
        assert np.array_equal(mask, labels != unlabeled)


def test_hdf_to_zarr_converts_a_folder_with_published_options(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.hdf", "b.h5"):
        with h5py.File(tmp_path / "in" / name, "w") as file:
            file["volumes/raw"] = np.full(SHAPE, ord(name[0]), np.uint8)
            file["volumes/raw"].attrs.update(resolution=PLACE["voxel_size"], offset=PLACE["offset"])
    (tmp_path / "in" / "notes.txt").touch()

    def convert(*arguments):
        script = [sys.executable, CHECKOUT / "data_utils/hdf_to_zarr.py", *arguments]
        return subprocess.run(script, capture_output=True, text=True, check=False)

    assert convert("-d", tmp_path / "in", "-od", tmp_path / "out").returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.zarr", "b.zarr"]
    raw = open_array(tmp_path / "out" / "b.zarr", "volumes/raw")
    assert (tuple(raw.offset), np.unique(read(raw)).tolist()) == (tuple(PLACE["offset"]), [ord("b")])
    for arguments, message in [
        (["-d", tmp_path / "in"], "name files and where to write: IN.hdf OUT.zarr, or -d FOLDER -od FOLDER"),
        ([tmp_path / "in" / "a.hdf"], "name files and where to write"),
        (["-d", tmp_path / "out", "-od", tmp_path / "new"], "holds no file that ends in .hdf or .hdf5 or .h5"),
    ]:
        refused = convert(*arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert message in refused.stderr
    assert not (tmp_path / "new").exists()


def test_published_sections_are_trained_on_with_the_keys_of_all(tmp_path):
    """volumes/raw/n, volumes/labels/n and volumes/labels_mask/n, written as zarr.open and assignments write them."""
    settings = {
        "DATA.HOME": tmp_path,
        "DATA.DIM_2D": True,
        "SYSTEM.NUM_WORKERS": 0,
        "MODEL_ISO.NUM_FMAPS": 2,
        "MODEL_ISO.FMAP_INC_FACTOR": 1,
        "MODEL_ISO.DOWNSAMPLE_FACTORS_2D": [[2, 2]],
        "MODEL_ISO.KERNEL_SIZE_DOWN_2D": None,
        "MODEL_ISO.KERNEL_SIZE_UP_2D": None,
        "MODEL_ISO.INPUT_SHAPE_2D": (36, 36),
        "MODEL_ISO.LSD_SIGMA": 16,
    }
    cfg = load_config(overrides=[str(part) for pair in settings.items() for part in pair])
    path = data_folder(cfg, "train") / "a.zarr"
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(1, 9, (4, 8, 8)), np.ones((1, 10, 10))).astype(np.uint64)
    mask = np.ones(labels.shape, np.uint8)
    mask[:, :20], labels[:, :20] = 0, 0
    container = zarr.open(str(path), mode="a", **({"zarr_format": 2} if zarr.__version__ >= "3" else {}))
    raw = rng.integers(0, 255, labels.shape, dtype=np.uint8)
    for name, data in [("volumes/raw", raw), ("volumes/labels", labels), ("volumes/labels_mask", mask)]:
        for z, section in enumerate(data):
            container[f"{name}/{z}"] = section
            container[f"{name}/{z}"].attrs.update(offset=[0, 0], resolution=[8, 8])
    check_training_volumes([path], cfg)
    with training_batches(cfg, [path], tuple(task_channels(cfg)), 0, 1) as batches:
        assert next(batches).targets["affs"].any()
    np.testing.assert_array_equal(read(open_array(path, cfg.DATA.NEURON_LABELS)), labels)
    np.testing.assert_array_equal(read(open_array(path, cfg.DATA.NEURON_LABELS_MASK)), mask)
