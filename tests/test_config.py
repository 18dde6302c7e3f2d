"""The config contract: published files load unchanged, mistakes are one line, shapes follow the network."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lsdseg.cli import argument, run_script
from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.config.loader import CHECKOUT, dump_config, load_config
from lsdseg.config.network_shapes import input_shape_for, nearest_input_shapes, output_shape
from lsdseg.config.rules import RULES, canonical, threshold
from lsdseg.errors import UserError

CONFIG_FILES = sorted(p.name for p in (CHECKOUT / "config").glob("config*.py"))

# In the manner of the published scripts' files: a tree from scratch, with the keys that users already have.
PUBLISHED = """
from yacs.config import CfgNode as CN
import itertools
import math
import numpy as np
try:
    import torch
except Exception as e:
    raise ModuleNotFoundError

TREE = CN()

TREE.SYSTEM = CN()
TREE.SYSTEM.NUM_GPUS = 1
TREE.SYSTEM.NUM_WORKERS = 15
TREE.SYSTEM.CACHE_SIZE = 20
TREE.SYSTEM.VERBOSE = True

TREE.DATA = CN()
TREE.DATA.HOME = "/mnt/lab"
TREE.DATA.DATA_DIR_PATH = "connexion/data"
TREE.DATA.BRAIN_VOL = "SNEMI"
TREE.DATA.TRAIN_TEST_SPLIT = 1
TREE.DATA.FIB = 0
TREE.DATA.DIM_2D = False
TREE.DATA.WITH_MITO = 1
TREE.DATA.RAW = "volumes/raw"
TREE.DATA.NEURON_LABELS = "volumes/labels/neuron_ids"
TREE.DATA.MITO_LABELS = "volumes/labels/mito_ids"
TREE.DATA.NEURON_LABELS_MASK = "volumes/labels/labels_mask"
TREE.DATA.MITO_LABELS_MASK = "volumes/labels/labels_mask_mito"
TREE.DATA.OUTFILE = f"{TREE.DATA.HOME}/lsd_outputs/run_snemi"
TREE.DATA.INVERT_PRED_AFFS = False
TREE.DATA.DB_NAME = "lsd_parallel_predictions"
TREE.DATA.DB_HOST = "localhost:27017"
TREE.DATA.DROP_DS_MONGOTABLE = False

TREE.PREPROCESS = CN()
if TREE.DATA.DIM_2D:
    TREE.PREPROCESS.EXPORT_2D_FROM_3D = True
    TREE.PREPROCESS.SOURCE_DATA_OFFSET = (0, 0)
    TREE.PREPROCESS.SOURCE_DATA_RESOLUTION = (8, 8)
else:
    TREE.PREPROCESS.SOURCE_DATA_OFFSET = (0, 0, 0)
    TREE.PREPROCESS.SOURCE_DATA_RESOLUTION = (8, 8, 8)
TREE.PREPROCESS.USE_WANDB = False
TREE.PREPROCESS.HISTOGRAM_MATCH = ["HEMI", "OCTO"]
TREE.PREPROCESS.DATASETS_TO_COPY = None

TREE.TRAIN = CN()
TREE.TRAIN.BATCH_SIZE = 1
TREE.TRAIN.NEIGHBORHOOD = [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
TREE.TRAIN.NEIGHBORHOOD_2D = [[0, -1], [-1, 0]]
TREE.TRAIN.LR_NEIGHBORHOOD = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-3, 0, 0], [0, -3, 0], [0, 0, -3]]
TREE.TRAIN.EPOCHS = 200000
TREE.TRAIN.SAVE_EVERY = 5000
TREE.TRAIN.DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
TREE.TRAIN.INITIAL_LR = 0.5e-4
TREE.TRAIN.LR_BETAS = (0.95, 0.999)
TREE.TRAIN.MODEL_TYPE = "MTLSD"
if TREE.TRAIN.MODEL_TYPE in ["ACLSD", "ACRLSD"]:
    TREE.TRAIN.LSD_EPOCHS = 10
else:
    TREE.TRAIN.LSD_EPOCHS = None
TREE.TRAIN.CHECKPOINT = f"{TREE.DATA.HOME}/lsd_checkpoints/MTLSD_3D/SNEMI//run_1/model_checkpoint_300000"
TREE.TRAIN.CHECKPOINT_AC = "/mnt/lab/model_checkpoint_8000"
TREE.TRAIN.AUGMENT = True

TREE.MODEL_ISO = CN()
TREE.MODEL_ISO.IN_CHANNELS = 1
TREE.MODEL_ISO.LSDS = 6 if TREE.DATA.DIM_2D else 10
TREE.MODEL_ISO.NUM_FMAPS = 12
TREE.MODEL_ISO.NUM_FMAPS_OUT = 12
TREE.MODEL_ISO.FMAP_INC_FACTOR = 5
TREE.MODEL_ISO.DOWNSAMPLE_FACTORS = [[2, 2, 2], [2, 2, 2], [3, 3, 3]]
TREE.MODEL_ISO.DOWNSAMPLE_FACTORS_2D = [[2, 2], [2, 2], [3, 3]]
TREE.MODEL_ISO.KERNEL_SIZE_DOWN = [[(3,) * 3, (3,) * 3], [(3,) * 3, (3,) * 3], [(3,) * 3, (3,) * 3],
                                   [(3,) * 3, (3,) * 3]]
