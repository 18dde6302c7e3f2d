import subprocess
import sys
from pathlib import Path

import cc3d
import h5py
import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import variation_of_information
from skimage.segmentation import watershed
from waterz._agglomerate import _load_prebuilt
from yacs.config import CfgNode

from lsdseg.config.implementations import MERGE_FUNCTIONS
from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import output_path
from lsdseg.data_utils.masks import read_mask
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.post.agglomerate import QUEUE_BINS, agglomerate, default_merge_function
from lsdseg.engine.post.fragments import (
    SEED_DISTANCE,
    extract_fragments,
    find_seeds,
    flood,
    flood_between,
    squared_distances,
)
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.post.whole import segment
from lsdseg.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]


def with_boundaries(labels):
    """Labels with 0 where a neighbor along an axis differs."""
    boundary = np.zeros(labels.shape, bool)
    for axis in range(3):
        differs = np.diff(labels, axis=axis) != 0
        boundary |= np.insert(differs, 0, False, axis) | np.insert(differs, differs.shape[axis], False, axis)
    return np.where(boundary, 0, labels)


def affinities_of(labels):
    """Perfect float32 affinities to the previous voxel along z, y, x; the first one continues outside."""
    previous = [np.concatenate([labels.take([0], a), labels], a) for a in range(3)]
    shape = labels.shape
    return np.stack([(p[: shape[0], : shape[1], : shape[2]] == labels) & (labels > 0) for p in previous]).astype(
        np.float32
    )


def voi_sum(truth, segmentation):
    _, truth = np.unique(truth, return_inverse=True)  # scikit-image's table has a row for every possible label
    return variation_of_information(truth, segmentation.astype(np.int64), ignore_labels=(0,)).sum()


@pytest.fixture(scope="module")
def neurites(data_dir):
    """Real neurites, 64 voxels a side, background between them; connected pieces have labels of their own."""
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        labels = file["volumes/labels/neuron_ids"][40:104, 80:144, 80:144]
    return cc3d.connected_components(with_boundaries(labels), connectivity=6).astype(np.uint64)


@pytest.fixture(scope="module")
def noisy(neurites):
    """Affinities of `neurites`, blurred and noisy."""
    noise = np.random.default_rng(0).normal(scale=0.15, size=(3, *neurites.shape))
    blurred = np.stack([ndimage.gaussian_filter(channel, 0.7) for channel in affinities_of(neurites)])
    return np.clip(blurred + noise, 0, 1).astype(np.float32)


def test_perfect_affinities_give_the_neurites_back(neurites):
    affinities = affinities_of(neurites)
    fragments = extract_fragments(affinities, background_mask=True)
    assert fragments.dtype == np.uint64
    assert set(np.unique(fragments)) == set(range(fragments.max() + 1))
    [(_, segmentation)] = agglomerate(affinities, fragments, [0.7], "mean")
    covered = segmentation > 0
    assert covered[neurites > 0].mean() > 0.9
    assert voi_sum(neurites * covered, segmentation) < 0.05 < voi_sum(neurites * covered, fragments)

    grown = extract_fragments(affinities)
    [(_, segmentation)] = agglomerate(affinities, grown, [0.7], "mean")
    assert voi_sum(neurites, segmentation) < 0.05 < voi_sum(neurites, grown)


def test_fragments_are_those_of_a_hand_made_case():
    affinities = np.ones((3, 8, 8, 30), np.float32)
    affinities[:, :, :, 14:16] = 0
    fragments = extract_fragments(affinities, background_mask=True)
    assert not fragments[:, :, 14:16].any()
    left, right = np.unique(fragments[:, :, :14]), np.unique(fragments[:, :, 16:])
    assert len(left) == len(right) == 1
    assert {*left, *right} == {1, 2}

    mask = np.ones((8, 8, 30), bool)
    mask[:, :, :20] = False
    masked = extract_fragments(affinities, mask=mask)
    assert not masked[~mask].any()
    assert masked[mask].all()

    affinities[:, :, :, 16:] = 0.6
    kept = extract_fragments(affinities, background_mask=True, filter_fragments=0.8)
    assert (kept[:, :, :14] == 1).all()
    assert not kept[:, :, 14:].any()


