import os
import subprocess
import sys
from pathlib import Path

import cc3d
import edt
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import variation_of_information

from lsdseg.data_utils.phantom import make_phantom, write_phantom
from lsdseg.data_utils.volumes import list_arrays, open_array, read
from lsdseg.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "data_utils" / "phantom.py"


@pytest.fixture(scope="module")
def phantom():
    return make_phantom((64, 72, 80), seed=5)


def test_types_and_shapes(phantom):
    for array, dtype in zip(phantom, (np.uint8, np.uint64, np.uint64), strict=True):
        assert array.shape == (64, 72, 80)
        assert array.dtype == dtype


def test_labels_are_dense_and_each_is_one_piece(phantom):
    _, labels, _ = phantom
    ids = np.unique(labels)
    assert np.array_equal(ids, np.arange(1, len(ids) + 1))
    assert len(ids) > 10
    assert cc3d.connected_components(labels, connectivity=6).max() == len(ids)
    assert np.bincount(labels.ravel()).max() < 0.5 * labels.size


def test_same_seed_gives_the_same_volume_on_one_cpu(phantom, tmp_path):
    """Written by a process that may use one CPU only: threads must not matter."""
    out = tmp_path / "one_cpu.zarr"
    one_cpu = {"preexec_fn": lambda: os.sched_setaffinity(0, {0})} if hasattr(os, "sched_setaffinity") else {}
    command = [sys.executable, SCRIPT, out, "--shape", "64", "72", "80", "--seed", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **one_cpu)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    for name, expected in zip(("raw", "labels/neuron_ids", "labels/mito_ids"), phantom, strict=True):
        assert np.array_equal(read(open_array(out, f"volumes/{name}")), expected)


def test_other_seed_gives_other_tissue():
    first, second = (make_phantom((24, 32, 32), seed=seed) for seed in (0, 1))
    assert sum(variation_of_information(first[1], second[1])) > 1
    assert (first[0] != second[0]).mean() > 0.9


def test_voxel_size_samples_the_same_tissue():
    """A section of 30 nm is three thin ones: its labels are those of the middle one."""
    _, fine, _ = make_phantom((36, 40, 40), seed=1)
    raw, coarse, _ = make_phantom((12, 40, 40), seed=1, voxel_size=(30, 10, 10))
    assert sum(variation_of_information(fine[1::3], coarse)) < 0.05
    assert sum(variation_of_information(fine[:12], coarse)) > 0.5
    assert raw.shape == coarse.shape
    sections = raw.reshape(12, -1).mean(axis=1)
    assert np.abs(np.diff(sections)).mean() > 2  # brightness varies from section to section


def test_mitochondria_lie_inside_neurites_and_are_darker(phantom):
    raw, labels, mito_ids = phantom
    assert mito_ids.max() >= 3
    depth = edt.edt(labels, anisotropy=(10, 10, 10))
    assert depth[mito_ids > 0].min() > 20
    for mito in range(1, int(mito_ids.max()) + 1):
        assert len(np.unique(labels[mito_ids == mito])) == 1
    cytoplasm = (mito_ids == 0) & (depth > 40)
    assert raw[mito_ids > 0].mean() < raw[cytoplasm].mean() - 20


def test_membranes_are_darker_than_the_cytoplasm_beside_them(phantom):
    """In every neurite by itself: some are dark throughout, so no threshold would do."""
    raw, labels, mito_ids = phantom
    depth = edt.edt(labels, anisotropy=(10, 10, 10))
    contrasts = []
    for neurite in range(1, int(labels.max()) + 1):
        inside = (labels == neurite) & (mito_ids == 0)
        if (inside & (depth > 40)).sum() > 200:
            contrasts.append(raw[inside & (depth > 40)].mean() - raw[inside & (depth <= 10)].mean())
    assert len(contrasts) > 5
    assert min(contrasts) > 8
    assert np.median(contrasts) > 25


def test_thresholding_does_not_segment_it(phantom):
    raw, labels, _ = phantom
    smooth = gaussian_filter(raw.astype(np.float32), 1)
    scores = [
        sum(variation_of_information(labels, cc3d.connected_components(smooth > level, connectivity=6)))
        for level in range(90, 160, 10)
    ]
    assert min(scores) > 2


def test_written_zarr_has_the_layout(tmp_path):
    path = tmp_path / "sample.zarr"
    write_phantom(path, (8, 16, 16), seed=0, voxel_size=(40, 4, 4), offset=(80, 8, 8))
    expected = [
        "volumes/labels/labels_mask",
        "volumes/labels/mito_ids",
        "volumes/labels/neuron_ids",
        "volumes/raw",
    ]
    assert list_arrays(path) == expected
    for dataset in expected:
        array = open_array(path, dataset)
        assert tuple(array.voxel_size) == (40, 4, 4)
        assert tuple(array.roi.offset) == (80, 8, 8)
        assert tuple(array.shape) == (8, 16, 16)
    assert read(open_array(path, "volumes/labels/labels_mask")).all()


@pytest.mark.parametrize(
    ("name", "shape", "voxel_size", "reason"),
    [
        ("a.zarr", (0, 16, 16), (10, 10, 10), "shape"),
        ("a.zarr", (16, 16), (10, 10, 10), "shape"),
        ("a.zarr", (16, 16, 16), (10, -10, 10), "voxel size"),
        ("a.hdf", (16, 16, 16), (10, 10, 10), r"\.zarr"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, name, shape, voxel_size, reason):
    with pytest.raises(UserError, match=reason):
        write_phantom(tmp_path / name, shape, seed=0, voxel_size=voxel_size)
    assert not list(tmp_path.iterdir())


def test_command_line_reports_bad_input_in_one_line(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "a.zarr", "--shape", "16", "0", "16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "shape" in done.stderr