TREE.MODEL_ISO.KERNEL_SIZE_UP = [[(3,) * 3, (3,) * 3], [(3,) * 3, (3,) * 3], [(3,) * 3, (3,) * 3]]
TREE.MODEL_ISO.PAD_CONV = 'valid'
TREE.MODEL_ISO.CONTROL_POINT_SPACING = (40, 40, 40)
TREE.MODEL_ISO.JITTER_SIGMA = [(0, 2, 2), (2, 2, 2)]
TREE.MODEL_ISO.JITTER_SIGMA_2D = [(0, 2), (2, 2)]
TREE.MODEL_ISO.ROTATION_INTERVAL = [0, math.pi / 2.0]
TREE.MODEL_ISO.PROB_SLIP = [0, 0.1]
TREE.MODEL_ISO.PROB_SHIFT = [0, 0.1]
TREE.MODEL_ISO.MAX_MISALIGN = [0, 1]
TREE.MODEL_ISO.TRANSPOSE = [0, 1, 2]
TREE.MODEL_ISO.INPUT_SHAPE = (196, 196, 196)
TREE.MODEL_ISO.OUTPUT_SHAPE = (72, 72, 72)
TREE.MODEL_ISO.GROW_INPUT = (36, 36, 36)

TREE.MODEL_ANISO = CN()
TREE.MODEL_ANISO.LSDS = 6 if TREE.DATA.DIM_2D else 10
TREE.MODEL_ANISO.DOWNSAMPLE_FACTORS = [[1, 2, 2], [2, 2, 2], [2, 2, 2]]
TREE.MODEL_ANISO.DOWNSAMPLE_FACTORS_2D = [[1, 2], [2, 2], [3, 3]]
TREE.MODEL_ANISO.KERNEL_SIZE_DOWN = None
TREE.MODEL_ANISO.KERNEL_SIZE_UP = None
TREE.MODEL_ANISO.KERNEL_SIZE_UP_2D = [[(3,) * 2, (3,) * 2], [(3,) * 2, (3,) * 2], [(3,) * 2, (3,) * 2]]
TREE.MODEL_ANISO.CONTROL_POINT_SPACING = (4, 4, 10)
TREE.MODEL_ANISO.JITTER_SIGMA = (0, 2, 2)
TREE.MODEL_ANISO.PROB_SLIP = 0.5
TREE.MODEL_ANISO.MAX_MISALIGN = 10
TREE.MODEL_ANISO.TRANSPOSE = [1, 2]
TREE.MODEL_ANISO.LSD_SIGMA = 80
TREE.MODEL_ANISO.INTENSITYSCALESHIFT_SCALE = [2, 0.5]
TREE.MODEL_ANISO.INPUT_SHAPE = (96, 212, 212)
TREE.MODEL_ANISO.INPUT_SHAPE_2D = (268, 268)
TREE.MODEL_ANISO.OUTPUT_SHAPE = (48, 120, 120)
TREE.MODEL_ANISO.OUTPUT_SHAPE_2D = (144, 144)
TREE.MODEL_ANISO.VOXEL_SIZE = (29, 6, 6)
TREE.MODEL_ANISO.GROW_INPUT = (0, 0, 0)
TREE.MODEL_ANISO.NUM_FMAPS_2D = 24
TREE.MODEL_ANISO.DEFECT_AUGMENT = ""
TREE.MODEL_ANISO.LOG_DIR = f"{TREE.DATA.HOME}/lsd_logs/{TREE.TRAIN.MODEL_TYPE}_3D//run_1"
TREE.MODEL_ANISO.CKPT_FOLDER = f"{TREE.DATA.HOME}/lsd_checkpoints/{TREE.TRAIN.MODEL_TYPE}_3D//run_1"
TREE.MODEL_ANISO.OUTPUT_DIR = f"{TREE.DATA.HOME}/lsd_snapshots/{TREE.TRAIN.MODEL_TYPE}_3D//run_1"

TREE.INS_SEGMENT = CN()
TREE.INS_SEGMENT.THRESHOLDS = list(np.arange(0.35, 0.80, 0.05))
TREE.INS_SEGMENT.FRAGMENTS_IN_XY = False
TREE.INS_SEGMENT.EPSILON_AGGLOMERATE = 0.25
TREE.INS_SEGMENT.MASK_FILE = None
TREE.INS_SEGMENT.MASK_DATASET = None
TREE.INS_SEGMENT.FILTER_FRAGMENTS = 0.0
TREE.INS_SEGMENT.BLOCK_SIZE = (256, 256, 256)
TREE.INS_SEGMENT.CONTEXT = (24, 24, 24)
"""
WAYS_TO_GIVE_IT = {
    "_C": "_C = TREE",
    "cfg": "cfg = TREE",
    "get_cfg_defaults": "def get_cfg_defaults():\n    return TREE.clone()",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder: nothing may depend on the current directory."""
    monkeypatch.chdir(tmp_path)