def test_neurites_meet_where_the_membrane_is_surest():
    affinities = np.ones((3, 8, 8, 30), np.float32)
    affinities[..., 12:18] = [0.4, 0.35, 0.3, 0.2, 0.1, 0.45]
    for flipped in (False, True):
        fragments = extract_fragments(affinities[..., ::-1] if flipped else affinities)
        fragments = fragments[..., ::-1] if flipped else fragments
        left, right = fragments[0, 0, 0], fragments[0, 0, -1]
        assert left != right
        assert (fragments[..., :16] == left).all()
        assert (fragments[..., 17:] == right).all()


def test_volumes_without_and_full_of_boundary():
    affinities = np.zeros((3, 4, 20, 20), np.float32)
    assert not extract_fragments(affinities).any()
    affinities[:, 1:] = 1
    per_section = extract_fragments(affinities, fragments_in_xy=True)
    assert [np.unique(section).tolist() for section in per_section] == [[0], [1], [2], [3]]
    assert (extract_fragments(np.ones_like(affinities)) == 1).all()


def test_boundary_wider_than_the_seed_window_is_not_flooded_by_neurites():
    """Like resin beside tissue: it becomes a fragment of its own, except for the rim that the window cannot tell."""
    affinities = np.ones((3, 24, 24, 60), np.float32)
    affinities[..., 20:] = np.random.default_rng(0).uniform(0, 0.3, (3, 24, 24, 40))
    fragments = extract_fragments(affinities)
    neurite, resin = fragments[0, 0, 0], fragments[0, 0, -1]
    assert neurite != resin
    assert set(np.unique(fragments)) == {neurite, resin}
    assert (fragments[..., :20] == neurite).all()
    assert (fragments[..., 20 + SEED_DISTANCE // 2 :] == resin).all()
    assert extract_fragments(affinities, background_mask=True)[..., 20:].max() == 0


def test_placement_says_on_which_voxel_neurites_meet():
    """Grown boundaries say nothing about that; the affinity between two touching voxels does."""
    labels = np.ones((8, 8, 30), np.uint64)
    labels[..., 15:] = 2
    eroded = np.where((np.arange(30) > 10) & (np.arange(30) < 16), 0, labels)
    fragments = extract_fragments(affinities_of(eroded), placement=affinities_of(labels))
    assert len(np.unique(fragments)) == 2
    assert (fragments == np.where(labels == 1, fragments[0, 0, 0], fragments[0, 0, -1])).all()
    assert (extract_fragments(affinities_of(eroded)) != fragments).any()
    # In sections, too, where the affinity across them does not count.
    per_section = extract_fragments(affinities_of(eroded), placement=affinities_of(labels), fragments_in_xy=True)
    assert all((section[labels[0] == 1] == section[0, 0]).all() for section in per_section)
    assert len(np.unique(per_section)) == 16
    without = extract_fragments(affinities_of(eroded), placement=affinities_of(labels), background_mask=True)
    assert ((without > 0) == (eroded > 0))[..., :10].all()
    assert not without[..., 11:15].any()


def test_flood_between_is_a_maximum_spanning_forest():
    """Every voxel gets the label whose path to it has the highest lowest affinity, as a slow search finds it."""
    rng = np.random.default_rng(0)
    shape = (5, 6, 7)
    affinities = rng.permutation(3 * np.prod(shape)).reshape(3, *shape) / 630  # all different
    affinities = (affinities * 255).round() / 255
    labels = np.zeros(shape, np.int32)
    labels.ravel()[rng.choice(labels.size, 5, replace=False)] = np.arange(1, 6)
    inside = rng.random(shape) > 0.1
    inside[labels > 0] = True

    width = np.zeros((6, *shape))
    width[labels, *np.indices(shape)] = (labels > 0) * 2.0
    for _ in range(labels.size):
        before = width.copy()
        for axis in range(3):
            to, back = (np.moveaxis(a, axis + 1, 0) for a in (width, before))
            edge = np.moveaxis(np.where(inside, affinities[axis], -1), axis, 0)[1:, None]
            free = np.moveaxis(inside & (labels == 0), axis, 0)[:, None]
            to[1:] = np.where(free[1:], np.maximum(to[1:], np.minimum(back[:-1], edge)), to[1:])
            to[:-1] = np.where(free[:-1], np.maximum(to[:-1], np.minimum(back[1:], edge)), to[:-1])
        if (before == width).all():
            break
    found = flood_between(labels, affinities.astype(np.float32), inside)
    assert (found[labels > 0] == labels[labels > 0]).all()
    assert not found[~inside].any()
    reached = width[1:].max(axis=0)
    assert ((found > 0) == ((reached > 0) & inside)).all()
    chosen = np.take_along_axis(width, found[None].astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(chosen[found > 0], reached[found > 0])


def test_grown_fragments_fill_the_volume_and_keep_the_others(noisy):
    fragments, grown = extract_fragments(noisy, background_mask=True), extract_fragments(noisy)
    assert (fragments == 0).any()
    assert grown.all()
    pairs = np.unique(np.stack([fragments, grown]).reshape(2, -1)[:, fragments.ravel() > 0], axis=1)
    assert pairs.shape[1] == fragments.max() == len(np.unique(pairs[1]))


def test_flood_is_the_watershed_of_scikit_image(noisy):
    foreground = noisy.mean(axis=0) > 0.5
    distances = squared_distances(foreground)
    seeds = find_seeds(distances)
    ours, theirs = flood(seeds, distances, foreground), watershed(-distances, seeds, mask=foreground)
    assert ((ours > 0) == (theirs > 0)).all()
    # they differ in whom a voxel as far from two seeds goes to
    assert (ours == theirs).mean() > 0.95
    sizes = np.bincount(seeds.ravel()), np.bincount(ours.ravel(), minlength=seeds.max() + 1)
    assert (sizes[1][1:] >= sizes[0][1:]).all()


def test_fragments_in_xy_never_span_sections(noisy):
    fragments = extract_fragments(noisy, fragments_in_xy=True)
    sections = [set(np.unique(section)) - {0} for section in fragments]
    assert all(sections)
    assert len(set().union(*sections)) == sum(map(len, sections)) == fragments.max()
    # the affinity across sections has no say
    without_z = noisy.copy()
    without_z[0] = 0
    assert (extract_fragments(without_z, fragments_in_xy=True) == fragments).all()


def test_epsilon_agglomeration_merges_fragments(noisy):
    fragments = extract_fragments(noisy)
    merged = extract_fragments(noisy, epsilon_agglomerate=0.25)
    assert 1 < merged.max() < fragments.max()
    assert ((merged > 0) == (fragments > 0)).all()
    pairs = np.unique(np.stack([fragments, merged]).reshape(2, -1), axis=1)
    assert pairs.shape[1] == fragments.max()


def test_uint8_and_float_affinities_agree(noisy):
    stored = np.rint(noisy * 255).astype(np.uint8)
    as_float = stored.astype(np.float64) / 255
    fragments = extract_fragments(stored)
    assert (extract_fragments(as_float) == fragments).all()
    for (_, a), (_, b) in zip(
        agglomerate(stored, fragments, [0.3, 0.6], "hist_quant_50"),
        agglomerate(as_float, fragments, [0.3, 0.6], "hist_quant_50"),
        strict=True,
    ):
        assert (a == b).all()


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_affinities_out_of_range_are_refused(bad):
    affinities = np.ones((3, 4, 4, 4), np.float32)
    affinities[1, 2, 3, 0] = bad
    with pytest.raises(ValueError, match=r"0\.\.1"):
        extract_fragments(affinities)


def test_agglomeration_merges_in_order_of_affinity(capfd):
    fragments = np.repeat(np.arange(1, 4, dtype=np.uint64), 4).reshape(1, 1, 12) * np.ones((4, 4, 1), np.uint64)
    affinities = np.ones((3, 4, 4, 12), np.float32)
    affinities[2, :, :, 4], affinities[2, :, :, 8] = 0.7, 0.3
    given = fragments.copy()
    results = list(agglomerate(affinities, fragments, [0.8, 0.2, 0.5], "mean"))
    assert [threshold for threshold, _ in results] == [0.2, 0.5, 0.8]
    assert [len(np.unique(segmentation)) for _, segmentation in results] == [3, 2, 1]
    assert results[1][1][0, 0, 0] == results[1][1][0, 0, 7] != results[1][1][0, 0, 8]
    assert (fragments == given).all()
    assert capfd.readouterr().out == ""


def test_every_merge_function_is_shipped_compiled():
    assert {"mean", "hist_quant_10", "hist_quant_95_initmax"} <= set(MERGE_FUNCTIONS)
    assert all(_load_prebuilt(function, QUEUE_BINS) for function in MERGE_FUNCTIONS.values())


def test_merge_function_rule():
    thresholds = [0.35, 0.4, 0.45]
    assert default_merge_function(thresholds, 0.25) == "hist_quant_35"
    assert default_merge_function(thresholds, 0.35) == "hist_quant_40"
    with pytest.raises(UserError, match=r"EPSILON_AGGLOMERATE 0\.5"):
        default_merge_function(thresholds, 0.5)
    with pytest.raises(UserError, match=r"hist_quant_33.*hist_quant_10, .*hist_quant_15"):
        default_merge_function([0.33], 0.25)


def test_a_merge_function_that_cannot_be_compiled_says_what_to_do(noisy, monkeypatch):
    monkeypatch.setitem(MERGE_FUNCTIONS, "wrong", "OneMinus<NoSuchAffinity<RegionGraphType, ScoreValue>>")
    with pytest.raises(UserError, match=r"'wrong' compiled, and compiling it failed: correct its type"):
        list(agglomerate(noisy[:, :8, :8, :8], np.ones((8, 8, 8), np.uint64), [0.5], "wrong"))


def test_segment_names():
    def names_at(*thresholds, method="waterz"):
        settings = CfgNode({"METHOD": method, "THRESHOLDS": list(thresholds)})
        return method_of(settings).segmentation_names(settings)

    names = names_at(0.5, 0.55, 0.29, 1.0)
    assert [name[-3:] for name in names.values()] == ["050", "055", "029", "100"]
    assert names[0.55] == "volumes/segmentation_055"
    assert list(names_at(0.501, 0.504).values()) == ["volumes/segmentation_050_1", "volumes/segmentation_050_4"]
    with pytest.raises(UserError, match="THRESHOLDS"):
        names_at(0.5, 0.5)
    assert list(names_at(0.5, 0.501, method="mutex").values()) == ["volumes/segmentation_mutex"]


def test_mask_is_read_by_world_coordinates(tmp_path):
    mask = np.zeros((2, 3, 3), np.uint8)
    mask[1, 0, 2] = 1
    mask = write_array(tmp_path / "mask.zarr", "mask", mask, voxel_size=(20, 20, 20), offset=(100, 200, 300))
    affinities = write_array(
        tmp_path / "a.zarr",
        "a",
        np.zeros((6, 6, 6), np.uint8),
        voxel_size=(10, 10, 10),
        offset=(110, 190, 310),
    )
    inside = read_mask(mask, affinities.roi, affinities)
    # the one voxel covers z 120..140, y 200..220, x 340..360
    assert inside.shape == (6, 6, 6)
    assert inside[1:3, 1:3, 3:5].all()
    assert inside.sum() == 8


@pytest.fixture
def config(tmp_path):
    """A config, and the output zarr of its one test volume."""
    sample = tmp_path / "data" / "CREMI" / "data_3d" / "test" / "sample.zarr"
    write_array(sample, "volumes/raw", np.zeros((64, 64, 64), np.uint8), voxel_size=(8, 8, 8), offset=(0, 0, 0))
    overrides = {
        "DATA.HOME": tmp_path,
        "DATA.DATA_DIR_PATH": "data",
        "DATA.BRAIN_VOL": "CREMI",
        "TRAIN.CHECKPOINT": tmp_path / "run" / "model_checkpoint_1",
        "INS_SEGMENT.THRESHOLDS": [0.5, 0.3],
        "INS_SEGMENT.MERGE_FUNCTION": "hist_quant_50",
    }

    def load(**more):
        more = {key.replace("__", "."): value for key, value in more.items()}
        return load_config(None, [str(x) for pair in (overrides | more).items() for x in pair])

    return load, output_path(load(), sample)


def test_segments_every_threshold_on_disk(config, noisy):
    load, output = config
    place = {"voxel_size": (8, 8, 8), "offset": (80, 160, 240)}
    write_array(output, "volumes/pred_affs", np.rint(noisy * 255).astype(np.uint8), **place)
    segment(load(INS_SEGMENT__EPSILON_AGGLOMERATE=0))

    names = ["volumes/fragments", "volumes/segmentation_030", "volumes/segmentation_050"]
    assert list_arrays(output) == [names[0], "volumes/pred_affs", *names[1:]]
    arrays = [open_array(output, name) for name in names]
    assert all(a.dtype == np.uint64 and a.voxel_size == (8, 8, 8) and a.offset == (80, 160, 240) for a in arrays)
    assert [a.attrs["threshold"] for a in arrays[1:]] == [0.3, 0.5]
    assert [a.attrs["merge_function"] for a in arrays[1:]] == ["hist_quant_50"] * 2
    counts = [len(np.unique(read(a))) for a in arrays]
    assert counts[0] > counts[1] > counts[2]
    [(_, expected)] = agglomerate(noisy, read(arrays[0]), [0.5], "hist_quant_50")
    assert voi_sum(expected, read(arrays[2])) < 0.1


def test_a_predicted_placement_is_used_unless_it_is_turned_off(config, neurites, noisy):
    load, output = config
    place = {"voxel_size": (8, 8, 8), "offset": (80, 160, 240)}
    write_array(output, "volumes/pred_affs", noisy, **place)

    def fragments(**settings):
        segment(load(**settings))
        return read(open_array(output, "volumes/fragments"))

    # Channels in another order than those of affinities: their offsets count.
    offsets = [[0, 0, -1], [-1, 0, 0], [0, -1, 0]]
    placement = affinities_of(neurites)[[2, 0, 1]]
    without = fragments()
    write_array(output, "volumes/pred_placement", placement, **place, attributes={"offsets": offsets})
    placed = fragments()
    assert (placed != without).any()
    expected = extract_fragments(noisy, epsilon_agglomerate=0.25, placement=affinities_of(neurites))
    np.testing.assert_array_equal(placed, expected)
    np.testing.assert_array_equal(fragments(INS_SEGMENT__PLACEMENT=False), without)

    write_array(output, "volumes/pred_placement", placement[:, 1:], **place, attributes={"offsets": offsets})
    with pytest.raises(UserError, match=r"pred_placement in .* run predicter.py again"):
        segment(load())


def test_segments_within_the_mask_only(config, noisy, tmp_path):
    load, output = config
    mask = np.zeros((64, 64, 64), np.uint8)
    mask[:, :32] = 1
    place = {"voxel_size": (8, 8, 8), "offset": (0, 0, 0)}
    write_array(tmp_path / "mask.zarr", "mask", mask, **place)
    write_array(output, "volumes/pred_affs", noisy, **place)
    segment(load(INS_SEGMENT__MASK_FILE=tmp_path / "mask.zarr", INS_SEGMENT__MASK_DATASET="mask"))
    segmentation = read(open_array(output, "volumes/segmentation_030"))
    assert segmentation[:, :32].any()
    assert not segmentation[:, 32:].any()


def test_nan_affinities_are_an_error_and_write_nothing(config, noisy):
    load, output = config
    affinities = noisy.copy()
    affinities[0, 5, 5, 5] = np.nan
    write_array(output, "volumes/pred_affs", affinities, voxel_size=(8, 8, 8), offset=(0, 0, 0))
    with pytest.raises(UserError, match=r"volumes/pred_affs in .*sample.zarr.*NaN"):
        segment(load())
    assert list_arrays(output) == ["volumes/pred_affs"]


def test_script_without_affinities_says_what_to_run(config, tmp_path):
    load, output = config
    file = tmp_path / "config.py"
    keys = ("HOME", "DATA_DIR_PATH", "BRAIN_VOL")
    lines = [f"_C.DATA.{key} = {load().DATA[key]!r}" for key in keys]
    lines = ["from yacs.config import CfgNode", "_C = CfgNode()", "_C.DATA = CfgNode()", *lines]
    file.write_text("\n".join([*lines, "_C.TRAIN = CfgNode()", f"_C.TRAIN.CHECKPOINT = {load().TRAIN.CHECKPOINT!r}"]))
    done = subprocess.run(
        [sys.executable, CHECKOUT / "instance_segmenter.py", "-c", file],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert str(output) in done.stderr
    assert "predicter.py" in done.stderr
    assert not output.exists()
