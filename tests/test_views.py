"""Predicting mirrored and transposed views, and turning back what they say."""

import numpy as np
import pytest
from test_predict import OFFSET, config, home, predictions  # noqa: F401

from lsdseg.config.loader import load_config
from lsdseg.data_utils.records import Record
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.post.affinities import voxel_pairs
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.predict.views import Combination, View, margins, turned_back, views_of
from lsdseg.engine.training.lsd import local_shape_descriptors
from lsdseg.errors import UserError

LONG_RANGE = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-3, 0, 0], [0, -3, 0], [0, 0, -3], [0, 2, 2], [0, -2, 2]]


@pytest.fixture(scope="module")
def labels():
    """Blobs of three different extents, so that no two axes look alike."""
    rng = np.random.default_rng(1)
    seeds = rng.random((24, 3)) * (24, 30, 34)
    voxels = np.stack(np.meshgrid(*map(np.arange, (24, 30, 34)), indexing="ij"), axis=-1)
    distance = (((voxels[..., None, :] - seeds) / (1, 1.5, 2.5)) ** 2).sum(axis=-1)
    return distance.argmin(axis=-1).astype(np.uint64) + 1


def affinities_of(labels, offsets):
    """Compare every voxel with the one at each offset; 0 where that lies outside."""
    affinities = np.zeros((len(offsets), *labels.shape), np.float32)
    for channel, offset in zip(affinities, offsets, strict=True):
        here, there = voxel_pairs(labels.shape, offset)
        channel[here] = labels[here] == labels[there]
    return affinities


def lsds_of(labels):
    return local_shape_descriptors(labels, 3.0, (1, 1, 1))


@pytest.mark.parametrize("number", range(16))
def test_what_is_made_from_a_view_of_labels_is_turned_back_to_what_is_made_from_the_labels(labels, number):
    cfg = load_config(overrides=["DATA.VIEWS", 16, "TRAIN.NEIGHBORHOOD", LONG_RANGE])
    view = views_of(cfg)[number]
    around = margins(view, cfg)
    inner = tuple(slice(low, size - high) for (low, high), size in zip(around, labels.shape, strict=True))
    for task, make in (("affs", lambda x: affinities_of(x, LONG_RANGE)), ("lsds", lsds_of)):
        turned = turned_back(task, make(view.of(labels)), view, around, cfg)
        np.testing.assert_allclose(turned, make(labels)[:, *inner], atol=1e-5)
    assert (number == 0) == (turned.shape[1:] == labels.shape and view == View((False,) * 3, False))


def test_views_are_different_and_a_view_turned_back_is_the_volume(labels):
    for count in (1, 4, 8, 16):
        views = views_of(load_config(overrides=["DATA.VIEWS", count]))
        assert len({view.of(labels).tobytes() for view in views}) == count
        for view in views:
            np.testing.assert_array_equal(view.back(view.of(labels)), labels)
    flat = views_of(load_config(overrides=["DATA.VIEWS", 8, "DATA.DIM_2D", "True"]))
    assert len(flat) == 8
    assert not any(view.mirrored[0] for view in flat)


@pytest.mark.parametrize(("padding", "views"), [("valid", 4), ("same", 16)])
def test_views_do_not_depend_on_tiles_and_workers(home, padding, views):  # noqa: F811
    settings = ("DATA.VIEWS", views, "DATA.DISAGREEMENT", "True")
    output, affs, lsds = predictions(config(home, *settings, padding=padding, grow=0))
    disagreement = read(open_array(output, "volumes/pred_disagreement"))
    assert 0 < disagreement.min() < disagreement.max() < 1
    other = config(home, *settings, "SYSTEM.NUM_WORKERS", 2, "DATA.OUTFILE", home / "other", padding=padding, grow=16)
    predict_blockwise(other)
    output = f"{other.DATA.OUTFILE}/MTLSD/3d/run/model_checkpoint_5/sample.zarr"
    for name, expected in {"affs": affs, "lsds": lsds, "disagreement": disagreement}.items():
        np.testing.assert_allclose(read(open_array(output, f"volumes/pred_{name}")), expected, atol=1e-5)
    _, one, _ = predictions(config(home, "DATA.OUTFILE", home / "one", padding=padding))
    assert np.abs(one - affs).max() > 1e-4