def write(name, text):
    Path(name).write_text(text)
    return name


# Loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS_TO_GIVE_IT)
def test_published_file_loads_unchanged(way):
    file = write("theirs.py", PUBLISHED + WAYS_TO_GIVE_IT[way])
    namespace = {}
    exec(PUBLISHED, namespace)

    cfg = load_config(file)

    for section, keys in namespace["TREE"].items():
        for name, value in keys.items():
            assert cfg[section][name] == value, f"{section}.{name}"
    assert cfg.MODEL.INPUT_SHAPE == (96, 212, 212)
    assert cfg.MODEL.KERNEL_SIZE_UP == [[(3, 3, 3), (3, 3, 3)]] * 3
    assert all(type(t) is float for t in cfg.INS_SEGMENT.THRESHOLDS)


def test_defaults_are_the_published_ones():
    cfg = load_config()
    assert (cfg.SYSTEM.NUM_GPUS, cfg.SYSTEM.NUM_WORKERS, cfg.SYSTEM.CACHE_SIZE) == (1, 10, 40)
    assert (cfg.DATA.BRAIN_VOL, cfg.DATA.DATA_DIR_PATH, cfg.DATA.WITH_MITO) == ("HEMI", "connexion/data", 1)
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.SAVE_EVERY, cfg.TRAIN.INITIAL_LR) == (20, 5, 0.5e-4)
    assert len(cfg.TRAIN.LR_NEIGHBORHOOD) == 9
    iso, aniso = cfg.MODEL_ISO, cfg.MODEL_ANISO
    assert (iso.INPUT_SHAPE, iso.OUTPUT_SHAPE, iso.GROW_INPUT) == ((196,) * 3, (72,) * 3, None)
    assert (aniso.INPUT_SHAPE, aniso.OUTPUT_SHAPE, aniso.GROW_INPUT) == ((132, 268, 268), (72, 144, 144), None)
    assert (iso.OUTPUT_SHAPE_2D, iso.VOXEL_SIZE, aniso.VOXEL_SIZE) == ((72, 72), (8, 8, 8), (40, 4, 4))
    assert iso.KERNEL_SIZE_DOWN == [[(3, 3, 3)] * 2] * 4
    assert aniso.KERNEL_SIZE_DOWN == [[(1, 3, 3)] * 2] + [[(3, 3, 3)] * 2] * 3
    assert (iso.PROB_SLIP, aniso.PROB_SLIP) == ([0, 0.1], 0.5)
    assert list(iso.ROTATION_INTERVAL) == [0, math.pi / 2]
    assert iso.JITTER_SIGMA == [(0, 2, 2), (2, 2, 2)]
    assert list(cfg.INS_SEGMENT.THRESHOLDS) == pytest.approx(np.arange(0.35, 0.8, 0.05))
    assert cfg.INS_SEGMENT.MERGE_FUNCTION is None


def test_defaults_and_rules_name_the_same_keys():
    defaults = {f"{section}.{name}" for section, keys in get_cfg_defaults().items() for name in keys}
    rules = {key for key in RULES if not key.endswith("_2D") or key in defaults}
    assert not defaults - rules, f"add a rule to RULES in lsdseg/config/rules.py for {sorted(defaults - rules)}"
    assert not rules - defaults, f"add a default to lsdseg/config/defaults.py for {sorted(rules - defaults)}"


def test_every_default_is_allowed_by_its_rule():
    for section, keys in get_cfg_defaults().items():
        for name, value in keys.items():
            canonical(f"{section}.{name}", value)


def test_later_sources_win():
    write("a.yaml", "TRAIN: {EPOCHS: 1, SAVE_EVERY: 1, WARMUP: 1}")
    write("experiment.yaml", "TRAIN: {SAVE_EVERY: 2, WARMUP: 2}")
    train = load_config("a.yaml", ["TRAIN.WARMUP", "3"]).TRAIN
    assert (train.BATCH_SIZE, train.EPOCHS, train.SAVE_EVERY, train.WARMUP) == (1, 1, 2, 3)


def test_dumped_model_section_is_left_to_the_loader():
    write("a.yaml", "MODEL: {INPUT_SHAPE: [1, 1, 1]}\nDATA: {FIB: 0}")
    assert load_config("a.yaml").MODEL.INPUT_SHAPE == (132, 268, 268)


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("TRAIN.EPOCHS", "1e5", 100_000),
        ("TRAIN.EPOCHS", np.int64(7), 7),
        ("TRAIN.INITIAL_LR", 1, 1.0),
        ("TRAIN.COMPILE", "true", True),
        ("TRAIN.COMPILE", 1, True),
        ("TRAIN.MIXED_PRECISION", False, "no"),
        ("DATA.FIB", True, 1),
        ("DATA.BRAIN_VOL", "2024", "2024"),
        ("TRAIN.CHECKPOINT", "None", None),
        ("MODEL_ISO.VOXEL_SIZE", [8.0, 8, np.int32(8)], (8, 8, 8)),
        ("MODEL_ISO.PROB_SLIP", 0.5, 0.5),
        ("MODEL_ANISO.PROB_SLIP", "[0, 0.1]", [0, 0.1]),
        ("MODEL_ISO.GROW_INPUT", np.array([12, 24, 0]), (12, 24, 0)),
        ("MODEL_ANISO.LSD_SIGMA_2D", 40, 40.0),
        ("INS_SEGMENT.THRESHOLDS", "0.5", [0.5]),
        ("INS_SEGMENT.THRESHOLDS", np.array([0.25, 0.5]), [0.25, 0.5]),
    ],
)
def test_types_are_lenient_where_the_meaning_is_clear(key, given, value):
    section, name = key.split(".")
    loaded = load_config(None, [key, given])[section][name]
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize("file", CONFIG_FILES)
def test_shipped_files_load_and_survive_dumping(file, tmp_path):
    cfg = load_config(file)
    dump_config(cfg, tmp_path / "run" / "config_0.yaml")
    assert load_config("run/config_0.yaml") == cfg
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config_0.yaml"]


