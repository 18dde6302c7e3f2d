import itertools

import numpy as np
import pytest
import torch
from test_records import Watched

from lsdseg.config.loader import load_config
from lsdseg.config.rules import NETWORK, PREDICTION, RULES
from lsdseg.data_utils.volumes import chunk_shape, list_arrays, open_array, read, write_array
from lsdseg.engine.predict import blockwise
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict, to_stored
from lsdseg.engine.predict.tiles import TilePredictor, read_mirrored
from lsdseg.errors import UserError
from lsdseg.models import build_model

VOLUME = (26, 38, 31)
OFFSET = (80, 0, 160)


ANEW = ("DATA.DROP_DS_MONGOTABLE", "True")


@pytest.fixture
def home(tmp_path):
    """A data folder with a test volume, and random weights of a small network."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, VOLUME, dtype=np.uint8)
    folder = tmp_path / "connexion/data/HEMI/data_3d/test"
    write_array(folder / "sample.zarr", "volumes/raw", raw, voxel_size=(8, 8, 8), offset=OFFSET)
    torch.manual_seed(0)
    model = build_model(config(tmp_path))
    checkpoint = tmp_path / "run" / "model_checkpoint_5"
    checkpoint.parent.mkdir()
    torch.save({"model_state_dict": model.state_dict()}, checkpoint)
    return tmp_path


def config(home, *overrides, padding="valid", size=28, grow=8):
    """A network with the down-samplings (2, 2, 2) and (1, 2, 2)."""
    settings = {
        "DATA.HOME": home,
        "TRAIN.CHECKPOINT": home / "run" / "model_checkpoint_5",
        "TRAIN.DEVICE": "cpu",
        "TRAIN.THREADS": 1,
        "MODEL_ISO.NUM_FMAPS": 2,
        "MODEL_ISO.NUM_FMAPS_OUT": 2,
        "MODEL_ISO.FMAP_INC_FACTOR": 2,
        "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2], [1, 2, 2]],
        "MODEL_ISO.KERNEL_SIZE_DOWN": None,
        "MODEL_ISO.KERNEL_SIZE_UP": None,
        "MODEL_ISO.PAD_CONV": padding,
        "MODEL_ISO.INPUT_SHAPE": (36, 44, 44) if padding == "valid" else (size,) * 3,
        "MODEL_ISO.GROW_INPUT": (grow,) * 3,
        "DATA.AFFS_DTYPE": "float32",
    }
    pairs = [str(part) for item in settings.items() for part in item]
    return load_config(overrides=[*pairs, *map(str, overrides)])


# What a prediction reads although its record need not name it.
WHERE = {"DATA.HOME", "DATA.OUTFILE", "DATA.BRAIN_VOL", "DATA.DATA_DIR_PATH", "DATA.DROP_DS_MONGOTABLE"}
INPUTS = {"DATA.RAW", "TRAIN.CHECKPOINT", "PREPROCESS.SOURCE_DATA_RESOLUTION", "PREPROCESS.SOURCE_DATA_OFFSET"}
TILES = {"MODEL.GROW_INPUT", "MODEL.OUTPUT_SHAPE", "MODEL.CONTEXT"}  # the same numbers with any tiles
HOW = {"TRAIN.DEVICE", "TRAIN.THREADS", "TRAIN.MIXED_PRECISION"}  # the same numbers up to rounding
CHECKED = {"DATA.FIB", "MODEL.VOXEL_SIZE"}  # the section of the network, and whether it fits the volume

OTHERS = {"INS_SEGMENT.BLOCK_SIZE", "INS_SEGMENT.EPSILON_AGGLOMERATE"}  # where a sample looks for its fragments
TIMED = {"CLUSTER.TYPE"}  # under which the time that it took is kept


def test_what_a_prediction_reads_is_what_it_depends_on(home):
    cfg = Watched(config(home))
    predict(cfg)
    read_keys = {f"{section}.{key}" for section, node in cfg.items() if isinstance(node, Watched) for key in node.seen}
    compared = {
        key.replace("MODEL_ISO.", "MODEL.") for key, rule in RULES.items() if {NETWORK, PREDICTION} & set(rule.affects)
    }
    assert read_keys >= {"TRAIN.NEIGHBORHOOD", "MODEL.INTENSITYSCALESHIFT_SCALE", "DATA.AFFS_DTYPE"}
    assert read_keys - compared <= WHERE | INPUTS | TILES | HOW | CHECKED | OTHERS | TIMED


def predictions(cfg):
    predict(cfg)
    output = cfg.DATA.OUTFILE + "/MTLSD/3d/run/model_checkpoint_5/sample.zarr"
    return output, read(open_array(output, "volumes/pred_affs")), read(open_array(output, "volumes/pred_lsds"))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_two_tilings_give_the_same_prediction_as_the_whole_volume_at_once(home, padding):
    cfg = config(home, padding=padding)
    _, affs, lsds = predictions(cfg)
    _, affs_other, lsds_other = predictions(config(home, *ANEW, padding=padding, grow=16))
    np.testing.assert_allclose(affs, affs_other, atol=1e-5)
    np.testing.assert_allclose(lsds, lsds_other, atol=1e-5)

    # Predict the whole volume as one tile, with mirrored context, without TilePredictor.
    predictor = TilePredictor(cfg)
    raw = read(open_array(home / "connexion/data/HEMI/data_3d/test/sample.zarr", "volumes/raw"))
    shape = [-(-n // f) * f for n, f in zip(VOLUME, predictor.factor, strict=True)]
    padding_width = [(c, c + s - n) for c, s, n in zip(predictor.context, shape, VOLUME, strict=True)]
    padded = np.pad(raw, padding_width, mode="reflect").astype(np.float32) / 255 * 2 - 1
    with torch.inference_mode():
        whole = predictor.model(torch.from_numpy(padded)[None, None]).affs[0].numpy()
    if padding == "same":
        whole = whole[(slice(None), *(slice(c, c + s) for c, s in zip(predictor.context, shape, strict=True)))]
    whole = whole[(slice(None), *(slice(n) for n in VOLUME))]
    np.testing.assert_allclose(affs, whole, atol=1e-5)
    assert affs.std() > 1e-4


def test_output_covers_raw_and_has_its_offset(home):
    output, affs, lsds = predictions(config(home))
    assert affs.shape == (3, *VOLUME)
    assert lsds.shape == (10, *VOLUME)
    array = open_array(output, "volumes/pred_affs")
    assert (tuple(array.offset), tuple(array.voxel_size)) == (OFFSET, (8, 8, 8))
    assert array.attrs["offsets"] == [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
    assert list_arrays(output) == ["volumes/pred_affs", "volumes/pred_lsds"]


def test_uint8_is_the_rounded_float_prediction_and_the_inverted_map_its_complement(home):
    _, affs, _ = predictions(config(home))
    output, affs_uint8, _ = predictions(
        config(home, *ANEW, "DATA.AFFS_DTYPE", "uint8", "DATA.INVERT_PRED_AFFS", "True")
    )
    assert affs_uint8.dtype == np.uint8
    np.testing.assert_array_equal(affs_uint8, np.rint(affs * 255))
    inverted = read(open_array(output, "volumes/pred_affs_inverted"))
    np.testing.assert_allclose(inverted[0], 255 * (1 - affs.mean(axis=0)), atol=0.51)


@pytest.mark.parametrize("change", ["raw", "scale", "weights"])
def test_a_prediction_is_not_taken_for_that_of_other_raw_settings_or_weights(home, change, capsys):
    predict(config(home))
    predict(config(home))
    assert "is predicted already" in capsys.readouterr().out
    overrides, path = [], home / "connexion/data/HEMI/data_3d/test/sample.zarr"
    if change == "raw":
        raw = read(open_array(path, "volumes/raw"))
        write_array(path, "volumes/raw", 255 - raw, voxel_size=(8, 8, 8), offset=OFFSET)
    elif change == "scale":
        overrides = ["MODEL_ISO.INTENSITYSCALESHIFT_SCALE", "[1.0, 1.0]"]
    else:
        torch.save({"model_state_dict": build_model(config(home)).state_dict()}, home / "run" / "model_checkpoint_5")
    expected = {
        "raw": "raw was replaced",
        "scale": r"INTENSITYSCALESHIFT_SCALE was \[2.0, 0.5\], is \[1.0, 1.0\]",
        "weights": "the file TRAIN.CHECKPOINT was replaced",
    }
    for step in (predict, predict_blockwise):
        with pytest.raises(UserError, match=expected[change]):
            step(config(home, *overrides))
    predict(config(home, *ANEW, *overrides))
    predict(config(home, *overrides))


def test_reading_beyond_the_volume_mirrors_it(tmp_path):
    data = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    array = write_array(tmp_path / "a.zarr", "raw", data, voxel_size=(1, 1, 1), offset=(0, 0, 0))
    padded = np.pad(data, 9, mode="reflect")
    for begin, shape in itertools.product([(-9, -9, -9), (-2, 1, 0), (3, 4, 2), (5, -7, 6)], [(1, 1, 1), (4, 3, 2)]):
        expected = padded[tuple(slice(9 + b, 9 + b + s) for b, s in zip(begin, shape, strict=True))]
        np.testing.assert_array_equal(read_mirrored(array, begin, shape), expected)


def test_tiles_never_share_a_chunk():
    assert chunk_shape((108, 80, 7), (500, 500, 500)) == (54, 80, 7)
    assert chunk_shape((108, 80, 80), (20, 500, 500)) == (20, 80, 80)
    np.testing.assert_array_equal(to_stored(np.array([0, 0.5, 1]), np.dtype("uint8")), [0, 128, 255])


def test_an_interrupted_prediction_leaves_no_dataset(home, monkeypatch):
    cfg = config(home)
    calls = iter([None, None, KeyboardInterrupt])
    forward = TilePredictor.predict_voxels

    def interrupted(self, *args):
        if next(calls) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(TilePredictor, "predict_voxels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(cfg)
    output = cfg.DATA.OUTFILE + "/MTLSD/3d/run/model_checkpoint_5/sample.zarr"
    assert "volumes/pred_affs" not in list_arrays(output)


def test_a_run_does_not_continue_the_output_of_another_kind_of_run(home, monkeypatch):
    """A run on workers was interrupted, then a run in one process. Both leave arrays with the same names."""
    monkeypatch.chdir(home)
    cfg = config(home, "SYSTEM.NUM_WORKERS", 1)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(blockwise, "finalize_predictions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            predict_blockwise(cfg)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(TilePredictor, "predict_voxels", interrupt)
        with pytest.raises(KeyboardInterrupt):
            predict(config(home, "DATA.AFFS_DTYPE", "uint8", grow=16))
    predict_blockwise(cfg)
    output = cfg.DATA.OUTFILE + "/MTLSD/3d/run/model_checkpoint_5/sample.zarr"
    on_workers = read(open_array(output, "volumes/pred_affs"))
    _, affs, _ = predictions(cfg)
    np.testing.assert_allclose(on_workers, affs, atol=1e-5)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kilobytes", "message"),
    [(300, r"no room on disk for .* needed, 30\d\.\d kB free"), (700, "No space left on device")],
)
def test_a_full_disk_ends_prediction_without_a_dataset(home, small_disk, kilobytes, message):
    """Random floats hardly compress. The smaller disk is clearly too small; the larger one fills up."""
    disk = small_disk(kilobytes)
    with pytest.raises(UserError, match=message):
        predict(config(home, "DATA.OUTFILE", disk))
    assert [path for path in disk.rglob("pred_*") if path.suffix != ".partial"] == []


def test_bad_input_is_refused_before_anything_is_written(home):
    sample = home / "connexion/data/HEMI/data_3d/test/sample.zarr"
    for settings, message in [
        (("TRAIN.CHECKPOINT", ""), r"TRAIN.CHECKPOINT is empty"),
        (("TRAIN.CHECKPOINT", home / "none" / "model_checkpoint_1"), r"no checkpoint at .*none/model_checkpoint_1"),
        (("MODEL_ISO.VOXEL_SIZE", "(10, 10, 10)"), r"sample.zarr.*VOXEL_SIZE"),
        (("DATA.RAW", "volumes/em"), r"volumes/em.*sample.zarr"),
        (("TRAIN.DEVICE", "cuda:7"), r"TRAIN.DEVICE is 'cuda:7'"),
        (("MODEL_ISO.NUM_FMAPS", "4"), r"another network: .*NUM_FMAPS"),
        (
            ("TRAIN.MODEL_TYPE", "LSD", "DATA.INVERT_PRED_AFFS", "True"),
            r"INVERT_PRED_AFFS is True, but LSD predicts no",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            predict(config(home, *settings))
    with_nan = np.full(VOLUME, 0.5, np.float32)
    with_nan[3, 4, 5] = np.nan
    write_array(sample, "volumes/raw", with_nan, voxel_size=(8, 8, 8), offset=OFFSET)
    with pytest.raises(UserError, match=r"NaN"):
        predict(config(home))
    assert not (home / "lsd_outputs").exists()
