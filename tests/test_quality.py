"""Segments that the predicted LSDs contradict, without ground truth."""

import csv
import json
import shutil

import numpy as np
import pytest

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import data_folder, output_path, quality_path
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.records import Record
from lsdseg.data_utils.volumes import open_array, read, write_array
from lsdseg.engine.evaluate import quality as module
from lsdseg.engine.evaluate.quality import Cubes, _boxes, center_distance, quality, rank_segments, sum_in_cubes
from lsdseg.engine.evaluate.splits import Touching, find_touching, joined, rank_splits
from lsdseg.engine.post.affinities import voxel_pairs
from lsdseg.engine.training.lsd import local_shape_descriptors
from lsdseg.errors import UserError

SHAPE, PLACED = (40, 60, 64), {"voxel_size": (10, 10, 10), "offset": (200, -100, 40)}
SEGMENTATION = "volumes/segmentation_050"


def merge(labels):
    """Merge the two labels that touch along the most voxels. Returns new labels, the id, and where they touch."""
    pairs = np.concatenate([np.stack([a.ravel(), b.ravel()]) for a, b in ((labels[1:], labels[:-1]),)], axis=1)
    pairs = np.sort(pairs[:, pairs[0] != pairs[1]], axis=0)
    found, counts = np.unique(pairs, axis=1, return_counts=True)
    low, high = found[:, counts.argmax()]
    touching = ((labels[1:] == low) & (labels[:-1] == high)) | ((labels[1:] == high) & (labels[:-1] == low))
    return np.where(labels == high, low, labels), int(low), np.argwhere(touching)


@pytest.fixture
def home(tmp_path):
    """An output whose LSDs are those of the true labels, and whose segmentation has one merge."""
    cfg = load_config(overrides=settings(tmp_path))
    raw, labels, _ = make_phantom(SHAPE, seed=3)
    volume = data_folder(cfg, "test") / "sample.zarr"
    output = output_path(cfg, volume)
    write_array(volume, "volumes/raw", raw, **PLACED)
    merged, wrong, touching = merge(labels)
    write_array(output, SEGMENTATION, merged, **PLACED)
    write_array(output, "volumes/pred_affs", affinities_of(labels), attributes={"offsets": OFFSETS}, **PLACED)
    lsds = np.pad(labels, 25, mode="reflect")
    lsds = local_shape_descriptors(lsds, cfg.MODEL.LSD_SIGMA, (10, 10, 10))[:, 25:-25, 25:-25, 25:-25]
    noise = np.random.default_rng(0).normal(0, 0.02, lsds.shape)
    write_array(output, "volumes/pred_lsds", np.rint(255 * (lsds + noise).clip(0, 1)).astype(np.uint8), **PLACED)
    return cfg, output, wrong, touching


OFFSETS = [[0, -1, 0], [-1, 0, 0], [-3, 0, 0], [0, 0, -1]]


def affinities_of(labels):
    """Affinities (uint8) of labels in the order of OFFSETS."""
    affinities = np.full((len(OFFSETS), *labels.shape), 255, np.uint8)
    for channel, step in zip(affinities, OFFSETS, strict=True):
        here, there = voxel_pairs(labels.shape, step)
        channel[here] = 255 * (labels[here] == labels[there])
    return affinities


def split(labels):
    """Cut the largest label in two in the middle of the volume. Returns new labels, and both ids."""
    ids, counts = np.unique(labels, return_counts=True)
    own = labels == ids[counts.argmax()]
    own[: np.argwhere(own)[:, 0].astype(int).mean().round().astype(int)] = False
    return np.where(own, ids.max() + 1, labels), [int(ids[counts.argmax()]), int(ids.max()) + 1]


def settings(home):
    return ["DATA.HOME", str(home), "TRAIN.CHECKPOINT", str(home / "run" / "model_checkpoint_1")]