@pytest.mark.parametrize("scheme", ["mongodb", "mongodb+srv"])
def test_dump_holds_no_password(scheme):
    cfg = load_config(None, ["DATA.DB_HOST", f"{scheme}://anna:s3cr@t/pw@db.lab:27017/?authSource=admin"])
    dump_config(cfg, "out.yaml")
    text = Path("out.yaml").read_text()
    assert "anna" not in text
    assert "pw" not in text
    assert load_config("out.yaml").DATA.DB_HOST == f"{scheme}://db.lab:27017/?authSource=admin"


def test_dump_holds_no_session_token():
    options = "tls=true&authMechanismProperties=AWS_SESSION_TOKEN:s3cr/t==&tlsCertificateKeyFilePassword=s3cr"
    for query in (options, "&".join(reversed(options.split("&")))):
        cfg = load_config(None, ["DATA.DB_HOST", f"mongodb://db.lab/?{query}"])
        dump_config(cfg, "out.yaml")
        assert "s3cr" not in Path("out.yaml").read_text()
        assert load_config("out.yaml").DATA.DB_HOST.rstrip("&") == "mongodb://db.lab/?tls=true"


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        load_config().TRAIN.EPOCHS = 3


def test_loading_needs_neither_torch_nor_numpy():
    code = "import sys, lsdseg.config.loader as l; l.load_config(); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Derived values ---------------------------------------------------------------------------------------------


def test_home_moves_every_folder():
    cfg = load_config("config_cremi.py", ["DATA.HOME", "/data"])
    assert cfg.DATA.OUTFILE == "/data/lsd_outputs"
    assert cfg.MODEL.LOG_DIR == "/data/lsd_logs/MTLSD_3D/CREMI/run"
    assert cfg.MODEL.CKPT_FOLDER == "/data/lsd_checkpoints/MTLSD_3D/CREMI/run"
    assert cfg.MODEL.OUTPUT_DIR == "/data/lsd_snapshots/MTLSD_3D/CREMI/run"


def test_relative_paths_become_absolute(tmp_path):
    cfg = load_config(None, ["DATA.HOME", "here", "TRAIN.CHECKPOINT", "~/model"])
    assert Path(cfg.DATA.HOME) == tmp_path / "here"
    assert Path(cfg.TRAIN.CHECKPOINT) == Path.home() / "model"
    flat = load_config(None, ["DATA.DIM_2D", True, "MODEL_ISO.CKPT_FOLDER_2D", "runs/wide"])
    assert Path(flat.MODEL.CKPT_FOLDER) == tmp_path / "runs/wide"
    assert flat.MODEL.LOG_DIR.endswith("lsd_logs/MTLSD_2D/HEMI/wide")


@pytest.mark.parametrize(
    "key",
    ["DATA.OUTFILE", "TRAIN.CHECKPOINT_AC", "TRAIN.VALIDATION_VOLUME", "INS_SEGMENT.MASK_FILE"]
    + [f"MODEL_ANISO.{name}" for name in ("LOG_DIR", "CKPT_FOLDER", "OUTPUT_DIR", "DEFECT_AUGMENT")],
)
def test_every_path_is_made_absolute(tmp_path, key):
    section, name = key.split(".")
    assert load_config(None, [key, "some/where"])[section][name] == str(tmp_path / "some/where")


def test_logs_and_snapshots_go_by_the_name_of_the_checkpoints_folder():
    model = load_config(None, ["MODEL_ISO.CKPT_FOLDER", "/runs/wide", "DATA.HOME", "/data"]).MODEL
    assert (model.CKPT_FOLDER, model.LOG_DIR) == ("/runs/wide", "/data/lsd_logs/MTLSD_3D/HEMI/wide")
    assert model.OUTPUT_DIR == "/data/lsd_snapshots/MTLSD_3D/HEMI/wide"


