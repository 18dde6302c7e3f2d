import csv
import json

import h5py
import numpy as np
import pytest
from skimage.metrics import adapted_rand_error, variation_of_information

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import output_path, scores_path
from lsdseg.data_utils.stored import read_header
from lsdseg.data_utils.volumes import seal_array, write_array
from lsdseg.engine.evaluate.evaluate import evaluate, overlaps
from lsdseg.engine.evaluate.metrics import connected_parts, count_overlaps, scores, without_boundary
from lsdseg.errors import UserError

PLACE = {"voxel_size": (10, 10, 10), "offset": (0, 0, 0)}


def assert_equals_scikit_image(result, ground_truth, segmentation):
    _, segmentation = np.unique(segmentation, return_inverse=True)
    _, truth = np.unique(np.append(0, ground_truth), return_inverse=True)  # 0 stays 0
    truth = truth[1:].reshape(ground_truth.shape)
    split, merge = variation_of_information(truth, segmentation, ignore_labels=(0,))
    error, _, _ = adapted_rand_error(truth, segmentation, ignore_labels=(0,))
    assert result["voi_split"] == pytest.approx(split, abs=1e-9)
    assert result["voi_merge"] == pytest.approx(merge, abs=1e-9)
    assert result["voi_sum"] == pytest.approx(split + merge, abs=1e-9)
    assert result["adapted_rand_error"] == pytest.approx(error, abs=1e-9)


@pytest.fixture(scope="module")
def real(data_dir):
    """A segmentation and its ground truth. The segmentation is shifted, with a merge, a split and some background."""
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        truth = file["volumes/labels/neuron_ids"][:40, :60, :70]
    truth[5:9, 5:20, 5:20] = 0
    segmentation = np.roll(truth, 3, axis=2)
    largest = np.argsort(np.bincount(segmentation.ravel().astype(np.int64)))[::-1]
    segmentation[segmentation == largest[1]] = largest[2]
    segmentation[:20][segmentation[:20] == largest[0]] = 2**63 + 5
    segmentation[:, 30] = 0
    return segmentation, truth


def test_scores_of_random_labels_equal_scikit_image():
    random = np.random.default_rng(0)
    segmentation, truth = random.integers(0, 9, (2, 10, 20, 30), dtype=np.uint64)
    assert_equals_scikit_image(scores(*count_overlaps([(segmentation, truth)])), truth, segmentation)


def test_scores_of_real_labels_equal_scikit_image(real):
    segmentation, truth = real
    result = scores(*count_overlaps([(segmentation, truth)]))
    assert_equals_scikit_image(result, truth, segmentation)
    assert result["voi_sum"] > 0.1
    assert result["objects"] == len(np.unique(truth)) - 1
    assert result["segments"] == len(np.unique(segmentation[truth > 0]))
    assert result["voxels"] == np.count_nonzero(truth)


def test_split_and_merge_are_told_apart():
    whole, halves = np.ones((2, 8), np.uint64), np.repeat([[1], [2]], 8, axis=1).astype(np.uint64)
    split = scores(*count_overlaps([(halves, whole)]))
    assert (split["voi_split"], split["voi_merge"]) == (1, 0)
    merge = scores(*count_overlaps([(whole, halves)]))
    assert (merge["voi_split"], merge["voi_merge"]) == (0, 1)
    perfect = scores(*count_overlaps([(halves + np.uint64(7), halves)]))
    assert (perfect["voi_sum"], perfect["adapted_rand_error"]) == (0, 0)


def test_background_alone_has_no_score():
    with pytest.raises(ValueError, match="no voxel"):
        scores(*count_overlaps([(np.ones((2, 2), np.uint64), np.zeros((2, 2), np.uint64))]))


def test_slab_size_does_not_matter(real, tmp_path):
    segmentation, truth = real
    on_disk = [
        write_array(tmp_path / "a.zarr", name, data, **PLACE)
        for name, data in (
            ("segmentation", np.tile(segmentation, (2, 2, 2))),
            ("truth", np.tile(truth, (2, 2, 2))),
        )
    ]
    few, many = (list(overlaps(*on_disk, max_bytes=size)) for size in (2**30, 1))
    assert len(few) == 1
    assert len(many) == 12
    pairs, counts = count_overlaps(few)
    pairs_of_many, counts_of_many = count_overlaps(many)
    assert (pairs == pairs_of_many).all()
    assert (counts == counts_of_many).all()


def test_only_the_common_roi_is_compared(real, tmp_path):
    segmentation, truth = real
    a = write_array(tmp_path / "a.zarr", "s", segmentation, voxel_size=(10, 10, 10), offset=(100, 0, -50))
    b = write_array(tmp_path / "a.zarr", "t", truth, voxel_size=(10, 10, 10), offset=(0, 30, 0))
    result = scores(*count_overlaps(overlaps(a, b)))
    assert_equals_scikit_image(result, truth[10:, :57, :65], segmentation[:30, 3:, 5:])


