import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from skimage.exposure import match_histograms as scikit_match_histograms

from lsdseg.config.loader import load_config
from lsdseg.data_utils import preprocess as preprocess_module
from lsdseg.data_utils.layout import LABELS, LABELS_MASK
from lsdseg.data_utils.preprocess import preprocess
from lsdseg.data_utils.volumes import list_arrays, open_array, read, slabs, write_array
from lsdseg.errors import UserError

RAW = "volumes/raw"
MITO = "volumes/labels/mito_ids"
SCRIPT = Path(__file__).resolve().parents[1] / "preprocess_data.py"
RNG = np.random.default_rng(0)
RAW_DATA = RNG.integers(20, 120, (9, 70, 66), dtype=np.uint8)
LABELS_DATA = RNG.integers(0, 9, (4, 20, 30)).astype(np.uint64)
LABELS_DATA[1, :5] = 2**64 - 3  # nobody labeled these


def config(home, *overrides):
    return load_config(overrides=["DATA.HOME", str(home), "DATA.BRAIN_VOL", "FLY", *map(str, overrides)])


def folder(home, data_set, dims, split):
    return home / "connexion/data" / data_set / f"data_{dims}" / split


@pytest.fixture
def home(tmp_path):
    """Data set FLY: a training volume whose labels cover a part of raw, and raw alone to test on."""
    train = folder(tmp_path, "FLY", "3d", "train") / "a.zarr"
    write_array(train, RAW, RAW_DATA, voxel_size=(40, 4, 8), offset=(80, 400, 0))
    write_array(train, LABELS, LABELS_DATA, voxel_size=(40, 4, 8), offset=(200, 420, 16))
    write_array(train, "volumes/skeletons", LABELS_DATA[0], voxel_size=(4, 4), offset=(8, 0))
    test = folder(tmp_path, "FLY", "3d", "test") / "b.zarr"
    write_array(test, RAW, RAW_DATA[:3] / np.float32(255), voxel_size=(40, 4, 8), offset=(0, 0, 0))
    return tmp_path


def section(path, name):
    array = open_array(path, name)
    return read(array), tuple(array.voxel_size), tuple(array.offset)


@pytest.mark.parametrize("block_bytes", [1, 2**28])
def test_every_section_becomes_a_dataset_at_its_place(home, monkeypatch, block_bytes):
    monkeypatch.setattr(preprocess_module, "slabs", lambda array, *_: slabs(array, block_bytes))
    preprocess(config(home, "PREPROCESS.EXPORT_2D_FROM_3D", True))
    exported = folder(home, "FLY", "2d", "train") / "a.zarr"
    assert list_arrays(exported) == sorted(f"{name}/{z}" for name in (RAW, LABELS, LABELS_MASK) for z in range(9))
    for z in range(9):
        values, resolution, offset = section(exported, f"{RAW}/{z}")
        np.testing.assert_array_equal(values, RAW_DATA[z])
        assert (resolution, offset) == ((4, 8), (400, 0))

    labeled = range(3, 7)
    for z in range(9):
        values, resolution, offset = section(exported, f"{LABELS}/{z}")
        np.testing.assert_array_equal(values, LABELS_DATA[z - 3] if z in labeled else np.zeros((20, 30)))
        assert (values.dtype, resolution, offset) == (np.uint64, (4, 8), (420, 16))
        mask, _, offset = section(exported, f"{LABELS_MASK}/{z}")
        np.testing.assert_array_equal(mask, LABELS_DATA[z - 3] < 9 if z in labeled else np.zeros((20, 30)))
        assert (mask.dtype, offset) == (np.uint8, (420, 16))

    raw_only = folder(home, "FLY", "2d", "test") / "b.zarr"
    assert list_arrays(raw_only) == [f"{RAW}/{z}" for z in range(3)]
    np.testing.assert_array_equal(section(raw_only, f"{RAW}/2")[0], RAW_DATA[2] / np.float32(255))