def test_the_long_range_neighborhood_can_be_learned_in_3d_and_in_2d():
    wide = load_config(None, ["TRAIN.NEIGHBORHOOD", "LR_NEIGHBORHOOD"])
    assert wide.TRAIN.NEIGHBORHOOD == wide.TRAIN.LR_NEIGHBORHOOD
    assert len(wide.TRAIN.NEIGHBORHOOD) == 9
    flat = load_config(None, ["DATA.DIM_2D", True, "TRAIN.NEIGHBORHOOD_2D", "LR_NEIGHBORHOOD"])
    assert flat.TRAIN.NEIGHBORHOOD == [[-1, 0], [0, -1], [-3, 0], [0, -3], [-9, 0], [0, -9]]


def test_fib_and_dim_2d_pick_the_network():
    assert load_config().MODEL.VOXEL_SIZE == (8, 8, 8)
    assert load_config(None, ["DATA.FIB", 0]).MODEL.VOXEL_SIZE == (40, 4, 4)
    flat = load_config("config_snemi.py", ["DATA.DIM_2D", True])
    assert (flat.MODEL.INPUT_SHAPE, flat.MODEL.OUTPUT_SHAPE, flat.MODEL.LSDS) == ((148, 148), (24, 24), 6)
    assert flat.TRAIN.NEIGHBORHOOD == [[0, -1], [-1, 0]]
    assert (flat.PREPROCESS.EXPORT_2D_FROM_3D, flat.PREPROCESS.SOURCE_DATA_RESOLUTION) == (True, (8, 8, 8))
    assert flat.MODEL.CKPT_FOLDER.endswith("lsd_checkpoints/MTLSD_2D/SNEMI/run")


def test_network_that_is_not_in_use_is_not_checked():
    cfg = load_config(None, ["MODEL_ANISO.INPUT_SHAPE", (1, 1, 1), "MODEL_ISO.INPUT_SHAPE_2D", (1, 1)])
    assert cfg.MODEL.OUTPUT_SHAPE == (72, 72, 72)


def test_first_network_of_an_auto_context_model_is_trained_unless_given():
    assert load_config(None, ["TRAIN.MODEL_TYPE", "ACLSD", "TRAIN.EPOCHS", 50]).TRAIN.LSD_EPOCHS == 50
    assert load_config(None, ["TRAIN.MODEL_TYPE", "ACLSD", "TRAIN.CHECKPOINT_AC", "/m"]).TRAIN.LSD_EPOCHS is None


def test_all_shapes_of_an_auto_context_model_have_one_middle():
    """Down-sampled by 3, two networks in a row would leave 119 - 6 voxels, with the least of raw that they can take."""
    factors = ["MODEL_ISO.DOWNSAMPLE_FACTORS", [[1] * 3, [3] * 3, [1] * 3], "MODEL_ISO.INPUT_SHAPE", (62,) * 3]
    model = load_config(None, ["TRAIN.MODEL_TYPE", "ACLSD", *factors]).MODEL
    assert (model.RAW_SHAPE, model.OUTPUT_SHAPE, model.CONTEXT) == ((122,) * 3, (6,) * 3, (58,) * 3)


RECURSIVE = []
RECURSIVE.append(RECURSIVE)

# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["MODEL_ISO.DOWNSAMPLE_FACTORS", [[5] * 3], "MODEL_ISO.INPUT_SHAPE", (49,) * 3]
            + ["MODEL_ISO.KERNEL_SIZE_DOWN", None, "MODEL_ISO.KERNEL_SIZE_UP", None],
            ["MODEL_ISO.DOWNSAMPLE_FACTORS", "(49, 49, 49)", "(20, 20, 20)", "odd"],
        ),
        (["TRAIN.EPOCH", 5], ["TRAIN.EPOCH ", "command line", "TRAIN.EPOCHS"]),
        (["EPOCHS", 5], ["EPOCHS", "TRAIN.EPOCHS"]),
        (["TRAIN.HOME", "/x"], ["TRAIN.HOME", "DATA.HOME"]),
        (["train.epochs", 5], ["TRAIN.EPOCHS"]),
        (["TRAIN.EPOCHS"], ["TRAIN.EPOCHS has no value"]),
        (["TRAIN.EPOCHS", "DATA.HOME", "/x"], ["TRAIN.EPOCHS has no value"]),
        (["TRAIN.BATCH_SIZE", 0], ["TRAIN.BATCH_SIZE is 0", "from 1"]),
        (["TRAIN.BATCH_SIZE", "two"], ["TRAIN.BATCH_SIZE is 'two'", "whole number"]),
        (["TRAIN.BATCH_SIZE", 1.5], ["TRAIN.BATCH_SIZE is 1.5", "whole number"]),
        (["TRAIN.INITIAL_LR", "nan"], ["TRAIN.INITIAL_LR", "above 0"]),
        (["TRAIN.LR_BETAS", (0.95, 1.0)], ["TRAIN.LR_BETAS is (0.95, 1.0)", "from 0 to below 1"]),
        (["TRAIN.EMA", 1], ["TRAIN.EMA is 1", "from 0 to below 1"]),
        (["MODEL_ANISO.IN_CHANNELS", 3], ["MODEL_ANISO.IN_CHANNELS is 3", "1, because raw has one channel"]),
        (["TRAIN.EPOCHS", float("inf")], ["TRAIN.EPOCHS", "whole number"]),
        (["TRAIN.EPOCHS", None], ["TRAIN.EPOCHS is None", "whole number"]),
        (["TRAIN.MODEL_TYPE", "MTLDS"], ["TRAIN.MODEL_TYPE is 'MTLDS'", "MTLSD, LSD, AFF"]),
        (["TRAIN.DEVICE", "gpu"], ["TRAIN.DEVICE is 'gpu'", "cuda:0"]),
        (["TRAIN.NEIGHBORHOOD", [[-1, 0]]], ["TRAIN.NEIGHBORHOOD", "3 numbers"]),
        (["DATA.FIB", 2], ["DATA.FIB is 2", "0, 1"]),
        (["DATA.HOME", 3], ["DATA.HOME is 3", "string"]),
        (["MODEL_ISO.PAD_CONV", "full"], ["MODEL_ISO.PAD_CONV is 'full'", "valid, same"]),
        (["MODEL_ISO.VOXEL_SIZE", (8, 8)], ["MODEL_ISO.VOXEL_SIZE", "3 values"]),
        (["MODEL_ISO.VOXEL_SIZE", (8, 8, 0)], ["MODEL_ISO.VOXEL_SIZE", "from 0.001"]),
        (["MODEL_ANISO.LSD_SIGMA", 0], ["MODEL_ANISO.LSD_SIGMA is 0", "above 0"]),
        (["MODEL_ISO.LSDS", 6], ["MODEL_ISO.LSDS is 6", "10"]),
        (["MODEL_ISO.INTENSITYAUG_SCALE_MIN", 2], ["INTENSITYAUG_SCALE_MIN is 2.0", "1.2"]),
        (["INS_SEGMENT.THRESHOLDS", [0.5, 1.5]], ["INS_SEGMENT.THRESHOLDS", "above 0 to 1"]),
        (["INS_SEGMENT.MERGE_FUNCTION", "hist_quant_52"], ["INS_SEGMENT.MERGE_FUNCTION", "hist_quant_10"]),
        (["MODEL.INPUT_SHAPE", (1, 1, 1)], ["MODEL.INPUT_SHAPE", "MODEL_ISO.INPUT_SHAPE"]),
        (
            ["MODEL_ISO.INPUT_SHAPE", (200, 196, 196)],
            [
                "MODEL_ISO.INPUT_SHAPE is (200, 196, 196)",
                "(196, 196, 196) -> (72, 72, 72) or (208, 196, 196) -> (84, 72, 72)",
            ],
        ),
        (
            ["MODEL_ISO.OUTPUT_SHAPE", (70, 72, 72)],
            ["MODEL_ISO.OUTPUT_SHAPE is (70, 72, 72)", "(72, 72, 72)"],
        ),
        (["MODEL_ISO.GROW_INPUT", (30, 36, 36)], ["MODEL_ISO.GROW_INPUT", "multiples of (12, 12, 12)"]),
        (
            ["MODEL_ISO.DOWNSAMPLE_FACTORS", [[2, 2, 2]]],
            ["MODEL_ISO.KERNEL_SIZE_DOWN", "2 levels, got 4", "None"],
        ),
        (["mongodb://anna:s3cr@t@db.lab", "DATA.DB_HOST"], ["unknown key db.lab", "write DATA.DB_HOST before"]),
        (["anna:s3cr@t@db.lab:27017", "DATA.DB_HOST"], ["unknown key db.lab:27017"]),
        (["TRAIN.EPOCHS", 10**5000], ["TRAIN.EPOCHS is something of type int", "whole number"]),
        (["TRAIN.EPOCHS", "9" * 10**6], ["TRAIN.EPOCHS is '999", "whole number"]),
        (["TRAIN.EPOCHS", RECURSIVE], ["TRAIN.EPOCHS is [[", "whole number"]),
        (["MODEL_ISO.VOXEL_SIZE", RECURSIVE], ["MODEL_ISO.VOXEL_SIZE is [[", "3 values"]),
        (["X" * 10**6, 1], ["unknown key XXX", "did you mean"]),
        (["TRAIN.EPOCHS", "2020-99-99"], ["TRAIN.EPOCHS is '2020-99-99'", "whole number"]),
        (["TRAIN.EPOCHS", "[" * 3000], ["TRAIN.EPOCHS is '[[", "whole number"]),
        (["TRAIN.SEED", 2**32], ["TRAIN.SEED is 4294967296", "from 0 to 4294967295"]),
        (["TRAIN.BATCH_SIZE", 10**7], ["TRAIN.BATCH_SIZE is 10000000", "to 10000"]),
        (["MODEL_ISO.NUM_FMAPS", 10**6], ["MODEL_ISO.NUM_FMAPS is 1000000", "5e+17 weights"]),
        (["DATA.DIM_2D", 1, "MODEL_ISO.DOWNSAMPLE_FACTORS_2D", "[[30000000, 3]]"], ["DOWNSAMPLE_FACTORS_2D", "to 100"]),
        (["TRAIN.NEIGHBORHOOD", [[-1, 0, 0], [0, 0, 0]]], ["TRAIN.NEIGHBORHOOD", "no offset may be 0"]),
        (["TRAIN.NEIGHBORHOOD", [[1000, 0, 0]]], ["TRAIN.NEIGHBORHOOD", "out of every patch", "(196, 196, 196)"]),
        (["DATA.HOME", "~nosuchuser/lsd"], ["DATA.HOME is '~nosuchuser/lsd'", "only if there is a user"]),
        (["DATA.BRAIN_VOL", "x" * 256], ["DATA.BRAIN_VOL is 'xxx", "255 between two /"]),
        (["DATA.RAW", "a\0b"], ["DATA.RAW is 'a", "printable"]),
        (["DATA.DB_NAME", "a b"], ["DATA.DB_NAME is 'a b'", "63 characters, without spaces"]),
        (["MODEL_ISO.KERNEL_SIZE_UP", [[(3, 3)]] * 3], ["MODEL_ISO.KERNEL_SIZE_UP", "3 numbers"]),
        (["MODEL_ISO.PAD_CONV", "same"], ["MODEL_ISO.INPUT_SHAPE", "(192, 192, 192) -> (192, 192, 192)"]),
        (
            ["DATA.DIM_2D", 1, "MODEL_ISO.INPUT_SHAPE_2D", (10, 10)],
            ["MODEL_ISO.INPUT_SHAPE_2D", "(136, 136)"],
        ),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(overrides, said):
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    for part in said:
        assert part in str(error.value)
    assert re.fullmatch(r".{20,650}", str(error.value))
    assert "s3cr" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.py",
            "from yacs.config import CfgNode\n_C = CfgNode({'TRIAN': {'EPOCHS': 1}})",
            ["TRIAN.EPOCHS", "a.py", "TRAIN"],
        ),
        ("a.py", "x = 1\ny = 1 / 0\n", ["a.py, line 2", "ZeroDivisionError"]),
        ("a.py", "x = 1\ny = (\n", ["a.py, line 2", "SyntaxError"]),
        ("a.py", "def get_cfg_defaults():\n    raise ValueError('no GPU')\n", ["a.py, line 2", "no GPU"]),
        ("a.py", "x = 1\n", ["a.py", "cfg, _C or get_cfg_defaults()"]),
        ("a.yaml", "TRAIN:\n  EPOCHS: 0\n", ["TRAIN.EPOCHS is 0", "a.yaml"]),
        ("a.py", "import sys\nsys.exit('no GPU')\n", ["a.py, line 2", "SystemExit", "no GPU"]),
        ("a.yaml", "TRAIN: 5\n", ["TRAIN", "a.yaml"]),
        ("a.yaml", "CLUSTER:\n  TIME: 2020-99-99\n", ["a.yaml", "YAML"]),
        ("a.yaml", "[" * 100_000, ["a.yaml", "YAML"]),
        ("a.yaml", "#" * 10**6 + "\n", ["a.yaml", "more than 1000000 bytes"]),
        ("a.yaml", "TRAIN: {NEIGHBORHOOD: &a [*a]}", ["TRAIN.NEIGHBORHOOD", "a.yaml"]),
        ("a.yaml", "TRAIN: [\n", ["a.yaml", "YAML"]),
        ("a.yaml", "just words\n", ["a.yaml", "sections"]),
        ("a.json", "{}", ["a.json", ".yaml"]),
    ],
)
def test_bad_files_are_named(name, text, said):
    with pytest.raises(UserError) as error:
        load_config(write(name, text))
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["~nosuchuser/a.py", "x" * 300 + ".py"])
def test_a_file_whose_name_cannot_be_is_missing(name):
    with pytest.raises(UserError, match="there is no config file"):
        load_config(name)