@pytest.mark.parametrize("how", ["mean", "median", "min"])
def test_the_prediction_of_a_view_is_the_view_of_the_prediction(home, how):  # noqa: F811
    """With all views, a network treats all directions alike, whatever its weights are."""
    raw = np.random.default_rng(3).integers(0, 256, (16, 24, 24), dtype=np.uint8)
    sample = home / "connexion/data/HEMI/data_3d/test/sample.zarr"
    cfg = config(home, "DATA.VIEWS", 16, "DATA.COMBINE_VIEWS", how, "DATA.DROP_DS_MONGOTABLE", "True", padding="same")
    view = View((True, False, True), True)
    around = margins(view, cfg)
    inner = tuple(slice(low, size - high) for (low, high), size in zip(around, raw.shape, strict=True))
    write_array(sample, "volumes/raw", raw, voxel_size=(8, 8, 8), offset=OFFSET)
    _, *straight = predictions(cfg)
    write_array(sample, "volumes/raw", view.of(raw), voxel_size=(8, 8, 8), offset=OFFSET)
    _, *turned = predictions(cfg)
    for task, values, expected in zip(("affs", "lsds"), turned, straight, strict=True):
        np.testing.assert_allclose(turned_back(task, values, view, around, cfg), expected[:, *inner], atol=1e-5)


def test_how_views_are_combined():
    views = [np.full((2, 1, 1, 1), value, np.float32) for value in (0.2, 0.9, 0.4)]
    for how, expected in {"mean": 0.5, "median": 0.4, "min": 0.2}.items():
        cfg = load_config(overrides=["DATA.COMBINE_VIEWS", how, "DATA.DISAGREEMENT", "True"])
        combination = Combination(cfg)
        for values in views:
            combination.add({"lsds": values[:1], "affs": values})
        results = combination.results()
        np.testing.assert_allclose(results["affs"], np.full((2, 1, 1, 1), expected), atol=1e-6)
        np.testing.assert_allclose(results["lsds"], np.full((1, 1, 1, 1), 0.5), atol=1e-6)
        np.testing.assert_allclose(results["disagreement"], np.full((1, 1, 1, 1), 0.7), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("DATA.DISAGREEMENT", "True"), r"DATA.DISAGREEMENT is True, but one view .*: set DATA.VIEWS to 4"),
        (
            ("DATA.VIEWS", 8, "DATA.DISAGREEMENT", "True", "TRAIN.MODEL_TYPE", "LSD"),
            r"DISAGREEMENT.*LSD predicts no aff",
        ),
        (("DATA.VIEWS", 16, "MODEL_ISO.VOXEL_SIZE", (8, 8, 4)), r"VOXEL_SIZE \(8, 8, 4\).*set DATA.VIEWS to 8"),
        (("DATA.VIEWS", 4, "TRAIN.NEIGHBORHOOD", [[-1, 0, 0], [0, -1, -1]]), r"no offset that becomes \[0, -1, -1\]"),
    ],
)
def test_views_that_a_network_does_not_have_are_refused(home, settings, message):  # noqa: F811
    sample = home / "connexion/data/HEMI/data_3d/test/sample.zarr"
    raw = read(open_array(sample, "volumes/raw"))
    cfg = config(home, *settings)
    write_array(sample, "volumes/raw", raw, voxel_size=cfg.MODEL.VOXEL_SIZE, offset=OFFSET)
    with pytest.raises(UserError, match=message):
        predict(cfg)
    assert not (home / "lsd_outputs").exists()


def test_sixteen_views_of_sections_are_refused():
    with pytest.raises(UserError, match="has 8 views: set it to 8"):
        views_of(load_config(overrides=["DATA.VIEWS", 16, "DATA.DIM_2D", "True"]))


def test_a_result_that_is_older_than_a_key_was_made_with_its_default():
    before = Record("prediction", {}, {"DATA.AFFS_DTYPE": "uint8"})
    assert before.differences(Record("prediction", {}, {"DATA.AFFS_DTYPE": "uint8", "DATA.VIEWS": 1})) == []
    changed = Record("prediction", {}, {"DATA.AFFS_DTYPE": "uint8", "DATA.VIEWS": 8})
    assert before.differences(changed) == ["DATA.VIEWS was 1, is 8"]


def test_the_disagreement_is_not_written_without_its_key(home):  # noqa: F811
    output, _, _ = predictions(config(home, "DATA.VIEWS", 4))
    assert list_arrays(output) == ["volumes/pred_affs", "volumes/pred_lsds"]
