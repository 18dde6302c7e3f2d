import subprocess
import sys
from pathlib import Path

import cc3d
import fastremap
import numpy as np
import pytest
from skimage.exposure import equalize_adapthist, match_histograms

from lsdseg.data_utils import preprocess
from lsdseg.data_utils import process as process_module
from lsdseg.data_utils.clahe import clahe
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.process import process_zarr
from lsdseg.data_utils.records import record_of
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "data_utils" / "process.py"
SHAPE, VOXEL_SIZE, OFFSET = (70, 75, 140), (40, 4, 8), (80, 400, -16)
RNG = np.random.default_rng(0)
WAVES = np.sin(np.indices(SHAPE) / np.array([9, 17, 23])[:, None, None, None]).sum(axis=0)
GRAY = (110 + 25 * WAVES + RNG.normal(0, 6, SHAPE)).astype(np.uint8)
IDS = (RNG.random(SHAPE) < 0.25) * RNG.integers(1, 3, SHAPE).astype(np.uint64)
IDS[3, :5] = 2**64 - 3  # nobody labeled these


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of one chunk: two or three along every axis."""
    for module in (process_module, preprocess):
        monkeypatch.setattr(module, "SLAB_BYTES", 1)


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "in.zarr"
    write_array(path, RAW, GRAY, voxel_size=VOXEL_SIZE, offset=OFFSET, attributes={"microscope": "FIB"})
    write_array(path, LABELS, IDS, voxel_size=VOXEL_SIZE, offset=OFFSET)
    return path


def run(operation, sample, dataset, **options):
    target = sample.with_name("out.zarr")
    process_zarr(operation, sample, target, dataset=dataset, overwrite=False, **options)
    changed = open_array(target, dataset)
    assert record_of(changed).step == f"data_utils/process.py {operation}"
    return changed


@pytest.mark.parametrize("tile", [(1, 32, 40), (20, 20, 20), (500, 500, 500)])
def test_clahe_in_blocks_is_clahe_in_one_piece(sample, tile):
    changed = run("clahe", sample, RAW, tile=tile, limit=0.02)
    np.testing.assert_array_equal(read(changed), clahe(GRAY, (0, 255), tile, 0.02))
    assert (tuple(changed.offset), changed.attrs["microscope"]) == (OFFSET, "FIB")
    np.testing.assert_array_equal(read(open_array(sample.with_name("out.zarr"), LABELS)), IDS)


def test_clahe_is_nearly_that_of_scikit_image():
    section = GRAY[0, :64, :128].copy()
    section[0, :2] = 0, 255  # scikit-image stretches to these
    ours = clahe(section[None], (0, 255), (1, 32, 32), 0.02)[0].astype(float)
    theirs = equalize_adapthist(section, kernel_size=32, clip_limit=0.02) * 255
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98
    assert ours.std() > 1.2 * section.std()


def test_clahe_of_floats_and_uint16_keeps_type_and_window():
    for values, window in ((GRAY / np.float32(255), (0, 1)), (GRAY.astype(np.uint16) * 100, (3000, 20000))):
        changed = clahe(values, window, (1, 32, 32), 0.02)
        assert changed.dtype == values.dtype
        assert window[0] <= changed.min() < changed.max() <= window[1]


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint32])
def test_matching_takes_whole_volume_histograms_of_any_integers(sample, dtype):
    wanted = RNG.integers(3, 30_000, (20, 30, 30)).astype(dtype)
    reference = sample.with_name("reference.zarr")
    write_array(reference, RAW, wanted, voxel_size=VOXEL_SIZE, offset=OFFSET)
    changed = run("match", sample, RAW, reference=reference, reference_dataset=RAW)
    expected = match_histograms(GRAY.ravel(), wanted.ravel()).reshape(SHAPE)
    np.testing.assert_array_equal(read(changed), np.rint(expected).astype(dtype))


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_components_are_exact_across_blocks(sample, connectivity):
    changed = read(run("components", sample, LABELS, connectivity=connectivity))
    unlabeled = IDS == 2**64 - 3
    np.testing.assert_array_equal(changed == 2**64 - 3, unlabeled)
    whole, count = cc3d.connected_components(np.where(unlabeled, 0, IDS), connectivity=connectivity, return_N=True)
    ours = np.where(unlabeled, 0, changed)
    assert ours.max() == count
    in_order = fastremap.renumber(whole.ravel(), preserve_zero=True)[0].reshape(SHAPE)
    np.testing.assert_array_equal(ours, in_order)


def test_a_component_that_winds_through_all_blocks_is_one(sample):
    labels = np.zeros(SHAPE, np.uint64)
    labels[::2], labels[1::4, :, 0], labels[3::4, :, -1] = 7, 7, 7
    write_array(sample, LABELS, labels, voxel_size=VOXEL_SIZE, offset=OFFSET)
    np.testing.assert_array_equal(read(run("components", sample, LABELS, connectivity=6)), labels // 7)


def test_small_labels_are_counted_in_the_whole_volume(sample):
    labels = np.zeros(SHAPE, np.uint64)
    labels[62:66, 63:65, 10], labels[0, 0, :7], labels[5] = 1, 2, 2**64 - 3
    labels[6, 0, 0] = 2**64 - 2
    write_array(sample, LABELS, labels, voxel_size=VOXEL_SIZE, offset=OFFSET)
    np.testing.assert_array_equal(
        read(run("remove-small", sample, LABELS, voxels=8)), np.where(labels == 2, np.uint64(0), labels)
    )


def test_labels_are_merged(sample):
    changed = run("merge", sample, LABELS, ids=[2, 5], into=1)
    np.testing.assert_array_equal(read(changed), np.where(IDS == 2, np.uint64(1), IDS))


@pytest.mark.parametrize("mode", ["reflect", "edge", "constant"])
def test_padding_in_blocks_is_that_of_numpy(sample, mode):
    changed = run("pad", sample, RAW, by=(90, 3, 0), mode=mode)
    np.testing.assert_array_equal(read(changed), np.pad(GRAY, ((90, 90), (3, 3), (0, 0)), mode=mode))
    assert tuple(changed.offset) == (80 - 90 * 40, 400 - 12, -16)


@pytest.mark.parametrize("with_mask", [True, False])
def test_crop_keeps_the_labeled_box_and_context_of_raw(sample, with_mask):
    labeled = np.zeros(SHAPE, np.uint8)
    labeled[60:67, 10:20, 130:135] = 1
    if with_mask:
        write_array(sample, LABELS_MASK, labeled, voxel_size=VOXEL_SIZE, offset=OFFSET)
    else:
        write_array(sample, LABELS, labeled * np.uint64(5), voxel_size=VOXEL_SIZE, offset=OFFSET)
    changed = run("crop", sample, LABELS, raw=RAW, mask=LABELS_MASK, context=(2, 4, 20))
    source = read(open_array(sample, LABELS))
    np.testing.assert_array_equal(read(changed), source[60:67, 10:20, 130:135])
    raw = open_array(sample.with_name("out.zarr"), RAW)
    np.testing.assert_array_equal(read(raw), GRAY[58:69, 6:24, 110:])
    assert tuple(raw.offset) == (80 + 58 * 40, 400 + 24, -16 + 880)
    assert list_arrays(sample.with_name("out.zarr")) == sorted([RAW, LABELS] + [LABELS_MASK] * with_mask)


def test_what_does_not_suit_an_operation_is_refused_before_anything_is_written(sample):
    write_array(sample, "volumes/signed", -IDS.astype(np.int64), voxel_size=VOXEL_SIZE, offset=OFFSET)
    write_array(sample, "volumes/stack/0", GRAY[0], voxel_size=(4, 8), offset=(0, 0))
    for operation, dataset, options, message in (
        ("clahe", LABELS, {"tile": (1, 9, 9), "limit": 0.1}, "is uint64, which is not raw"),
        ("match", LABELS, {"reference": sample.with_name("r.zarr"), "reference_dataset": RAW}, "r.zarr does not exist"),
        ("merge", RAW, {"ids": [1], "into": 300}, "uint8, which has no id above 255"),
        ("components", "volumes/no", {"connectivity": 6}, "no dataset volumes/no"),
        ("components", "volumes/signed", {"connectivity": 6}, "is int64, but labels are unsigned"),
        ("pad", "volumes/stack", {"by": (1, 1, 1), "mode": "edge"}, "is not one array of a zarr"),
    ):
        with pytest.raises(UserError, match=message):
            run(operation, sample, dataset, **options)
    empty = np.zeros(SHAPE, np.uint8)
    write_array(sample, LABELS_MASK, empty, voxel_size=VOXEL_SIZE, offset=OFFSET)
    with pytest.raises(UserError, match="no labeled voxel"):
        run("crop", sample, LABELS, raw=RAW, mask=LABELS_MASK, context=(1, 1, 1))
    assert sorted(path.name for path in sample.parent.iterdir()) == ["in.zarr"]


def test_the_script_ends_with_one_line_after_a_mistake(sample):
    def script(*arguments):
        return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)

    for arguments, message in (
        (["pad", sample, sample, "--by", "1", "1", "1"], "is an input"),
        (["pad", sample, "o.zarr", "--by", "1", "1", "-1"], "must be"),
        (["blur", sample, "o.zarr"], "invalid choice"),
    ):
        failed = script(*arguments)
        assert (failed.returncode, len(failed.stderr.splitlines())) == (2, 1), failed.stderr
        assert message in failed.stderr
    done = script("components", sample, sample.with_name("out.zarr"))
    assert (done.returncode, "volumes/labels/neuron_ids uint64" in done.stdout) == (0, True), done.stderr