def test_missing_file_names_where_it_was_looked_for(tmp_path):
    with pytest.raises(UserError) as error:
        load_config("config_nowhere.py")
    for place in (tmp_path, CHECKOUT, CHECKOUT / "config"):
        assert str(place) in str(error.value)


# Shapes -----------------------------------------------------------------------------------------------------

ISO = [[2, 2, 2], [2, 2, 2], [3, 3, 3]]
CREMI = [[1, 2, 2], [2, 2, 2], [3, 3, 3]]
CREMI_DOWN = [[(1, 3, 3)] * 2] + [[(3, 3, 3)] * 2] * 3
SNEMI = [[1, 2, 2], [2, 2, 2], [2, 2, 2]]
FLAT = [[2, 2], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("factors", "kernels_down", "shape", "output"),
    [
        (ISO, None, (196,) * 3, (72,) * 3),
        (ISO, None, (208,) * 3, (84,) * 3),
        (ISO, None, (328,) * 3, (204,) * 3),
        (CREMI, CREMI_DOWN, (132, 268, 268), (72, 144, 144)),
        (SNEMI, None, (96, 212, 212), (48, 120, 120)),
        (FLAT, None, (196, 196), (72, 72)),
        (FLAT, None, (148, 148), (24, 24)),
    ],
)
def test_published_shapes(factors, kernels_down, shape, output):
    assert output_shape(shape, factors, kernels_down) == output
    assert input_shape_for(output, factors, kernels_down) == shape
    assert input_shape_for(np.subtract(output, 1), factors, kernels_down) == shape
    assert nearest_input_shapes(shape, factors, kernels_down) == [(shape, output)]


