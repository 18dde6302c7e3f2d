import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gunpowder as gp
import numpy as np
import pytest
import torch
from funlib.persistence import Array
from scipy.ndimage import maximum_filter

from lsdseg.config.loader import load_config
from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import PREDICT_CONFIG, data_folder
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.device import Precision
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.training.lsd import local_shape_descriptors
from lsdseg.engine.training.nodes import (
    AddAffinities,
    CompactLabels,
    GrowBoundary,
    ShareMemory,
    TargetFromLabels,
    lsd_context,
)
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.engine.training.ranks import Ranks
from lsdseg.engine.training.train import seed_everything, train
from lsdseg.engine.training.trainer import Trainer, learning_rate, loss_weights
from lsdseg.errors import UserError
from lsdseg.models.checkpoint import checkpoint_path, checkpoints_in, latest_checkpoint
from lsdseg.models.losses import balanced_weights

CHECKOUT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "SYSTEM.NUM_WORKERS": 0,
    "TRAIN.DEVICE": "cpu",
    "TRAIN.THREADS": 1,
    "TRAIN.EPOCHS": 4,
    "TRAIN.SAVE_EVERY": 2,
    "TRAIN.LOG_EVERY": 1,
    "TRAIN.INITIAL_LR": 1e-3,
    "MODEL_ISO.NUM_FMAPS": 4,
    "MODEL_ISO.NUM_FMAPS_OUT": 4,
    "MODEL_ISO.FMAP_INC_FACTOR": 2,
    "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2]],
    "MODEL_ISO.KERNEL_SIZE_DOWN": None,
    "MODEL_ISO.KERNEL_SIZE_UP": None,
    "MODEL_ISO.INPUT_SHAPE": (36, 36, 36),
    "MODEL_ISO.LSD_SIGMA": 40,
}


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A phantom to copy into homes."""
    path = tmp_path_factory.mktemp("phantom") / "phantom.zarr"
    write_phantom(path, (48, 52, 56), seed=0, voxel_size=(8, 8, 8), offset=(80, 160, 0))
    return path


@pytest.fixture
def home(tmp_path, volume):
    """A data folder with the phantom, for training and for prediction."""
    for split in ("train", "test"):
        folder = data_folder(config(tmp_path), split)
        folder.mkdir(parents=True)
        (folder / "phantom.zarr").symlink_to(volume)
    return tmp_path


def pairs(home, **overrides):
    settings = SETTINGS | {"DATA.HOME": home} | {key.replace("__", "."): v for key, v in overrides.items()}
    return [str(part) for item in settings.items() for part in item]


def config(home, **overrides):
    return load_config(overrides=pairs(home, **overrides))


def phantom_of(home):
    return data_folder(config(home), "test") / "phantom.zarr"


def batches_of(cfg, count, first=0, stride=1):
    paths = sorted(data_folder(cfg, "train").glob("*.zarr"))
    with training_batches(cfg, paths, tuple(task_channels(cfg)), first, stride) as batches:
        return [next(batches) for _ in range(count)]


def filtered(node, labels, mask=None, result=None):
    """Pass labels, and a mask if there is one, through a node. `node` takes their keys.

    Returns:
        The array with the key `result`; without it, the labels.
    """
    arrays = {gp.ArrayKey("LABELS"): labels} | ({} if mask is None else {gp.ArrayKey("MASK"): mask})
    roi = gp.Roi((0,) * 3, labels.shape[-3:])

    class Source(gp.BatchProvider):
        def setup(self):
            for key, array in arrays.items():
                self.provides(key, gp.ArraySpec(roi, (1,) * 3, False, dtype=array.dtype))

        def provide(self, request):
            batch = gp.Batch()
            for key, array in arrays.items():
                batch[key] = gp.Array(array, self.spec[key])
            return batch

    request = gp.BatchRequest()
    for key in (*arrays, *([result] if result else [])):
        request.add(key, roi.shape)
    with gp.build(Source() + node(*arrays)) as pipeline:
        return pipeline.request_batch(request)[result or next(iter(arrays))].data


def weights_of(cfg, batch, task):
    """Return the weights in the loss of a task."""
    return loss_weights(
        cfg, task, *(torch.from_numpy(of_task[task]) for of_task in (batch.targets, batch.known))
    ).numpy()


def test_a_target_sees_the_context_of_its_voxels_and_leaves_labels_alone():
    labels = np.random.default_rng(0).integers(0, 9, (12, 13, 14), np.uint32)
    key, target = gp.ArrayKey("IDS"), gp.ArrayKey("LARGEST_AROUND")
    voxel_size = gp.Coordinate(2, 1, 1)
    array = Array(labels, (0, 0, 0), voxel_size)
    node = TargetFromLabels(key, target, lambda ids: maximum_filter(ids, (3, 5, 3)), context=(1, 2, 1))
    request, roi = gp.BatchRequest(), gp.Roi((6, 4, 5), (8, 5, 6))
    request[target], request[key] = gp.ArraySpec(roi), gp.ArraySpec(roi)
    with gp.build(gp.ArraySource(key, array) + node) as pipeline:
        batch = pipeline.request_batch(request)
    box = (slice(3, 7), slice(4, 9), slice(5, 11))
    np.testing.assert_array_equal(batch[target].data, maximum_filter(labels, (3, 5, 3))[box])
    np.testing.assert_array_equal(batch[key].data, labels[box])


@pytest.mark.parametrize(("steps", "only_xy"), [(1, False), (2, False), (1, True)])
def test_boundaries_grow_as_in_gunpowder(steps, only_xy):
    cubes = np.random.default_rng(0).integers(0, 4, (3, 4, 5), dtype=np.uint32)
    labels = cubes.repeat(5, 0).repeat(5, 1).repeat(5, 2)
    mask = np.ones(labels.shape, np.uint8)
    mask[5:10, 10:, :10] = mask[:, :, :2] = 0
    for known in (np.ones_like(mask), mask):
        ours = filtered(lambda key, mask_key: GrowBoundary(key, mask_key, steps, only_xy), labels, known)
        theirs = filtered(
            lambda key, mask_key: gp.GrowBoundary(key, mask_key, steps=steps, only_xy=only_xy), labels.copy(), known
        )
        np.testing.assert_array_equal(ours[known > 0], theirs[known > 0])
        assert 0 < (ours > 0).sum() < (labels > 0).sum()


def test_the_edge_of_what_is_labeled_is_no_boundary(home):
    """One neurite, labeled only in the middle of raw, has no boundary, so no affinity with a weight is 0."""
    labels = np.ones((28, 30, 34), np.uint64)
    path = write_labels(home, labels, offset=(160, 240, 80))
    create_labels_mask(path)
    cfg = config(home)
    touched = 0
    for batch in batches_of(cfg, 12):
        weights = weights_of(cfg, batch, "affs")
        touched += (weights == 0).any()
        assert (weights > 0).any()
        assert (batch.targets["affs"][weights > 0] == 1).all()
        # An affinity counts where both of its voxels are labeled.
        known = batch.labels > 0
        for axis in range(3):
            here, counts = (np.moveaxis(array, axis + 1, 0) for array in (known, weights[:, axis] > 0))
            np.testing.assert_array_equal(counts[1:], here[1:] & here[:-1])
    assert touched > 6


def test_affinities_are_those_of_gunpowder():
    labels = np.random.default_rng(0).integers(0, 3, (9, 10, 11)).astype(np.uint32)
    mask = np.ones(labels.shape, np.uint8)
    mask[4:7, 3:, :8] = 0
    offsets = [[-1, 0, 0], [0, 3, 0], [2, -1, -4]]

    def theirs(affs, known, ids, mask_key):
        return gp.AddAffinities(offsets, ids, affs, labels_mask=mask_key, affinities_mask=known)

    def ours(affs, known, ids, mask_key):
        return AddAffinities(offsets, ids, mask_key, affs, known)

    ids, mask_key, affs, known = (gp.ArrayKey(name) for name in ("IDS", "IDS_MASK", "AFFINITIES", "KNOWN"))
    results = []
    for node in (ours, theirs):
        request = gp.BatchRequest()
        request[affs] = request[known] = gp.ArraySpec(gp.Roi((0, 6, 8), (14, 10, 10)))
        sources = tuple(
            gp.ArraySource(key, Array(data, (0, 0, 0), (2, 2, 2))) for key, data in ((ids, labels), (mask_key, mask))
        )
        with gp.build(
            sources + gp.MergeProvider() + gp.Pad(ids, None) + gp.Pad(mask_key, None) + node(affs, known, ids, mask_key)
        ) as pipeline:
            batch = pipeline.request_batch(request)
        results.append([batch[key].data for key in (affs, known)])
    for here, there in zip(*results, strict=True):
        assert here.shape == (3, 7, 5, 5)
        assert 0 < here.mean() < 1
        np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("slab", [None, (1, -1, -1, -1)], ids=["per patch", "per channel"])
def test_weights_are_those_of_gunpowder(slab):
    rng = np.random.default_rng(0)
    affs = (rng.random((3, 8, 9, 10)) < np.reshape([0.02, 0.5, 0.9], (3, 1, 1, 1))).astype(np.uint8)
    known = (rng.random(affs.shape) < 0.7).astype(np.uint8)
    known[1] = slab is None
    weights = gp.ArrayKey("WEIGHTS")
    theirs = filtered(lambda key, mask: gp.BalanceLabels(key, weights, mask=mask, slab=slab), affs, known, weights)
    ours = balanced_weights(*(torch.from_numpy(array[None]) for array in (affs, known)), per_channel=slab is not None)
    np.testing.assert_allclose(ours[0].numpy(), theirs, rtol=1e-6)


def test_large_ids_become_small_and_unlabeled_ones_zero():
    ids = np.array([0, 2**63, 2**63 + 2**32, 7, 2**64 - 3, 2**64 - 1], dtype=np.uint64)
    labels = ids[np.random.default_rng(0).integers(0, 6, (4, 5, 6))]
    compact = filtered(CompactLabels, labels)
    assert compact.dtype == np.uint32
    assert set(np.unique(compact)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(compact == 0, np.isin(labels, ids[[0, 4, 5]]))
    for label in ids[1:4]:
        assert len(np.unique(compact[labels == label])) == 1


def test_targets_fit_the_labels_and_weights_balance_them(home):
    cfg = config(home, TRAIN__BATCH_SIZE=2)
    for batch in batches_of(cfg, 2):
        assert batch.raw.shape == (2, 1, 36, 36, 36)
        assert batch.raw.dtype == np.float32
        assert -1 <= batch.raw.min() < batch.raw.max() - 0.3 <= 0.7
        labels, affs, lsds = batch.labels, batch.targets["affs"], batch.targets["lsds"]
        assert labels.shape == (2, *cfg.MODEL.OUTPUT_SHAPE)
        assert affs.shape == (2, 3, *cfg.MODEL.OUTPUT_SHAPE)
        assert lsds.shape == (2, 10, *cfg.MODEL.OUTPUT_SHAPE)
        for axis in range(3):
            here = np.moveaxis(labels, axis + 1, 0)
            expected = (here[1:] == here[:-1]) & (here[1:] > 0)
            np.testing.assert_array_equal(np.moveaxis(affs[:, axis], axis + 1, 0)[1:], expected)
        np.testing.assert_array_equal(batch.known["lsds"][:, 0], labels > 0)
        assert (lsds[:, :, :] * (labels[:, None] == 0)).max() == 0
        # Connected and separated neighbors have the same total weight, unless one kind is very rare.
        for element in range(2):
            weights, known = weights_of(cfg, batch, "affs")[element], batch.known["affs"][element] > 0
            for value in (0, 1):
                chosen = known & (affs[element] == value)
                share = np.clip(chosen.sum() / known.sum(), 0.05, 0.95)
                np.testing.assert_allclose(weights[chosen], 0.5 / share, rtol=1e-5)


def test_cross_entropy_balances_every_channel_and_trains(home):
    overrides = {"TRAIN__NEIGHBORHOOD": [[-1, 0, 0], [0, -1, 0], [-6, 0, 0]]}
    cfgs = {loss: config(home, TRAIN__AFF_LOSS=loss, **overrides) for loss in ("mse", "bce")}
    batches = batches_of(cfgs["bce"], 6)
    for batch in batches:
        affs, weights = batch.targets["affs"][0], weights_of(cfgs["bce"], batch, "affs")[0]
        for channel, weight in zip(affs, weights, strict=True):
            separated = (channel[weight > 0] == 0).mean()
            if 0.05 < separated < 0.95:  # rarer ones would get too large a weight
                sums = [weight[channel == value].sum() for value in (0, 1)]
                assert sums[0] == pytest.approx(sums[1], rel=1e-3)
    first, last = {}, {}
    for loss, cfg in cfgs.items():
        seed_everything(0)
        trainer = Trainer(cfg, Precision("no", torch.device("cpu")), Ranks())
        trainer.prepare()
        found = [trainer.run_iteration([batches[n % 6]], 0)[0]["affs"] for n in range(60)]
        first[loss], last[loss] = np.mean(found[:6]), np.mean(found[-6:])
        assert last[loss] < first[loss]
    assert first["mse"] < 0.5 < first["bce"]


def test_affinities_may_reach_as_far_as_the_patch(home):
    write_labels(home, np.ones((8, 8, 8), np.uint64), offset=(160, 160, 160))
    offsets = [[-35, 0, 0], [0, 35, 0], [0, 0, -35]]
    cfg = config(home, TRAIN__NEIGHBORHOOD=offsets, TRAIN__MODEL_TYPE="AFF", MODEL_ISO__LSD_SIGMA=1)
    create_labels_mask(data_folder(cfg, "train") / "phantom.zarr")
    for batch in batches_of(cfg, 2):
        assert batch.targets["affs"].shape[1] == 3
        assert not batch.targets["affs"].any()


def test_placement_is_learned_from_labels_that_touch(home):
    """The boundaries in the labels are the voxels on either side of every face that it separates."""
    seen = 0
    for batch in batches_of(config(home, TRAIN__PLACEMENT=True), 3):
        separated, known = (array[0] for array in (batch.targets["placement"] == 0, batch.known["placement"] > 0))
        boundary, inside = np.zeros(separated.shape[1:], bool), np.ones(separated.shape[1:], bool)
        for axis in range(3):
            boundary |= separated[axis] | np.roll(separated[axis], -1, axis)
            inside &= known[axis] & np.roll(known[axis], -1, axis)
            np.moveaxis(inside, axis, 0)[-1] = False
        np.testing.assert_array_equal(batch.labels[0][inside] == 0, boundary[inside])
        seen += boundary[inside].sum()
        assert (batch.targets["placement"] > batch.targets["affs"]).any()
    assert seen > 100


def test_placement_is_predicted_and_kept_apart_from_the_affinities(home):
    cfg = config(home, TRAIN__PLACEMENT=True, TRAIN__VALIDATE_EVERY=2, TRAIN__VALIDATION_VOLUME=phantom_of(home))
    train(cfg)
    predict(load_config(Path(cfg.MODEL.CKPT_FOLDER) / PREDICT_CONFIG))
    [output] = Path(cfg.DATA.OUTFILE).rglob("*.zarr")
    assert list_arrays(output) == ["volumes/pred_affs", "volumes/pred_lsds", "volumes/pred_placement"]
    placement, affs = (open_array(output, f"volumes/pred_{task}") for task in ("placement", "affs"))
    assert placement.shape == affs.shape
    assert placement.attrs["offsets"] == [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
    assert (read(placement) != read(affs)).any()
    with pytest.raises(UserError, match=r"TRAIN.PLACEMENT is False but .* was trained with True"):
        train(config(home))


@pytest.mark.parametrize("size", [8, 7.5])
def test_lsds_of_a_batch_see_the_labels_around_it(home, volume, size):
    """The targets of a patch equal those of the whole volume, cropped."""
    path = data_folder(config(home), "train") / "phantom.zarr"
    path.unlink()
    for name in list_arrays(volume):
        write_array(path, name, read(open_array(volume, name)), voxel_size=(size,) * 3, offset=(81, 160, 0))
    cfg = config(
        home,
        MODEL_ISO__VOXEL_SIZE=(size,) * 3,
        TRAIN__AUGMENT=False,
        MODEL_ISO__GROWBOUNDARY_STEPS=0,
        MODEL_ISO__LSD_DOWNSAMPLE=1,
        MODEL_ISO__PAD_CONV="same",
        MODEL_ISO__INPUT_SHAPE=(16, 16, 16),
        MODEL_ISO__GROW_INPUT=(0, 0, 0),
    )
    labels = read(open_array(path, "volumes/labels/neuron_ids"))
    whole = local_shape_descriptors(labels, 40, (size,) * 3)
    margin = lsd_context(40, (size,) * 3, 1)
    batch = batches_of(cfg, 1)[0]
    # Find the place of the patch in the volume from its raw data.
    raw = read(open_array(path, "volumes/raw")).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(raw, 16, mode="reflect") / 255 * 2 - 1, (16, 16, 16))
    found = np.argwhere(np.isclose(windows[..., 8, 8, :], batch.raw[0, 0, 8, 8], atol=1e-5).all(axis=-1))
    found = [place - 16 for place in found if np.allclose(windows[tuple(place)], batch.raw[0, 0], atol=1e-5)]
    assert len(found) == 1
    begin = np.array(found[0])
    inside = tuple(slice(max(0, -b), min(16, n - b)) for b, n in zip(begin, labels.shape, strict=True))
    there = tuple(slice(s.start + b, s.stop + b) for s, b in zip(inside, begin, strict=True))
    assert min(margin) >= 15
    np.testing.assert_allclose(batch.targets["lsds"][0][:, *inside], whole[:, *there], atol=1e-4)


def test_batches_depend_only_on_seed_and_number(home):
    first = batches_of(config(home), 3)
    again = batches_of(config(home), 2, first=1)
    other = batches_of(config(home, TRAIN__SEED=1), 1)
    for batch, repeated in zip(first[1:], again, strict=True):
        np.testing.assert_array_equal(batch.raw, repeated.raw)
        np.testing.assert_array_equal(batch.targets["lsds"], repeated.targets["lsds"])
    assert not np.array_equal(first[0].raw, first[1].raw)
    assert not np.array_equal(first[0].raw, other[0].raw)


def test_locations_are_labeled_and_cost_little_memory(home, volume):
    """A quarter of the mask is labeled. Its margins are as wide as a rotated patch, but take no memory."""
    path = data_folder(config(home), "train") / "phantom.zarr"
    path.unlink()
    shutil.copytree(volume, path)
    mask = np.zeros((48, 52, 56), np.uint8)
    mask[24:, 26:] = 1
    write_array(path, "volumes/labels/labels_mask", mask, voxel_size=(8, 8, 8), offset=(80, 160, 0))
    cfg = config(home, TRAIN__AUGMENT=False, MODEL_ISO__GROWBOUNDARY_STEPS=0)
    tracemalloc.start()
    try:
        with training_batches(cfg, [path], ("lsds",)) as batches:
            assert tracemalloc.get_traced_memory()[1] < 10 * mask.size
            shares = [next(batches).known["lsds"].mean() for _ in range(10)]
    finally:
        tracemalloc.stop()
    # The required share starts at 0.5. Every miss lowers it by two percent.
    assert min(shares) > 0.25
    assert max(shares) > 0.5


def test_what_lies_around_a_patch_need_not_be_labeled(home):
    """LSDs and boundaries need labels around the patch. Here only the patch is labeled."""
    path = write_labels(home, np.ones((20, 20, 20), np.uint64), offset=(128, 128, 128))
    create_labels_mask(path)
    cfg = config(home, TRAIN__AUGMENT=False, MODEL_ISO__LSD_SIGMA=80)
    shares = [batch.known["lsds"].mean() for batch in batches_of(cfg, 10)]
    assert tuple(cfg.MODEL.OUTPUT_SHAPE) == (20, 20, 20)
    assert np.mean(shares) > 0.1


def test_worker_processes_make_the_same_batches_as_this_one(home):
    """Only their order depends on how fast each worker is."""
    here = {batch.raw.tobytes() for batch in batches_of(config(home), 8)}
    there = [batch.raw.tobytes() for batch in batches_of(config(home, SYSTEM__NUM_WORKERS=2, SYSTEM__CACHE_SIZE=2), 3)]
    assert len(set(there)) == 3
    assert here.issuperset(there)


@pytest.mark.parametrize(("workers", "kind"), [(1, torch.Tensor), (10**12, np.ndarray)], ids=["room", "no room"])
def test_batches_take_shared_memory_only_where_there_is_room(workers, kind):
    labels = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.uint32)
    shared = filtered(lambda _key: ShareMemory(workers), labels)
    assert type(shared) is kind
    np.testing.assert_array_equal(np.asarray(shared), labels)


@pytest.mark.parametrize(
    "augmentation",
    [
        "anisotropic",
        "defects",
        {"MODEL_ISO__JITTER_SIGMA": (0, 2, 2)},
        {"MODEL_ISO__CONTROL_POINT_SPACING": [(20, 20, 20), (10, 10, 10)], "MODEL_ISO__PROB_SLIP": 0.1},
    ],
    ids=["anisotropic", "defects", "one jitter for two passes", "two spacings"],
)
def test_other_augmentations_give_batches(home, volume, augmentation, tmp_path):
    if augmentation == "anisotropic":
        overrides = {key.replace("ISO.", "ANISO."): value for key, value in SETTINGS.items() if "ISO" in key}
        overrides |= {"DATA__FIB": 0, "MODEL_ANISO__VOXEL_SIZE": (8, 8, 8)}
    elif augmentation == "defects":
        defects = tmp_path / "defects.zarr"
        for name, data in {"raw": np.zeros((40, 90, 90), np.uint8), "mask": np.ones((40, 90, 90), np.uint8)}.items():
            write_array(defects, f"defect_sections/{name}", data, voxel_size=(8, 8, 8), offset=(0, 0, 0))
        overrides = {"MODEL_ISO__DEFECT_AUGMENT": defects}
    else:
        overrides = augmentation
    for batch in batches_of(config(home, **overrides), 2):
        assert np.isfinite(batch.raw).all()
        assert (batch.targets["affs"] > 0).any()


def test_appearance_changes_raw_and_leaves_labels_and_targets(home):
    # Both with the node, because gunpowder draws another seed for every node that a request passes.
    (plain,) = batches_of(config(home, MODEL_ISO__PROB_NOISE=1, MODEL_ISO__AMOUNT_NOISE=(0.0, 0.0)), 1)
    (changed,) = batches_of(config(home, MODEL_ISO__PROB_NOISE=1, MODEL_ISO__AMOUNT_NOISE=(0.1, 0.1)), 1)
    assert np.abs(changed.raw - plain.raw).mean() > 1e-3
    np.testing.assert_array_equal(changed.labels, plain.labels)
    for task in plain.targets:
        np.testing.assert_array_equal(changed.targets[task], plain.targets[task])


def test_learning_rate_warms_up_and_falls_to_zero(tmp_path):
    cfg = config(tmp_path, TRAIN__LR_SCHEDULE="cosine", TRAIN__WARMUP=10, TRAIN__EPOCHS=100)
    rates = [learning_rate(cfg, iteration) for iteration in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[50] == pytest.approx(0.5e-3)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[9] == max(rates)
    constant = config(tmp_path)
    assert {learning_rate(constant, iteration) for iteration in (0, 3, 10**6)} == {1e-3}


def weights_at(cfg, iteration):
    path = checkpoint_path(cfg.MODEL.CKPT_FOLDER, iteration)
    return torch.load(path, weights_only=True)["model_state_dict"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_run_on_a_gpu_resumes(home):
    train(config(home, TRAIN__DEVICE="cuda:0", TRAIN__EPOCHS=2))
    train(config(home, TRAIN__DEVICE="cuda:0", TRAIN__EPOCHS=4))
    assert latest_checkpoint(Path(config(home).MODEL.CKPT_FOLDER)).name == "model_checkpoint_4"


def test_resumed_training_ends_with_the_same_weights(home):
    whole = config(home, MODEL_ISO__CKPT_FOLDER=home / "whole")
    train(whole)
    train(config(home, MODEL_ISO__CKPT_FOLDER=home / "parts", TRAIN__EPOCHS=2))
    parts = config(home, MODEL_ISO__CKPT_FOLDER=home / "parts")
    train(parts)
    assert latest_checkpoint(home / "parts").name == "model_checkpoint_4"
    start, one, other = weights_at(parts, 2), weights_at(whole, 4), weights_at(parts, 4)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
        assert not torch.equal(one[name], start[name])


def test_a_run_starts_from_the_weights_of_another(home):
    train(config(home, TRAIN__EPOCHS=2, TRAIN__EMA=0.5))
    first = checkpoint_path(config(home).MODEL.CKPT_FOLDER, 2)
    settings = {"MODEL_ISO__CKPT_FOLDER": home / "second", "TRAIN__INITIAL_WEIGHTS": first, "TRAIN__EMA": 0.5}
    second = config(home, TRAIN__EPOCHS=1, TRAIN__INITIAL_LR=1e-9, **settings)
    train(second)
    averaged = torch.load(first, weights_only=True)["ema_state_dict"]
    state = torch.load(checkpoint_path(home / "second", 1), weights_only=True)
    for weights in (state["model_state_dict"], state["ema_state_dict"]):
        for name, expected in averaged.items():
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)
    # A run that goes on has its own weights.
    first.unlink()
    train(config(home, TRAIN__EPOCHS=2, **settings))


def test_initial_weights_of_another_network_are_refused_before_anything_is_written(home):
    train(config(home, TRAIN__EPOCHS=1))
    weights = checkpoint_path(config(home).MODEL.CKPT_FOLDER, 1)
    settings = {"MODEL_ISO__CKPT_FOLDER": home / "other", "MODEL_ISO__NUM_FMAPS": 3}
    with pytest.raises(UserError, match="model_checkpoint_1"):
        train(config(home, TRAIN__INITIAL_WEIGHTS=weights, **settings))
    with pytest.raises(UserError, match=r"TRAIN\.INITIAL_WEIGHTS"):
        train(config(home, TRAIN__INITIAL_WEIGHTS=home / "nothing", **settings))
    assert not (home / "other").exists()


@pytest.mark.parametrize("saved", [0, 2])
def test_a_loss_that_is_not_finite_names_the_iteration_to_go_on_from(home, saved):
    if saved:
        train(config(home, TRAIN__EPOCHS=saved))
    with pytest.raises(UserError, match=rf"the loss is (nan|inf) at iteration .* from iteration {saved}$"):
        train(config(home, TRAIN__INITIAL_LR=1e9, TRAIN__SAVE_EVERY=100, TRAIN__EPOCHS=20))


def test_training_leaves_logs_snapshots_and_a_config_that_predicts(home, monkeypatch):
    cfg = config(home)
    train(cfg)
    assert list(Path(cfg.MODEL.LOG_DIR).glob("events.out.tfevents.*"))
    snapshot = Path(cfg.MODEL.OUTPUT_DIR) / "snapshot_4.zarr"
    assert list_arrays(snapshot) == [
        "volumes/gt_affs",
        "volumes/gt_lsds",
        "volumes/labels/neuron_ids",
        "volumes/pred_affs",
        "volumes/pred_lsds",
        "volumes/raw",
    ]
    raw, affs = (open_array(snapshot, f"volumes/{name}") for name in ("raw", "pred_affs"))
    assert raw.roi.center == affs.roi.center

    monkeypatch.chdir("/")
    predict_cfg = load_config(Path(cfg.MODEL.CKPT_FOLDER) / PREDICT_CONFIG)
    predict(predict_cfg)
    output = Path(cfg.DATA.OUTFILE) / "MTLSD/3d/run/model_checkpoint_4/phantom.zarr"
    raw = open_array(data_folder(cfg, "test") / "phantom.zarr", "volumes/raw")
    assert open_array(output, "volumes/pred_affs").roi == raw.roi


def run_trainer(home, **overrides):
    command = [sys.executable, CHECKOUT / "trainer.py", *pairs(home, **overrides)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home, start_new_session=True
    )


def end_training(home, number, send, when):
    """Send a signal to a training run when `when(run)` returns; return the run, its output and its last checkpoint."""
    run = run_trainer(home, TRAIN__EPOCHS=10**6, TRAIN__SAVE_EVERY=2, SYSTEM__NUM_WORKERS=1)
    when(run)
    send(run.pid, number)
    output, _ = run.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
    return run, output, latest_checkpoint(home / "lsd_checkpoints/MTLSD_3D/HEMI/run")


# Terminals and schedulers send signals to all processes of a group.
SIGNALS = [(signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGINT, os.killpg)]


@pytest.mark.parametrize(("number", "send"), SIGNALS)
def test_a_signal_ends_training_with_a_checkpoint_and_leaves_no_process(home, number, send):
    def is_trained(run):
        deadline = time.monotonic() + 120
        folder = home / "lsd_checkpoints/MTLSD_3D/HEMI/run"
        while latest_checkpoint(folder) is None and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)

    run, output, checkpoint = end_training(home, number, send, is_trained)
    assert run.returncode == 128 + number, output
    iteration = int(checkpoint.name.rpartition("_")[2])
    assert 0 < iteration < 10**6
    assert f"stopped at iteration {iteration}" in output


@pytest.mark.parametrize(("number", "send"), SIGNALS)
def test_a_signal_ends_training_before_its_first_batch(home, number, send):
    def waits(run):
        while "waiting for the first batch" not in run.stdout.readline():
            assert run.poll() is None
        time.sleep(0.3)

    run, output, checkpoint = end_training(home, number, send, waits)
    assert run.returncode == 128 + number, output
    assert "stopped at iteration" in output
    assert checkpoint is None or checkpoint.name != "model_checkpoint_0"


def test_a_full_disk_ends_training_without_a_partial_checkpoint(home, small_disk):
    folder = small_disk(16)
    with pytest.raises(UserError, match=r"cannot write .*model_checkpoint_2.*free some space"):
        train(config(home, MODEL_ISO__CKPT_FOLDER=folder))
    assert [path.name for path in folder.iterdir()] == ["train.log"]
    assert "cannot write" in (folder / "train.log").read_text().splitlines()[-1]


def test_old_checkpoints_are_deleted_and_only_a_share_of_the_volumes_is_used(home, volume, capsys):
    (data_folder(config(home), "train") / "second.zarr").symlink_to(volume)
    cfg = config(home, TRAIN__KEEP_CHECKPOINTS=1, DATA__TRAIN_TEST_SPLIT=0.5)
    train(cfg)
    assert [path.name for path in checkpoints_in(cfg.MODEL.CKPT_FOLDER)] == ["model_checkpoint_4"]
    assert "1 volume(s)" in capsys.readouterr().out


def write_labels(home, labels, **placement):
    path = data_folder(config(home), "train") / "phantom.zarr"
    path.unlink()
    raw = np.zeros((48, 48, 48), np.uint8)
    write_array(path, "volumes/raw", raw, voxel_size=(8, 8, 8), offset=(0, 0, 0))
    if labels is not None:
        placement = {"voxel_size": (8, 8, 8), "offset": (0, 0, 0)} | placement
        write_array(path, "volumes/labels/neuron_ids", labels, **placement)
    return path


LABELS = np.ones((48, 48, 48), np.uint64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda home: write_labels(home, None), r"volumes/labels/neuron_ids in .*phantom.zarr"),
        (lambda home: write_labels(home, LABELS.repeat(2, 0)), r"neuron_ids in .*phantom.zarr has shape \(96"),
        (lambda home: write_labels(home, LABELS, voxel_size=(8, 8, 4)), r"neuron_ids in .* voxel size \(8, 8, 4\)"),
        (lambda home: write_labels(home, LABELS / 2), r"neuron_ids in .* is float64 and holds 0.5"),
        (lambda home: write_labels(home, -9 * LABELS.astype(np.int64)), r"neuron_ids in .* is int64 and holds -9"),
        (
            lambda home: write_array(
                write_labels(home, LABELS),
                "volumes/labels/labels_mask",
                np.zeros_like(LABELS, np.uint8),
                voxel_size=(8, 8, 8),
                offset=(0, 0, 0),
            ),
            r"labels_mask in .* zero everywhere",
        ),
        (lambda home: (data_folder(config(home), "train") / "phantom.zarr").unlink(), r"no \*.zarr in"),
    ],
)
def test_unusable_training_volumes_are_refused_before_anything_is_written(home, spoil, message):
    spoil(home)
    before = sorted(home.rglob("*"))
    with pytest.raises(UserError, match=message):
        train(config(home))
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"DATA__HOME": "/nowhere/at/all"}, "DATA.HOME"),
        ({"TRAIN__MODEL_TYPE": "MTSLD"}, "MTLSD"),
        ({"MODEL_ISO__INPUT_SHAPE": (37, 36, 36)}, "INPUT_SHAPE"),
        ({"MODEL_ISO__INPUT_SHAPE": (60, 60, 60)}, "smaller than"),
        ({"MODEL_ISO__VOXEL_SIZE": (10, 10, 10)}, "voxel size"),
        ({"TRAIN__DEVICE": "cuda:5"}, "TRAIN.DEVICE"),
        (
            {"TRAIN__BATCH_SIZE": 10_000, "MODEL_ISO__INPUT_SHAPE": (1004,) * 3},
            "BATCH_SIZE is 10000: raw .* takes 40482 GB",
        ),
        ({"TRAIN__MIXED_PRECISION": "fp16"}, "MIXED_PRECISION"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(home, overrides, message):
    before = sorted(home.rglob("*"))
    with pytest.raises(UserError, match=message):
        train(config(home, **overrides))
    assert sorted(home.rglob("*")) == before


def test_a_refusal_is_one_line_and_status_2(home):
    run = run_trainer(home, MODEL_ISO__INPUT_SHAPE=(60, 60, 60))
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2, output
    assert output.startswith("error: ")
    assert "smaller than the network's input (60, 60, 60)" in output
    assert output.count("\n") == 1