def test_masks_mitochondria_and_further_datasets_go_along(home):
    source = folder(home, "FLY", "3d", "train") / "a.zarr"
    grid = {"voxel_size": (40, 4, 8), "offset": (200, 420, 16)}
    mask = RNG.integers(0, 2, LABELS_DATA.shape, dtype=np.uint8)
    write_array(source, LABELS_MASK, mask, **grid)
    write_array(source, MITO, LABELS_DATA.astype(np.uint16) // 2, **grid)
    datasets = ["volumes/skeletons", LABELS]  # the labels go as sections all the same
    preprocess(config(home, "PREPROCESS.EXPORT_2D_FROM_3D", True, "PREPROCESS.DATASETS_TO_COPY", datasets))
    exported = folder(home, "FLY", "2d", "train") / "a.zarr"
    np.testing.assert_array_equal(section(exported, f"{LABELS_MASK}/4")[0], mask[1])
    np.testing.assert_array_equal(section(exported, f"{MITO}/4")[0], (LABELS_DATA.astype(np.uint16) // 2)[1])
    np.testing.assert_array_equal(section(exported, f"{LABELS}/4")[0], LABELS_DATA[1])
    copied, resolution, offset = section(exported, "volumes/skeletons")
    np.testing.assert_array_equal(copied, LABELS_DATA[0])
    assert (resolution, offset) == ((4, 4), (8, 0))


def test_a_volume_of_another_format_becomes_sections_of_a_zarr(home):
    train = folder(home, "FLY", "3d", "train")
    with h5py.File(train / "c.hdf", "w") as file:
        for name, data in ((RAW, RAW_DATA), (LABELS, LABELS_DATA.view(np.int64))):
            file[name] = data[:4, :20, :30]
            file[name].attrs["resolution"] = (40, 4, 8)
    preprocess(config(home, "PREPROCESS.EXPORT_2D_FROM_3D", True))
    exported = folder(home, "FLY", "2d", "train") / "c.zarr"
    np.testing.assert_array_equal(read(open_array(exported, f"{RAW}/3")), RAW_DATA[3, :20, :30])
    np.testing.assert_array_equal(read(open_array(exported, LABELS)), LABELS_DATA)
    np.testing.assert_array_equal(read(open_array(exported, LABELS_MASK)), LABELS_DATA < 2**64 - 3)
    (train / "c.volume").write_text("c.n5")
    with pytest.raises(UserError, match=r"train/c.hdf and c.volume would become the same zarr: rename one"):
        preprocess(config(home, "PREPROCESS.EXPORT_2D_FROM_3D", True))


@pytest.fixture
def two_data_sets(home):
    """FLY is dark, MOUSE (two volumes) brighter and of another contrast."""
    bright = {"a": RNG.normal(150, 20, (10, 30, 70)), "b": RNG.normal(190, 5, (8, 30, 30))}
    reference = []
    for name, values in bright.items():
        reference.append(values.clip(0, 255).astype(np.uint8))
        path = folder(home, "MOUSE", "3d", "train") / f"{name}.zarr"
        write_array(path, RAW, reference[-1], voxel_size=(8, 8, 8), offset=(0, 0, 0))
    write_array(
        folder(home, "FLY", "3d", "test") / "b.zarr", RAW, RAW_DATA[:3] // 2, voxel_size=(40, 4, 8), offset=(0, 0, 0)
    )
    return np.concatenate([values.ravel() for values in reference])


def test_gray_values_become_those_of_the_other_data_set(home, two_data_sets, monkeypatch):
    monkeypatch.setattr(preprocess_module, "slabs", lambda array, *_: slabs(array, 1))
    copied = ["PREPROCESS.DATASETS_TO_COPY", [LABELS]]
    preprocess(config(home, "PREPROCESS.HISTOGRAM_MATCH", ["FLY", "MOUSE"], *copied))
    for split, name, source in [("train", "a", RAW_DATA), ("test", "b", RAW_DATA[:3] // 2)]:
        path = folder(home, "FLY_matched", "3d", split) / f"{name}.zarr"
        matched = open_array(path, RAW)
        expected = scikit_match_histograms(source.ravel(), two_data_sets).reshape(source.shape)
        assert matched.dtype == np.uint8
        np.testing.assert_array_equal(read(matched), np.rint(expected))
    assert list_arrays(path) == [RAW]
    matched = folder(home, "FLY_matched", "3d", "train") / "a.zarr"
    assert list_arrays(matched) == [LABELS, RAW]
    np.testing.assert_array_equal(read(open_array(matched, LABELS)), LABELS_DATA)
    for name, offset in [(RAW, (80, 400, 0)), (LABELS, (200, 420, 16))]:
        assert tuple(open_array(matched, name).offset) == offset
    np.testing.assert_array_equal(
        read(open_array(folder(home, "FLY", "3d", "train") / "a.zarr", RAW)), RAW_DATA, err_msg="the source changed"
    )


def test_bad_input_is_refused_before_anything_is_written(home):
    export = ("PREPROCESS.EXPORT_2D_FROM_3D", True)
    for overrides, message in [
        ((), "nothing to do: set PREPROCESS.EXPORT_2D_FROM_3D"),
        ((*export, "DATA.BRAIN_VOL", "MOUSE"), "MOUSE/data_3d/train does not exist"),
        ((*export, "DATA.RAW", "volumes/em"), "no dataset volumes/em"),
        ((*export, "PREPROCESS.DATASETS_TO_COPY", ["volumes/somata"]), "DATASETS_TO_COPY: no volume .* volumes/somata"),
        (("PREPROCESS.HISTOGRAM_MATCH", ["FLY", "MOUSE"]), "MOUSE/data_3d/train does not exist"),
        (("PREPROCESS.HISTOGRAM_MATCH", ["FLY", "FLY"]), "b.zarr is float32: store it as integers"),
    ]:
        with pytest.raises(UserError, match=message):
            preprocess(config(home, *overrides))
    for resolution, offset in [((20, 4, 8), (200, 0, 0)), ((40, 4, 8), (210, 0, 0)), ((40, 4, 8), (400, 0, 0))]:
        train = folder(home, "FLY", "3d", "train") / "a.zarr"
        write_array(train, LABELS, LABELS_DATA, voxel_size=resolution, offset=offset)
        with pytest.raises(UserError, match=r"neuron_ids in .*a.zarr has other sections than volumes/raw"):
            preprocess(config(home, *export))
    assert sorted(path.name for path in (home / "connexion/data").rglob("*.zarr")) == ["a.zarr", "b.zarr"]


def test_an_interrupted_export_leaves_no_volume(home, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess_module, "labels_mask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        preprocess(config(home, "PREPROCESS.EXPORT_2D_FROM_3D", True))
    assert list(folder(home, "FLY", "2d", "train").iterdir()) == []


def test_script(home):
    arguments = ["-c", "config.py", "DATA.HOME", str(home), "DATA.BRAIN_VOL", "FLY"]
    refused = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    arguments += ["PREPROCESS.EXPORT_2D_FROM_3D", "True"]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{folder(home, 'FLY', '2d', 'train')}/a.zarr: 9 sections" in done.stdout


def test_the_published_option_says_which_id_nobody_labeled(home):
    arguments = ["-c", "config.py", "DATA.HOME", str(home), "DATA.BRAIN_VOL", "FLY", "--background_value", "7"]
    command = [sys.executable, SCRIPT, *arguments, "PREPROCESS.EXPORT_2D_FROM_3D", "True"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = folder(home, "FLY", "2d", "train") / "a.zarr"
    for z in range(4):
        unlabeled = LABELS_DATA[z] == 7
        assert unlabeled.any()
        np.testing.assert_array_equal(
            section(exported, f"{LABELS}/{z + 3}")[0], np.where(unlabeled, np.uint64(0), LABELS_DATA[z])
        )
        np.testing.assert_array_equal(section(exported, f"{LABELS_MASK}/{z + 3}")[0], (LABELS_DATA[z] < 9) & ~unlabeled)


def test_the_published_option_needs_labels_without_a_mask_and_sections(home):
    with pytest.raises(UserError, match="--background_value is for exported sections"):
        preprocess(config(home, "PREPROCESS.HISTOGRAM_MATCH", "['FLY', 'FLY']"), 0)
    source = folder(home, "FLY", "3d", "train") / "a.zarr"
    write_array(source, LABELS_MASK, np.ones((4, 20, 30), np.uint8), voxel_size=(40, 4, 8), offset=(200, 420, 16))
    with pytest.raises(UserError, match=f"holds {LABELS_MASK}: leave out --background_value, or delete that mask"):
        preprocess(config(home, "PREPROCESS.EXPORT_2D_FROM_3D", True), 0)
    assert not folder(home, "FLY", "2d", "train").exists()
