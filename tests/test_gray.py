"""Raw of any type: which gray values become 0 and 1."""

import h5py
import numpy as np
import pytest
from funlib.persistence import Array
from test_blockwise_numerics import voi
from test_predict import ANEW, config, home  # noqa: F401
from test_training import config as training_config

from lsdseg import agglomerate, extract_fragments
from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.data_utils.gray import gray_percentiles, to_unit
from lsdseg.data_utils.layout import data_folder
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.rescale import rescale
from lsdseg.data_utils.volumes import open_array, read, write_array
from lsdseg.engine.predict import arrays
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.errors import UserError

SCALED = {"factor": 120, "shift": 3000}  # from uint8 to a part of the range of uint16


def as_uint16(raw):
    return raw.astype(np.uint16) * SCALED["factor"] + SCALED["shift"]


def test_a_window_becomes_0_and_1_and_clips():
    values = np.array([0, 100, 300, 500, 65535], np.uint16)
    np.testing.assert_allclose(to_unit(values, (100, 500)), [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_array_equal(to_unit(np.uint8([0, 255]), (0, 255)), np.float32([0, 1]))
    assert to_unit(np.array([-7], np.int16), (-10, -5)) == pytest.approx([0.6])


def test_the_sample_ignores_what_was_not_imaged_and_few_bright_voxels():
    rng = np.random.default_rng(0)
    raw = rng.integers(1000, 2000, (40, 300, 300)).astype(np.uint16)
    raw[:, :, 200:] = 0
    raw[::10, ::100, ::100] = 65535
    low, high = gray_percentiles(Array(raw, (0, 0, 0), (8, 8, 8)))
    assert 0 <= low < 1010
    assert 1990 < high < 2000


def test_uint16_is_segmented_as_uint8(data_dir):
    """A network that has seen uint8 gets the darkest and brightest values that it knows."""
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        raw = file["volumes/raw"][130:170, 20:170, 20:170]
    checkpoint = CHECKOUT / "pretrained" / "fib25_mtlsd" / "model_checkpoint_8000"
    cfg = load_config("pretrained/config_fib25.py", ["TRAIN.THREADS", "1"])
    segmentations = []
    for volume in (raw, as_uint16(raw)):
        affinities = arrays.predict(volume, checkpoint, cfg)["affs"][:3]
        (_, segmentation), *_ = agglomerate(affinities, extract_fragments(affinities), [0.5], "hist_quant_75")
        segmentations.append(segmentation.copy())
    assert len(np.unique(segmentations[0])) > 10
    assert voi(*segmentations) < 0.05


def test_the_window_is_recorded_and_another_one_needs_another_prediction(home, capsys):  # noqa: F811
    path = data_folder(config(home), "test") / "sample.zarr"
    raw = read(open_array(path, "volumes/raw"))
    output = home / "lsd_outputs/MTLSD/3d/run/model_checkpoint_5/sample.zarr"
    predict(config(home))
    expected = read(open_array(output, "volumes/pred_affs"))
    assert "raw_window" not in open_array(output, "volumes/pred_affs").attrs

    write_array(path, "volumes/raw", as_uint16(raw), voxel_size=(8, 8, 8), offset=(80, 0, 160))
    window = [SCALED["shift"], 255 * SCALED["factor"] + SCALED["shift"]]
    for prediction in (predict, predict_blockwise):
        prediction(config(home, *ANEW, "DATA.RAW_WINDOW", window))
        array = open_array(output, "volumes/pred_affs")
        np.testing.assert_allclose(read(array), expected, atol=1e-5)
        assert list(array.attrs["raw_window"]) == window
    capsys.readouterr()
    with pytest.raises(UserError, match=r"DATA\.RAW_WINDOW"):
        predict(config(home))
    predict(config(home, *ANEW))
    assert "volumes/raw is uint16: 3" in capsys.readouterr().out


def test_training_sees_the_window(tmp_path):
    cfg = training_config(tmp_path, TRAIN__AUGMENT=False)
    raw, labels, _ = make_phantom((64, 64, 64), seed=0, voxel_size=cfg.MODEL.VOXEL_SIZE)
    place = {"voxel_size": cfg.MODEL.VOXEL_SIZE, "offset": (0, 0, 0)}
    path = tmp_path / "phantom.zarr"
    write_array(path, "volumes/raw", as_uint16(raw), **place)
    write_array(path, "volumes/labels/neuron_ids", labels, **place)
    write_array(path, "volumes/labels/labels_mask", np.ones(labels.shape, np.uint8), **place)
    with training_batches(cfg, [path], ("affs", "lsds")) as batches:
        seen = next(batches).raw
    assert -1 <= seen.min() < -0.6
    assert 0.6 < seen.max() <= 1


def test_rescaling_keeps_uint16(tmp_path):
    raw = as_uint16(np.random.default_rng(0).integers(0, 256, (12, 12, 12), dtype=np.uint8))
    write_array(tmp_path / "a.zarr", "volumes/raw", raw, voxel_size=(8, 8, 8), offset=(0, 0, 0))
    rescale(open_array(tmp_path / "a.zarr", "volumes/raw"), tmp_path / "b.zarr", "volumes/raw", (16, 16, 16))
    halved = read(open_array(tmp_path / "b.zarr", "volumes/raw"))
    assert halved.dtype == np.uint16
    assert halved.mean() == pytest.approx(raw.mean(), rel=0.05)
    assert halved.std() < raw.std()


@pytest.mark.parametrize("window", ["(5, 5)", "(7, 3)", "5", "(1, 2, 3)"])
def test_a_window_is_two_numbers(window):
    with pytest.raises(UserError, match=r"DATA\.RAW_WINDOW .*two numbers, the second larger than the first"):
        load_config(overrides=["DATA.RAW_WINDOW", window])