def test_output_grows_with_the_input():
    for factors, kernels_down, shape in [(ISO, None, (196,) * 3), (CREMI, CREMI_DOWN, (132, 268, 268))]:
        grown = tuple(np.add(shape, 36))
        assert output_shape(grown, factors, kernels_down) == tuple(
            np.add(output_shape(shape, factors, kernels_down), 36)
        )


def test_same_padding_keeps_the_shape_but_needs_divisible_ones():
    assert output_shape((72, 60, 84), ISO, padding="same") == (72, 60, 84)
    with pytest.raises(ValueError, match="axis y"):
        output_shape((72, 62, 84), ISO, padding="same")


def test_nearest_shapes_of_random_networks_are_those_of_a_search_one_by_one():
    random = np.random.default_rng(0)
    for _ in range(100):
        levels, size = int(random.integers(1, 4)), int(random.integers(1, 100))
        factors = [[int(factor)] * 2 for factor in random.integers(1, 4, levels)]
        kernels = [
            [[[int(width)] * 2 for width in random.integers(1, 6, 2)] for _ in range(levels + n)] for n in (1, 0)
        ]

        def output(size, network=(factors, *kernels)):
            try:
                return output_shape((size, size), *network)[0]
            except ValueError:
                return 0

        above = next(larger for larger in itertools.count(size) if output(larger))
        below = next((smaller for smaller in range(size, 0, -1) if output(smaller)), above)
        assert {shape[0] for shape, _ in nearest_input_shapes((size, size), factors, *kernels)} == {below, above}
        large_enough = next(larger for larger in itertools.count(size) if output(larger) >= size)
        if (output(large_enough) - size) % 2 == 0:
            assert input_shape_for((size, size), factors, *kernels)[0] == large_enough


def test_nearest_shapes_below_and_above():
    assert nearest_input_shapes((197, 196, 10), ISO) == [
        ((196, 196, 136), (72, 72, 12)),
        ((208, 196, 136), (84, 72, 12)),
    ]
    with pytest.raises(ValueError, match="downsample_factors"):
        nearest_input_shapes((196, 196), ISO)


# Command line -----------------------------------------------------------------------------------------------


def call(monkeypatch, main, *argv, **kwargs):
    monkeypatch.setattr(sys, "argv", ["tool.py", *argv])
    run_script(
        main,
        description="A tool.",
        example="python tool.py -c config_cremi.py",
        default_config="config/config.py",
        **kwargs,
    )


def test_script_gets_config_and_own_arguments(monkeypatch):
    seen = []

    def add_arguments(parser):
        parser.add_argument("-th", "--threshold", type=float)

    call(
        monkeypatch,
        lambda cfg, args: seen.append((cfg, args)),
        *[
            "TRAIN.EPOCHS",
            "7",
            "-c",
            "config_cremi.py",
            "-th",
            "0.7",
            "MODEL_ANISO.INTENSITYAUG_SHIFT_MIN",
            "-0.1",
        ],
        add_arguments=add_arguments,
    )
    ((cfg, args),) = seen
    assert (cfg.TRAIN.EPOCHS, cfg.DATA.BRAIN_VOL, cfg.MODEL.INTENSITYAUG_SHIFT_MIN) == (7, "CREMI", -0.1)
    assert args.threshold == 0.7


@pytest.mark.parametrize("argv", [["TRAIN.EPOCHS", "0"], ["-c", "nowhere.py"], ["--nonsense"], ["TRAIN.EPOCHS"]])
def test_mistakes_are_one_line_and_exit_status_2(monkeypatch, capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, lambda cfg: pytest.fail("must not be called"), *argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)


@pytest.mark.parametrize("given", ["nan", "inf", "0", "1.5", "[0.5, 0.6]", "x" * 10**5])
def test_what_is_no_threshold_is_refused(monkeypatch, capsys, given):
    def add_arguments(parser):
        parser.add_argument("-th", type=argument(threshold))

    with pytest.raises(SystemExit) as exit_:
        call(
            monkeypatch, lambda cfg, args: pytest.fail("must not be called"), "-th", given, add_arguments=add_arguments
        )
    assert exit_.value.code == 2
    assert re.fullmatch(r"error: argument -th: .{1,250} must be a number above 0 to 1 .*\n", capsys.readouterr().err)


def test_an_error_of_the_file_system_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, lambda cfg: Path("x" * 300).read_text())
    assert (exit_.value.code, capsys.readouterr().err) == (2, f"error: {'x' * 300}: File name too long\n")


def test_user_error_of_the_script_itself_is_one_line_too(monkeypatch, capsys):
    def main(cfg):
        raise UserError("no room\non disk")

    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, main)
    assert (exit_.value.code, capsys.readouterr().err) == (2, "error: no room on disk\n")


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def main(cfg):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, main)
    assert (exit_.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_help_shows_the_example(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, lambda cfg: None, "--help")
    assert exit_.value.code == 0
    assert "python tool.py -c config_cremi.py" in capsys.readouterr().out
