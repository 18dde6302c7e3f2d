import h5py
import numpy as np
import pytest
import torch
from test_training import config

from lsdseg.data_utils.gray import BOX, place_box
from lsdseg.data_utils.layout import data_folder
from lsdseg.data_utils.phantom import make_phantom, write_phantom
from lsdseg.data_utils.volumes import open_array, write_array
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.statistics import (
    BOXES,
    Statistics,
    differences,
    sample_statistics,
    statistics_of,
    training_statistics,
)
from lsdseg.engine.training.train import train
from lsdseg.models.checkpoint import TRAINING_DATA, read_checkpoint
from pretrained.export import export

PLACE = {"voxel_size": (8, 8, 8), "offset": (80, 160, 0)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A home with a network that was trained for an iteration, and another phantom to predict."""
    home = tmp_path_factory.mktemp("home")
    cfg = config(home)
    for split, seed in (("train", 0), ("test", 1)):
        folder = data_folder(cfg, split)
        folder.mkdir(parents=True)
        write_phantom(folder / "phantom.zarr", (48, 52, 56), seed=seed, **PLACE)
    train(config(home, TRAIN__EPOCHS=1))
    return home


def predict_config(home, **overrides):
    checkpoint = config(home).MODEL.CKPT_FOLDER + "/model_checkpoint_1"
    return config(home, TRAIN__CHECKPOINT=checkpoint, DATA__DROP_DS_MONGOTABLE=True, **overrides)


def changed(value):
    return np.rint(255 * value).astype(np.uint8)


def of_array(raw, voxel_size=(10, 10, 10)):
    return statistics_of([(raw.astype(np.float32) / 255, None)], voxel_size)


def test_statistics_say_how_gray_values_and_boundaries_are():
    raw, labels, _ = make_phantom((24, 64, 64), seed=3)
    found = statistics_of([(raw.astype(np.float32) / 255, labels)], (10, 10, 10))
    assert found.median == pytest.approx(np.median(raw) / 255)
    assert found.spread == pytest.approx(raw.std() / 255)
    np.testing.assert_allclose(found.histogram, np.bincount(raw.ravel(), minlength=256) / raw.size)
    assert found.contrast > 0.1
    assert found.lines < -0.1

    negative = statistics_of([(1 - raw.astype(np.float32) / 255, labels)], (10, 10, 10))
    assert negative.contrast == pytest.approx(-found.contrast, abs=1e-5)
    assert negative.lines == pytest.approx(-found.lines, abs=1e-3)
    assert found.inverted().distance(negative) < 1e-6
    assert statistics_of([], (10, 10, 10)) is None


def test_contrast_is_that_of_the_voxels_at_boundaries():
    labels = np.zeros((1, 2, 10), np.uint64)
    labels[..., :5], labels[..., 5:9] = 1, 2
    raw = np.full(labels.shape, 0.75, np.float32)
    raw[..., [4, 5, 8]] = 0.25  # at the boundaries of the labels
    raw[..., 9] = 0  # no neuron
    assert statistics_of([(raw, labels)], (8, 8)).contrast == pytest.approx(0.5)


def test_noise_has_no_lines():
    noise = np.random.default_rng(0).integers(0, 256, (26, 38, 31), np.uint8)
    assert abs(of_array(noise).lines) < 0.05
    assert of_array(np.full((4, 40, 40), 7, np.uint8)).lines == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v, None),
        (lambda v: 1 - v, "contrast is inverted"),
        (lambda v: v**2.5, "gray values have median"),
        (lambda v: v**0.7, "gray values have median"),
        (lambda v: 0.5 + 0.5 * (v - 0.5), "standard deviation"),
        (lambda v: (1 - v) ** 2.5, "gray values once inverted"),
    ],
)
def test_fib25_is_like_its_other_region_and_unlike_a_changed_one(data_dir, tmp_path, change, said):
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        raw, labels = file["volumes/raw"][:130], file["volumes/labels/neuron_ids"][:130]
    with h5py.File(data_dir / "fib25_unlabeled.hdf") as file:
        other = file["volumes/raw"][:100, :300, :300]
    own = write_array(tmp_path / "a.zarr", "volumes/raw", changed(change(other / 255)), **PLACE)
    write_array(tmp_path / "b.zarr", "volumes/raw", raw, **PLACE)
    write_array(tmp_path / "b.zarr", "volumes/labels/neuron_ids", labels.astype(np.uint64), **PLACE)
    cfg = config(tmp_path)
    (entry,) = training_statistics([tmp_path / "b.zarr"], cfg)
    assert entry["contrast"] > 0.1
    found = "; ".join(differences(sample_statistics(own, cfg), [Statistics(**entry)]))
    assert said in found if said else not found


def test_a_volume_may_be_like_any_of_the_training_volumes():
    raw = make_phantom((16, 64, 64), seed=1)[0] / 255
    dark, light = (of_array(changed(values)) for values in (raw**2.5, raw))
    assert differences(light, [dark]) != []
    assert differences(light, [dark, light]) == []


@pytest.mark.parametrize(("size", "warned"), [((11, 10, 10), False), ((13, 10, 10), True), ((10, 10, 8), True)])
def test_voxel_sizes_may_differ_by_a_fifth(size, warned):
    raw = make_phantom((16, 64, 64), seed=1)[0]
    found = differences(of_array(raw, size), [of_array(raw)])
    assert len(found) == warned
    assert all("rescale.py --voxel-size 10 10 10" in reason for reason in found)


def test_boxes_of_a_large_volume_are_few_and_inside_chunks():
    shape, chunks = (10**6, 10**6, 10**6), (64, 128, 128)
    boxes = [place_box(number, shape, chunks) for number in range(4 * BOXES)]
    assert len(set(boxes)) == 4 * BOXES
    for begin, size in boxes:
        assert size == BOX
        assert all(b // c == (b + s - 1) // c for b, s, c in zip(begin, size, chunks, strict=True))
    assert place_box(5, (3, 50, 200), (1, 50, 200))[1] == (1, 50, 96)


def test_what_was_never_imaged_says_nothing(tmp_path):
    raw = np.zeros((8, 128, 320), np.uint8)
    cfg = config(tmp_path)
    assert sample_statistics(write_array(tmp_path / "a.zarr", "volumes/raw", raw, **PLACE), cfg) is None
    tissue = make_phantom((8, 128, 128), seed=1)[0]
    raw[..., :128] = tissue
    found = sample_statistics(write_array(tmp_path / "a.zarr", "volumes/raw", raw, **PLACE), cfg)
    assert found.median == pytest.approx(np.median(tissue) / 255, abs=0.05)


def test_training_keeps_statistics_and_prediction_accepts_data_like_it(trained, capsys, tmp_path):
    cfg = predict_config(trained)
    (entry,) = read_checkpoint(cfg.TRAIN.CHECKPOINT)[TRAINING_DATA]
    assert entry["voxel_size"] == [8, 8, 8]
    assert (entry["contrast"] > 0, entry["lines"] < 0, len(entry["histogram"])) == (True, True, 256)
    assert training_statistics([data_folder(cfg, "train") / "phantom.zarr"], cfg) == [entry]
    predict(cfg)
    assert "warning" not in capsys.readouterr().err

    exported = export(cfg, tmp_path / "exported")
    assert read_checkpoint(exported)[TRAINING_DATA] == [entry]
    state = torch.load(cfg.TRAIN.CHECKPOINT, weights_only=True)
    del state[TRAINING_DATA]
    old = tmp_path / "model_checkpoint_1"
    torch.save(state, old)
    cfg = config(trained, TRAIN__CHECKPOINT=old)
    assert TRAINING_DATA not in read_checkpoint(export(cfg, tmp_path / "exported"))
    again = export(cfg, tmp_path / "exported", [data_folder(cfg, "train") / "phantom.zarr"])
    assert read_checkpoint(again)[TRAINING_DATA] == [entry]


def test_a_network_of_sections_compares_sections(tmp_path):
    cfg = config(tmp_path, DATA__DIM_2D=True, MODEL_ISO__VOXEL_SIZE_2D=(8, 8))
    path = tmp_path / "sections.zarr"
    raw, labels, _ = make_phantom((6, 100, 120), seed=1, voxel_size=(8, 8, 8))
    for z in (3, 4, 5):
        for name, data in (("raw", raw), ("labels/neuron_ids", labels)):
            write_array(path, f"volumes/{name}/{z}", data[z], voxel_size=(8, 8), offset=(0, 0))
    (entry,) = training_statistics([path], cfg)
    assert entry["voxel_size"] == [8, 8]
    assert entry["contrast"] > 0.1
    thick = write_array(tmp_path / "a.zarr", "volumes/raw", raw, voxel_size=(50, 8, 8), offset=(0, 0, 0))
    assert differences(sample_statistics(thick, cfg), [Statistics(**entry)]) == []


@pytest.mark.parametrize("run", [predict, predict_blockwise])
def test_prediction_warns_in_one_line_for_each_volume(trained, capsys, monkeypatch, tmp_path, run):
    monkeypatch.chdir(tmp_path)
    raw = open_array(data_folder(config(trained), "test") / "phantom.zarr", "volumes/raw")[:]
    brain = {"DATA__BRAIN_VOL": "OTHER", "MODEL_ISO__VOXEL_SIZE": (8, 8, 12)}
    ckpt = config(trained).MODEL.CKPT_FOLDER + "/model_checkpoint_1"
    cfg = config(trained, TRAIN__CHECKPOINT=ckpt, DATA__OUTFILE=tmp_path / "out", **brain)
    for name, values in (("dark", (raw / 255) ** 2.5), ("negative", 1 - raw / 255)):
        path = data_folder(cfg, "test") / f"{name}.zarr"
        write_array(path, "volumes/raw", changed(values), voxel_size=(8, 8, 12), offset=(0, 0, 0))
    run(cfg)
    dark, negative = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    for line in (dark, negative):
        assert "8 x 8 x 12 nm, in training 8 x 8 x 8 (rescale it" in line
    assert "dark.zarr" in dark
    assert "PREPROCESS.HISTOGRAM_MATCH" in dark
    assert "negative.zarr" in negative
    assert "contrast is inverted" in negative
    assert "HISTOGRAM_MATCH" not in negative
