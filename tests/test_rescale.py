import subprocess
import sys

import numpy as np
import pytest
import torch

from data_utils import rescale as rescale_script
from lsdseg.data_utils import rescale as rescale_module
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.rescale import interpolation_weights, rescale
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.errors import UserError

SHAPE = (21, 30, 26)
OFFSET = (70, -30, 16)


def smooth(centers):
    """A wave in the world (nm) that every voxel size here can show."""
    z, y, x = (np.sin(2 * np.pi * c / length) for c, length in zip(centers, (400, 500, 450), strict=True))
    return 0.5 + (z[:, None, None] + y[:, None] + x) / 6


def world(array):
    """Centers of an array's voxels along each axis in nm."""
    return [o + (np.arange(n) + 0.5) * v for o, n, v in zip(array.offset, array.shape, array.voxel_size, strict=True)]


def volume(path, data, voxel_size=(8, 8, 8)):
    return write_array(path, RAW, data, voxel_size=voxel_size, offset=OFFSET, attributes={"microscope": "FIB"})


def cut(values, margin=2):
    return values[(slice(margin, -margin),) * 3]


@pytest.mark.parametrize("voxel_size", [(10, 10, 10), (4, 4, 4), (8, 16, 5), (13, 7, 8)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_raw_stays_at_its_place_in_the_world(tmp_path, voxel_size, dtype):
    source = volume(tmp_path / "in.zarr", np.zeros(SHAPE, dtype))
    unit = 255 if dtype == np.uint8 else 1
    values = smooth(world(source)) * unit
    source[:] = np.rint(values).astype(dtype) if dtype == np.uint8 else values.astype(dtype)
    rescale(source, tmp_path / "out.zarr", "volumes/em", voxel_size)

    result = open_array(tmp_path / "out.zarr", "volumes/em")
    assert (tuple(result.voxel_size), tuple(result.offset), result.dtype) == (voxel_size, OFFSET, dtype)
    assert result.roi.contains(source.roi)
    assert all(r - s < v for r, s, v in zip(result.roi.shape, source.roi.shape, voxel_size, strict=True))
    assert result.attrs["microscope"] == "FIB"
    values = read(result) / unit
    np.testing.assert_allclose(cut(values), cut(smooth(world(result))), atol=0.005)
    np.testing.assert_allclose(values, smooth(world(result)), atol=0.05)  # at the faces, too


def test_shrinking_a_section_is_what_pytorch_does_with_antialiasing(tmp_path):
    section = np.random.default_rng(0).random((1, 60, 45), np.float32)
    rescale(volume(tmp_path / "in.zarr", section), tmp_path / "out.zarr", RAW, (8, 20, 24))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(section)[None], size=(24, 15), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(read(open_array(tmp_path / "out.zarr", RAW)), expected[0], atol=1e-6)


def test_a_pattern_too_fine_for_the_new_voxels_becomes_gray(tmp_path):
    checkers = (np.indices((32, 32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)
    rescale(volume(tmp_path / "in.zarr", checkers), tmp_path / "out.zarr", RAW, (16, 16, 16))
    np.testing.assert_allclose(cut(read(open_array(tmp_path / "out.zarr", RAW)), 1), 127.5, atol=1)


def test_white_stays_within_what_raw_may_be(tmp_path):
    rescale(volume(tmp_path / "in.zarr", np.ones((40, 40, 40), np.float32)), tmp_path / "out.zarr", RAW, (15, 15, 15))
    assert np.unique(read(open_array(tmp_path / "out.zarr", RAW))).tolist() == [1]


def test_weights_of_a_row_sum_to_one_also_beyond_its_end():
    weights = interpolation_weights(np.array([0.1, 2.5, 3.9, 4.4]), 4, 1).toarray()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[1], [0, 0, 1, 0], atol=1e-7)
    np.testing.assert_allclose(weights[3], [0, 0, 0, 1], atol=1e-7)


@pytest.mark.parametrize("voxel_size", [(10, 10, 10), (4, 4, 4), (16, 8, 3)])
def test_a_label_is_that_of_the_voxel_around_the_center(tmp_path, voxel_size):
    labels = np.random.default_rng(0).integers(2**60, 2**60 + 50, SHAPE, dtype=np.uint64)
    source = volume(tmp_path / "in.zarr", labels)
    rescale(source, tmp_path / "out.zarr", RAW, voxel_size, labels=True)
    result = open_array(tmp_path / "out.zarr", RAW)
    indices = [
        np.minimum((center - offset) // 8, size - 1).astype(int)
        for center, offset, size in zip(world(result), OFFSET, SHAPE, strict=True)
    ]
    assert result.dtype == np.uint64
    np.testing.assert_array_equal(read(result), labels[np.ix_(*indices)])


def test_labels_on_finer_voxels_and_back_are_the_same(tmp_path):
    labels = np.random.default_rng(0).integers(0, 50, SHAPE, dtype=np.uint64)
    source = volume(tmp_path / "in.zarr", labels)
    rescale(source, tmp_path / "fine.zarr", RAW, (5, 5, 5), labels=True)
    rescale(open_array(tmp_path / "fine.zarr", RAW), tmp_path / "back.zarr", RAW, (8, 8, 8), source, labels=True)
    back = open_array(tmp_path / "back.zarr", RAW)
    assert back.roi == source.roi
    np.testing.assert_array_equal(read(back), labels)


@pytest.mark.parametrize("data", ["raw", "labels"])
def test_slabs_do_not_show(tmp_path, monkeypatch, data):
    values = np.random.default_rng(0).integers(0, 256, (70, 90, 150), dtype=np.uint8)
    source = volume(tmp_path / "in.zarr", values)
    rescale(source, tmp_path / "whole.zarr", RAW, (6, 7, 8), labels=data == "labels")
    monkeypatch.setattr(rescale_module, "SLAB_BYTES", 1)
    rescale(source, tmp_path / "slabs.zarr", RAW, (6, 7, 8), labels=data == "labels")
    whole, by_slab = (read(open_array(tmp_path / name, RAW)).astype(int) for name in ("whole.zarr", "slabs.zarr"))
    assert np.abs(whole - by_slab).max() <= (1 if data == "raw" else 0)
    assert (whole != by_slab).mean() < 1e-4


def test_the_same_voxels_are_copied(tmp_path):
    values = np.random.default_rng(0).random(SHAPE)  # float64 would lose digits on the way
    rescale(volume(tmp_path / "in.zarr", values), tmp_path / "out.zarr", RAW, (8, 8, 8))
    np.testing.assert_array_equal(read(open_array(tmp_path / "out.zarr", RAW)), values)


def test_an_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch):
    source = volume(tmp_path / "in.zarr", np.ones(SHAPE, np.uint8))
    rescale(source, tmp_path / "out.zarr", "volumes/old", (16, 16, 16))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rescale_module, "_interpolated", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rescale(source, tmp_path / "out.zarr", RAW, (10, 10, 10))
    assert list_arrays(tmp_path / "out.zarr") == ["volumes/old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.zarr", "out.zarr"]


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    raw = volume(tmp_path / "in.zarr", np.ones(SHAPE, np.uint8))
    ids = volume(tmp_path / "labels.zarr", np.ones(SHAPE, np.uint64))
    wider = volume(tmp_path / "wider.zarr", np.ones((22, 10, 10), np.uint8))
    for source, voxel_size, like, message in [
        (ids, (10, 10, 10), None, "uint64 .* is not raw"),
        (raw, (10, 0, 10), None, r"voxel size \(10, 0, 10\)"),
        (raw, (10, 10, 10**9), None, "more than 1000 times"),
        (raw, (10, 10), None, r"voxel size \(10, 10\)"),
        (raw, (8, 8, 8), wider, "source covers"),
    ]:
        with pytest.raises(UserError, match=message):
            rescale(source, tmp_path / "out.zarr", RAW, voxel_size, like)
    assert not (tmp_path / "out.zarr").exists()


def test_command_line(tmp_path, capsys, monkeypatch):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rescale.py", *map(str, arguments)])
        rescale_script.main()

    source = volume(tmp_path / "in.zarr", np.full(SHAPE, 7, np.uint8))
    in_10_nm = ["--voxel-size", "10", "10", "10"]
    script = [sys.executable, rescale_script.__file__, tmp_path / "in.zarr", tmp_path / "out.zarr", "--to", "em"]
    done = subprocess.run([*script, *in_10_nm], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "em uint8 (17, 24, 21), (10, 10, 10) nm" in done.stdout
    command(tmp_path / "out.zarr", tmp_path / "back.zarr", "--dataset", "em", "--like", tmp_path / "in.zarr", RAW)
    back = open_array(tmp_path / "back.zarr", "em")
    assert (back.roi, np.unique(read(back)).tolist()) == (source.roi, [7])

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    capsys.readouterr()
    for target, options, message in [
        ("out.zarr", (), "exists: add --overwrite"),
        ("in.zarr", ("--overwrite",), "is an input"),
        ("in.zarr/volumes", ("--overwrite",), "is an input"),
        (".", ("--overwrite",), "is an input"),
        ("mine", ("--overwrite",), "notes.txt in it was not written by this suite"),
        ("new.zarr", ("--dataset", "volumes/em"), "it holds volumes/raw"),
    ]:
        with pytest.raises(SystemExit) as ended:
            command(tmp_path / "in.zarr", tmp_path / target, *in_10_nm, *options)
        said = capsys.readouterr().err
        assert (ended.value.code, said.startswith("error: "), said.count("\n")) == (2, True, 1)
        assert message in said
    assert list_arrays(tmp_path / "in.zarr") == [RAW]
    assert not (tmp_path / "new.zarr").exists()
    assert (tmp_path / "mine/notes.txt").is_file()