def read_report(output):
    report = json.loads(quality_path(output).read_text())
    with open(quality_path(output, ".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["segment"]) for row in rows] == [row["segment"] for row in report["segments"]]
    return report


def test_a_merge_comes_first_and_its_place_is_where_it_is(home, capsys):
    cfg, output, wrong, touching = home
    quality(cfg)
    report = read_report(output)
    first, second, *_ = report["segments"]
    assert report["segmentation"] == SEGMENTATION
    assert first["segment"] == wrong
    assert first["doubt"] > 2 * second["doubt"]
    place = (np.array([first["z"], first["y"], first["x"]]) - PLACED["offset"]) / 10
    assert np.linalg.norm(touching - place, axis=1).min() < 12  # voxels; a cube has 10
    assert f"{wrong}  doubt" in capsys.readouterr().out


def without_none(row):
    return {key: value for key, value in row.items() if value is not None}


def test_blocks_change_nothing(home, monkeypatch):
    cfg, output, *_ = home
    quality(cfg)
    whole = read_report(output)
    monkeypatch.setattr(module, "BLOCK", 20)
    quality(cfg, "segmentation_050")
    blocks = read_report(output)
    assert blocks["mean_nm"] == pytest.approx(whole["mean_nm"], rel=1e-4)
    for ours, theirs in zip(blocks["segments"], whole["segments"], strict=True):
        assert without_none(ours) == pytest.approx(without_none(theirs), rel=1e-3, abs=1e-3)


def test_a_split_comes_first_and_its_place_is_at_the_cut(home, capsys):
    cfg, output, *_ = home
    cut, ids = split(read(open_array(output, SEGMENTATION)))
    write_array(output, SEGMENTATION, cut, **PLACED)
    quality(cfg)
    contacts = json.loads(quality_path(output).read_text())["splits"]
    first, second, *_ = contacts
    assert [first["segment"], first["other"]] == ids
    assert first["affinity"] > 0.9 > 0.1 > second["affinity"]
    at = (np.array([first[axis] for axis in "zyx"]) - PLACED["offset"]) / 10
    assert {cut[tuple(np.floor(at + d).astype(int))] for d in ([-0.1, 0, 0], [0.1, 0, 0])} == set(ids)
    assert f"{ids[0]} and {ids[1]}  affinity" in capsys.readouterr().out
    with open(quality_path(output, "_splits.csv"), newline="") as file:
        assert [int(row["other"]) for row in csv.DictReader(file)] == [row["other"] for row in contacts]


@pytest.mark.parametrize("size", [20, 64])
def test_contacts_are_those_of_a_loop(size):
    rng = np.random.default_rng(0)
    segments = np.kron(rng.integers(0, 5, (4, 6, 7)), np.ones((3, 2, 2))).astype(np.uint64)
    affinities = rng.integers(0, 256, (4, *segments.shape)).astype(np.float32) / 255
    unsure = rng.uniform(size=segments.shape).astype(np.float32)
    expected = {}
    for channel, step in zip(affinities, OFFSETS, strict=True):
        for place in np.argwhere(segments):
            there = place + step
            if np.abs(step).sum() == 1 and (there >= 0).all() and 0 != segments[*there] != segments[*place]:
                pair = tuple(sorted((int(segments[*place]), int(segments[*there]))))
                middle = tuple(((place + there) / 2 + 0.5) * [40, 10, 10] + [100, 0, -50])
                expected.setdefault(pair, []).append((channel[*place], middle, (unsure[*place], unsure[*there])))
    parts = []
    for slices in _boxes(segments.shape, (size // 4, size // 2, size // 4)):
        around, near = (
            np.pad(whole, 1)[tuple(slice(s.start, s.stop + 2) for s in slices)] for whole in (segments, unsure)
        )
        offset = [100 + 40 * slices[0].start, 10 * slices[1].start, -50 + 10 * slices[2].start]
        parts.append(
            find_touching(affinities[:, *slices], around, list(map(tuple, OFFSETS)), (40, 10, 10), offset, near)
        )
    found = joined(parts)
    assert list(map(tuple, found.pairs.tolist())) == sorted(expected)
    for pair, *columns in zip(found.pairs.tolist(), *found[1:], strict=True):
        values = expected[tuple(pair)]
        assert columns[0] == len(values)
        assert columns[1] == pytest.approx(sum(float(value) for value, *_ in values))
        assert (columns[2], tuple(columns[3])) == max(values)[:2]
        assert columns[4] == pytest.approx(sum(np.mean(ends) for *_, ends in values))


def test_lsds_of_the_segmentation_itself_leave_no_distance():
    _, labels, _ = make_phantom((60, 60, 60), seed=1)
    own = local_shape_descriptors(labels, 50, (10, 10, 10))
    inside = (slice(16, -16),) * 3
    apart = center_distance(labels, own[:, *inside], 50, (10, 10, 10), (16, 16, 16))
    assert np.abs(apart).max() < 1e-3
    own[0] -= 0.1
    apart = center_distance(labels, own[:, *inside], 50, (10, 10, 10), (16, 16, 16))
    assert apart == pytest.approx(np.full(apart.shape, 10), abs=1e-3)  # 0.1 times 2 sigma


def test_sections_are_described_one_by_one():
    _, labels, _ = make_phantom((3, 60, 60), seed=1)
    own = np.stack([local_shape_descriptors(section, 50, (10, 10)) for section in labels], axis=1)
    assert len(own) == 6
    apart = center_distance(labels, own[:, :, 16:-16, 16:-16], 50, (40, 10, 10), (0, 16, 16), boundary=1)
    assert np.isnan(apart).any()  # the boundary
    assert np.nanmax(np.abs(center_distance(labels, own[:, :, 16:-16, 16:-16], 50, (40, 10, 10), (0, 16, 16)))) < 1e-3


def test_sums_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    segments, distance = rng.integers(0, 4, (5, 6, 7)).astype(np.uint64), rng.uniform(0, 50, (5, 6, 7)).astype("f4")
    distance[rng.uniform(size=distance.shape) < 0.3] = np.nan
    unsure = rng.uniform(size=distance.shape).astype("f4")
    cubes = sum_in_cubes(distance, segments, (2, 3, 4), (40, 10, 10), (100, 0, -50), unsure)
    expected = {}
    for place in np.argwhere(np.isfinite(distance)):
        key = (int(segments[tuple(place)]), *(place // [2, 3, 4]).tolist())
        middle = (place + 0.5) * [40, 10, 10] + [100, 0, -50]
        expected.setdefault(key, []).append((*middle, distance[tuple(place)], unsure[tuple(place)]))
    places = map(tuple, cubes.places)
    found = sorted(zip(cubes.segments.tolist(), cubes.voxels.tolist(), cubes.sums, places, cubes.unsure, strict=True))
    wanted = []
    for (segment, *_), values in expected.items():
        place, sums = np.mean(values, axis=0)[:3], np.sum(values, axis=0)[3:]
        wanted.append((segment, len(values), sums[0], tuple(place), sums[1]))
    for ours, theirs in zip(found, sorted(wanted), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2])
        assert ours[3] == pytest.approx(theirs[3])
        assert ours[4] == pytest.approx(theirs[4])


def test_segments_that_touch_no_face_are_orphans(home):
    cfg, output, *_ = home
    labels = read(open_array(output, SEGMENTATION))
    labels[10:25, 20:40, 20:40] = 999
    write_array(output, SEGMENTATION, labels, **PLACED)
    quality(cfg)
    orphans = {row["segment"] for row in read_report(output)["segments"] if row["orphan"]}
    inside = np.ones(SHAPE, bool)
    inside[1:-1, 1:-1, 1:-1] = False
    assert orphans == set(np.unique(labels).tolist()) - set(np.unique(labels[inside]).tolist()) - {0}
    assert 999 in orphans


def test_two_bodies_that_a_neck_joins_are_seen(home):
    cfg, output, *_ = home
    labels = read(open_array(output, SEGMENTATION))
    z, y, x = np.indices(SHAPE)
    for middle in (16, 47):
        labels[(z - 20) ** 2 + (y - 30) ** 2 + (x - middle) ** 2 < 100] = 999
    labels[18:22, 28:32, 16:47] = 999
    write_array(output, SEGMENTATION, labels, **PLACED)
    quality(cfg)
    rows = {row["segment"]: row for row in read_report(output)["segments"]}
    assert rows[999]["neck"] > 3
    place = (np.array([rows[999][f"neck_{axis}"] for axis in "zyx"]) - PLACED["offset"]) / 10
    assert np.abs(place - [20, 30, 31.5]).max() < 8
    assert rows[999]["neck"] == max(row["neck"] for row in rows.values())
    assert all((row["neck"] == 1) == (row["neck_z"] is None) for row in rows.values())


def test_ranking_by_hand():
    ids = np.array([7, 7, 9, 9, 5], np.uint64)
    voxels, sums = np.array([100, 100, 100, 100, 1]), np.array([1000.0, 1000, 1000, 5000, 900])
    places = np.arange(15.0).reshape(5, 3)
    unsure = np.array([10.0, 20, 30, 40, 1])
    doubts, mean = rank_segments(Cubes(ids, voxels, sums, places, unsure), 100, (10, 10, 10))
    assert mean == pytest.approx(8900 / 401)
    assert [doubt.segment for doubt in doubts] == [9, 7, 5]
    assert doubts[0].doubt == pytest.approx((50 - 1.5 * mean) * 100 * 1e-6)
    assert (doubts[0].worst_nm, doubts[0].mean_nm, doubts[0].voxels) == (50, 30, 200)
    assert (doubts[0].z, doubts[0].y, doubts[0].x) == (9, 10, 11)
    assert [doubt.disagreement for doubt in doubts] == [70 / 200, 30 / 200, 1]
    assert doubts[2].doubt == 0  # it fills too little of its cube
    doubts, _ = rank_segments(Cubes(ids, voxels, sums, places, unsure * np.nan), 100, (10, 10, 10))
    assert [doubt.disagreement for doubt in doubts] == [None] * 3


def test_contacts_on_which_views_disagree_come_later():
    pairs = np.array([[1, 2], [1, 3], [2, 3]], np.uint64)
    faces, sums, unsure = np.array([10, 10, 10]), np.array([5.0, 6, 2]), np.array([1.0, 5, 0])
    touching = Touching(pairs, faces, sums, np.full(3, 0.9, "f4"), np.zeros((3, 3)), unsure)
    splits = rank_splits(touching, {1: 50, 2: 60, 3: 70}, 10)
    assert [(split.segment, split.other, split.disagreement) for split in splits] == [
        (1, 2, 0.1),
        (1, 3, 0.5),
        (2, 3, 0),
    ]
    splits = rank_splits(touching._replace(unsure=unsure * np.nan), {1: 50, 2: 60, 3: 70}, 10)
    assert [(split.segment, split.other, split.disagreement) for split in splits] == [
        (1, 3, None),
        (1, 2, None),
        (2, 3, None),
    ]


def test_disagreement_of_views_is_used_if_it_is_of_this_prediction(home, capsys):
    cfg, output, *_ = home
    labels, made, other = read(open_array(output, SEGMENTATION)), Record("prediction", {}, {}), Record("p", {}, {})
    predicted = {"attributes": {"offsets": OFFSETS} | made.attributes, **PLACED}
    write_array(output, "volumes/pred_affs", affinities_of(labels), **predicted)
    unsure = np.where(labels == labels[20, 30, 30], 51, 204).astype(np.uint8)[None]
    for record, known in ((made, True), (other, False)):
        write_array(output, "volumes/pred_disagreement", unsure, attributes=record.attributes, **PLACED)
        quality(cfg)
        report = read_report(output)
        for row in report["segments"]:
            inside = 0.2 if row["segment"] == labels[20, 30, 30] else 0.8
            assert row["disagreement"] == (pytest.approx(inside) if known else None)
        for row in report["splits"]:
            across = 0.5 if labels[20, 30, 30] in (row["segment"], row["other"]) else 0.8
            assert row["disagreement"] == (pytest.approx(across) if known else None)
        assert ("warning: volumes/pred_disagreement" in capsys.readouterr().out) != known


def test_bad_input(home):
    cfg, output, *_ = home
    with pytest.raises(UserError, match=r"there is no segmentation_99 in .*choose from volumes/segmentation_050"):
        quality(cfg, "segmentation_99")
    write_array(output, "volumes/segmentation_060", np.ones((8, 8, 8), np.uint64), **PLACED)
    with pytest.raises(UserError, match=r"segmentation_060 has shape \(8, 8, 8\) .*predict and segment"):
        quality(cfg, "segmentation_060")
    shutil.rmtree(output / "volumes" / "pred_lsds")
    with pytest.raises(UserError, match=r"no dataset volumes/pred_lsds"):
        quality(cfg)
    assert not quality_path(output).exists()