def test_voxels_that_do_not_coincide_are_refused(tmp_path):
    labels = np.ones((4, 4, 4), np.uint64)
    a = write_array(tmp_path / "a.zarr", "a", labels, **PLACE)
    for name, voxel_size, offset in (("b", (10, 10, 5), (0, 0, 0)), ("c", (10, 10, 10), (0, 5, 0))):
        other = write_array(tmp_path / "a.zarr", name, labels, voxel_size=voxel_size, offset=offset)
        with pytest.raises(ValueError, match="voxel"):
            list(overlaps(a, other))


@pytest.fixture
def config(tmp_path):
    """A config, the zarr of its test volume (with raw only), and the zarr of its output."""
    sample = tmp_path / "data" / "FIB25" / "data_3d" / "test" / "sample.zarr"
    write_array(sample, "volumes/raw", np.zeros((40, 60, 70), np.uint8), **PLACE)
    overrides = {
        "DATA.HOME": tmp_path,
        "DATA.DATA_DIR_PATH": "data",
        "DATA.BRAIN_VOL": "FIB25",
        "TRAIN.CHECKPOINT": tmp_path / "run" / "model_checkpoint_1",
    }
    cfg = load_config(None, [str(x) for pair in overrides.items() for x in pair])
    return cfg, sample, output_path(cfg, sample)


def test_scores_are_written_beside_the_output(config, real, capsys):
    cfg, sample, output = config
    segmentation, truth = real
    mask = np.ones(truth.shape, np.uint8)
    mask[30:] = 0
    write_array(sample, cfg.DATA.NEURON_LABELS, truth, **PLACE)
    write_array(sample, cfg.DATA.NEURON_LABELS_MASK, mask, **PLACE)
    labels = {"method": "waterz", "threshold": 0.5, "merge_function": "mean"}
    write_array(output, "volumes/segmentation_050", segmentation, **PLACE, attributes=labels)
    write_array(output, "volumes/final_segmentation_mean_060", np.ones_like(truth), **PLACE)
    labels = {"method": "mutex", "biases": [-0.5] * 9}
    write_array(output, "volumes/segmentation_mutex", np.roll(truth, 1, axis=1), **PLACE, attributes=labels)
    labels = {"method": "mutex", "merge_function": "mutex", "threshold": 0.5}
    write_array(output, "volumes/final_segmentation_mutex_050", segmentation, **PLACE, attributes=labels)
    write_array(output, "volumes/segmentation_mutex.partial", truth, **PLACE)
    write_array(output, "volumes/fragments", truth, **PLACE)
    write_array(output, "volumes/segmentation_060.partial", truth, **PLACE)
    evaluate(cfg)

    report = json.loads((output.parent / "sample_scores.json").read_text())
    rows = {row["dataset"]: row for row in report["scores"]}
    assert list(rows) == [
        "volumes/fragments",
        "volumes/final_segmentation_mean_060",
        "volumes/final_segmentation_mutex_050",
        "volumes/segmentation_050",
        "volumes/segmentation_mutex",
    ]
    # Here the fragments are perfect, but they are no segmentation.
    assert rows["volumes/fragments"]["voi_sum"] == 0
    assert report["best"] == min(list(rows)[1:], key=lambda name: rows[name]["voi_sum"])
    assert report["voxels"] == np.count_nonzero(truth[:30])
    assert_equals_scikit_image(rows["volumes/segmentation_050"], truth[:30], segmentation[:30])
    assert rows["volumes/final_segmentation_mean_060"]["voi_split"] == 0
    with open(output.parent / "sample_scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["dataset"] for row in table] == list(rows)
    assert float(table[3]["voi_sum"]) == rows["volumes/segmentation_050"]["voi_sum"]
    columns = [(row["method"], row["merge_function"], row["threshold"]) for row in table]
    assert columns[2:] == [("mutex", "mutex", "0.5"), ("waterz", "mean", "0.5"), ("mutex", "", "")]
    assert (output.parent / "sample_scores.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert not list(output.parent.glob("*.partial"))


@pytest.mark.parametrize("max_bytes", [2**27, 2**15])
def test_sections_that_are_not_linked_are_scored_one_by_one(config, real, max_bytes, monkeypatch):
    cfg, sample, _ = config
    segmentation, truth = real
    cfg.defrost()
    cfg.DATA.DIM_2D = True
    output = output_path(cfg, sample)
    monkeypatch.setattr(overlaps, "__kwdefaults__", overlaps.__kwdefaults__ | {"max_bytes": max_bytes})
    write_array(sample, cfg.DATA.NEURON_LABELS, truth, **PLACE)
    write_array(output, "volumes/segmentation_050", segmentation, **PLACE)
    evaluate(cfg)
    report = json.loads(scores_path(output).read_text())
    assert report["by_section"]
    (row,) = report["scores"]
    sections = [scores(*count_overlaps([pair])) for pair in zip(segmentation, truth, strict=True)]
    assert report["objects"] == sum(section["objects"] for section in sections)
    for score in ("voi_split", "voi_merge", "voi_sum"):
        mean = np.average([s[score] for s in sections], weights=[s["voxels"] for s in sections])
        assert row[score] == pytest.approx(mean, abs=1e-9)

    cfg.INS_SEGMENT.LINK_SECTIONS = 0.5
    evaluate(cfg)
    (linked,) = json.loads(scores_path(output).read_text())["scores"]
    assert_equals_scikit_image(linked, truth, segmentation)
    assert linked["voi_sum"] != pytest.approx(row["voi_sum"], abs=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.int32])
@pytest.mark.parametrize("odd", ["truth", "segmentation"])
def test_labels_that_are_no_unsigned_integers_are_not_scored(config, dtype, odd):
    cfg, sample, output = config
    labels = np.arange(24).reshape(2, 3, 4)
    arrays = {"truth": labels.astype(np.uint64), "segmentation": labels.astype(np.uint64)}
    arrays[odd] = labels.astype(dtype)
    write_array(sample, cfg.DATA.NEURON_LABELS, arrays["truth"], **PLACE)
    write_array(output, "volumes/segmentation_050", arrays["segmentation"], **PLACE)
    with pytest.raises(UserError, match=f"is {np.dtype(dtype)}: store labels as unsigned integers"):
        evaluate(cfg)
    assert not scores_path(output).exists()


def test_a_segmentation_with_lost_chunks_is_not_scored(config, real):
    cfg, sample, output = config
    write_array(sample, cfg.DATA.NEURON_LABELS, real[1], **PLACE)
    write_array(output, "volumes/segmentation_050", real[1], **PLACE)
    seal_array(output, "volumes/segmentation_050")
    read_header(output / "volumes/segmentation_050").chunk_file((0, 0, 0)).unlink()
    with pytest.raises(UserError, match=r"1 of .* chunks of volumes/segmentation_050 in .* are missing"):
        evaluate(cfg)


def test_without_ground_truth_or_segmentation_nothing_is_scored(config, real, capsys):
    cfg, sample, output = config
    with pytest.raises(UserError, match="neuron_ids"):
        evaluate(cfg)
    assert "sample.zarr is left out" in capsys.readouterr().out
    write_array(sample, cfg.DATA.NEURON_LABELS, real[1], **PLACE)
    with pytest.raises(UserError, match=r"instance_segmenter\.py"):
        evaluate(cfg)
    assert not output.exists()


def test_boundary_is_one_voxel_on_either_side_of_where_objects_touch():
    truth = np.array([[[0, 1, 1, 1, 2, 2, 2, 0, 3]]], np.uint64)
    assert without_boundary(truth).tolist() == [[[0, 1, 1, 0, 0, 2, 2, 0, 3]]]
    stack = np.array([[[1, 1]], [[2, 2]]], np.uint64)
    assert not without_boundary(stack).any()
    assert (without_boundary(stack, by_section=True) == stack).all()


def test_parts_that_do_not_hang_together_become_objects():
    truth = np.array([[[5, 5, 0, 5, 7, 7, 5]]], np.uint64)
    assert len(np.unique(connected_parts(truth))) == 5  # background, three parts of 5, and 7
    column = np.full((3, 1, 2), 2**63, np.uint64)
    assert len(np.unique(connected_parts(column))) == 1
    assert len(np.unique(connected_parts(column, by_section=True))) == 3


def test_variants_forgive_boundaries_and_what_the_crop_cannot_show(config):
    cfg, sample, output = config
    truth = np.ones((4, 6, 12), np.uint64)
    truth[:, :, 4:8] = 2  # object 1 lies in the crop in two parts
    segmentation = np.repeat([1, 2, 3], 4).astype(np.uint64) * np.ones_like(truth)
    segmentation[:, :, 4] = 1  # a voxel off
    write_array(sample, cfg.DATA.NEURON_LABELS, truth, **PLACE)
    write_array(output, "volumes/segmentation_050", segmentation, **PLACE)
    evaluate(cfg)
    (row,) = json.loads(scores_path(output).read_text())["scores"]
    assert row["voi_merge"] > 0
    assert row["voi_merge_without_boundary"] == 0
    assert 0 < row["voi_split_connected"] < row["voi_split"]
    assert (row["segments_without_boundary"], row["voi_split_without_boundary"] > 0) == (3, True)
