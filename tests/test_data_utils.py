import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from yacs.config import CfgNode

from data_utils import create_dir_organisation as create_dir_organisation_script
from data_utils import create_labels_mask as create_labels_mask_script
from data_utils import hdf_to_zarr as hdf_to_zarr_script
from lsdseg.data_utils.checks import check_raw, check_training_volume, check_training_volumes
from lsdseg.data_utils.convert import convert
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import (
    LABELS,
    LABELS_MASK,
    RAW,
    create_data_folders,
    data_folder,
    output_path,
    run_name,
    volumes_in,
)
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
RAW_DATA = RNG.integers(0, 255, (20, 24, 28)).astype(np.uint8)
LABELS_DATA = RNG.integers(0, 9, (10, 12, 14)).astype(np.uint64)
LABELS_DATA[0, 0] = 2**64 - 3
MITO_DATA = np.maximum(LABELS_DATA.astype(np.int32) - 1, -3)


@pytest.fixture
def cfg(tmp_path):
    cfg = CfgNode()
    cfg.DATA = CfgNode(
        {
            "HOME": str(tmp_path),
            "DATA_DIR_PATH": "connexion/data",
            "BRAIN_VOL": "HEMI",
            "OUTFILE": str(tmp_path / "lsd_outputs"),
            "FIB": 0,
            "DIM_2D": False,
            "RAW": RAW,
            "RAW_WINDOW": None,
            "NEURON_LABELS": LABELS,
            "NEURON_LABELS_MASK": LABELS_MASK,
        }
    )
    cfg.PREPROCESS = CfgNode({"SOURCE_DATA_RESOLUTION": None, "SOURCE_DATA_OFFSET": None})
    cfg.MODEL = CfgNode({"VOXEL_SIZE": (40, 4, 4), "RAW_SHAPE": (16, 20, 20), "LSDS": 10})
    cfg.TRAIN = CfgNode(
        {
            "MODEL_TYPE": "MTLSD",
            "PLACEMENT": False,
            "NEIGHBORHOOD": [[-1, 0, 0]],
            "CHECKPOINT": "/runs/run_7/model_checkpoint_5000",
        }
    )
    return cfg


@pytest.fixture
def hdf(tmp_path):
    """A small CREMI-layout file: labels cover a part of raw, annotations beside."""
    path = tmp_path / "sample_A.hdf"
    with h5py.File(path, "w") as file:
        file.create_dataset(RAW, data=RAW_DATA, chunks=(5, 6, 7), compression="gzip")
        file.create_dataset(LABELS, data=LABELS_DATA)
        file.create_dataset("volumes/labels/mito_ids", data=MITO_DATA)
        file.create_dataset("annotations/ids", data=np.arange(5))
        file[RAW].attrs["resolution"] = np.array([40.0, 4.0, 4.0])
        for name in (LABELS, "volumes/labels/mito_ids"):
            file[name].attrs["resolution"] = np.array([40.0, 4.0, 4.0])
            file[name].attrs["offset"] = np.array([200.0, 24.0, 28.0])
        file[LABELS].attrs["comment"] = np.bytes_(b"proofread")
    return path


def run(script, monkeypatch, capsys, *arguments):
    """A script's exit status and what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    try:
        script.main()
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


# hdf_to_zarr.py


def test_conversion_keeps_every_volume_and_its_place(hdf, tmp_path):
    target = tmp_path / "sample_A.zarr"
    convert(hdf, target)
    assert list_arrays(target) == [LABELS_MASK, "volumes/labels/mito_ids", LABELS, RAW]
    raw, labels, mask = (open_array(target, name) for name in (RAW, LABELS, LABELS_MASK))
    np.testing.assert_array_equal(read(raw), RAW_DATA)
    np.testing.assert_array_equal(read(labels), LABELS_DATA)
    np.testing.assert_array_equal(read(mask), LABELS_DATA != 2**64 - 3)
    assert raw.voxel_size == labels.voxel_size == mask.voxel_size == (40, 4, 4)
    assert raw.offset == (0, 0, 0)
    assert labels.roi == mask.roi
    assert labels.offset == (200, 24, 28)
    assert (labels.dtype, mask.dtype) == (np.uint64, np.uint8)
    assert labels.attrs["comment"] == "proofread"


def test_signed_labels_become_unsigned(hdf, tmp_path):
    convert(hdf, tmp_path / "a.zarr")
    mito = open_array(tmp_path / "a.zarr", "volumes/labels/mito_ids")
    assert mito.dtype == np.uint64
    np.testing.assert_array_equal(read(mito), MITO_DATA.astype(np.uint64))


def test_sections_cut_the_same_region_out_of_every_dataset(hdf, tmp_path):
    convert(hdf, tmp_path / "a.zarr", sections=(8, None))
    raw, labels = (open_array(tmp_path / "a.zarr", name) for name in (RAW, LABELS))
    np.testing.assert_array_equal(read(raw), RAW_DATA[8:])
    np.testing.assert_array_equal(read(labels), LABELS_DATA[3:])
    assert (raw.offset, labels.offset) == ((320, 0, 0), (320, 24, 28))

    convert(hdf, tmp_path / "b.zarr", sections=(0, 4))
    assert list_arrays(tmp_path / "b.zarr") == [RAW]


def test_existing_mask_is_kept(hdf, tmp_path):
    with h5py.File(hdf, "r+") as file:
        mask = file.create_dataset(LABELS_MASK, data=(LABELS_DATA > 4).astype(np.uint8))
        mask.attrs["resolution"] = (40, 4, 4)
    convert(hdf, tmp_path / "a.zarr")
    np.testing.assert_array_equal(read(open_array(tmp_path / "a.zarr", LABELS_MASK)), LABELS_DATA > 4)


def test_real_volume_by_the_command_line(data_dir, tmp_path):
    command = [CHECKOUT / "data_utils/hdf_to_zarr.py", data_dir / "fib25_train.hdf", tmp_path / "train"]
    done = subprocess.run(
        [sys.executable, *command, "--sections", "10:14"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    target = tmp_path / "train" / "fib25_train.zarr"
    assert str(target) in done.stdout
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        for name in (RAW, LABELS):
            array = open_array(target, name)
            np.testing.assert_array_equal(read(array), file[name][10:14])
            assert (array.voxel_size, array.offset) == ((10, 10, 10), (100, 0, 0))
    assert read(open_array(target, LABELS_MASK)).all()


def test_conversion_refuses_bad_input(hdf, tmp_path, monkeypatch, capsys):
    text, truncated, empty = tmp_path / "text.hdf", tmp_path / "truncated.hdf", tmp_path / "empty.hdf"
    text.write_text("no hdf")
    truncated.write_bytes(hdf.read_bytes()[:-2000])
    h5py.File(empty, "w").close()
    (tmp_path / "there.zarr").mkdir()
    output = tmp_path / "out.zarr"
    for arguments, message in [
        ((tmp_path / "nope.hdf", output), "nope.hdf does not exist"),
        ((text, output), "no HDF5 file"),
        ((truncated, output), "no HDF5 file or damaged"),
        ((empty, output), f"no dataset {RAW}"),
        ((hdf, tmp_path / "there.zarr"), "exists: add --overwrite"),
        ((hdf, hdf, output), "several inputs"),
        ((hdf, output, "--sections", "5:21"), "has the sections 0:20"),
        ((hdf, output, "--sections", "5:5"), "has the sections 0:20"),
        ((hdf, output, "--sections", "5-9"), "not of the form A:B"),
        ((hdf, text, tmp_path), "no HDF5 file"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        status, _, error = run(hdf_to_zarr_script, monkeypatch, capsys, *arguments)
        assert (status, error.count("\n")) == (2, 1), error
        assert message in error
        assert sorted(tmp_path.rglob("*")) == before


def test_resolution_serves_files_without_attributes(hdf, tmp_path, monkeypatch, capsys):
    with h5py.File(hdf, "r+") as file:
        del file[RAW].attrs["resolution"]
    output = tmp_path / "a.zarr"
    status, _, error = run(hdf_to_zarr_script, monkeypatch, capsys, hdf, output)
    assert status == 2
    assert f"{RAW} in {hdf} has no voxel size" in error
    assert "or --resolution Z Y X" in error
    assert "PREPROCESS" not in error
    status, printed, _ = run(hdf_to_zarr_script, monkeypatch, capsys, hdf, output, "--resolution", 40, 4, 4)
    assert status == 0
    assert "left out annotations/ids" in printed
    assert open_array(output, RAW).voxel_size == (40, 4, 4)


def with_external(file, tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"s" * 1000)
    file.create_dataset("volumes/x", (10, 10, 10), "u1", external=[(str(tmp_path / "secret.bin"), 0, 1000)])


def with_virtual(file, tmp_path):
    with h5py.File(tmp_path / "other.hdf", "w") as other:
        other["x"] = RAW_DATA
    layout = h5py.VirtualLayout(RAW_DATA.shape, "u1")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf"), "x", RAW_DATA.shape)
    file.create_virtual_dataset("volumes/x", layout)


def with_dots(file, _):
    file["volumes"].create_group("..").create_dataset("x", data=RAW_DATA)


def with_a_name_of_zarr(file, _):
    file["volumes"].create_dataset(".zarray", data=RAW_DATA)


def with_undecodable_name(file, _):
    file["volumes"].create_dataset(b"\xff\xfe", data=RAW_DATA)


def with_holes(file, _):
    file.create_dataset("volumes/x", (10**5, 10**4, 10**4), "u1", chunks=(64, 64, 64))


def with_too_much(file, _):
    file.create_dataset("volumes/x", (10**9, 10**9, 10**9), "u1", chunks=(64, 64, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_external, "volumes/x in .* in other files"),
        (with_virtual, "volumes/x in .* in other files"),
        (with_dots, "no name of a dataset"),
        (with_a_name_of_zarr, "no name of a dataset"),
        (with_undecodable_name, "no name of a dataset"),
        (with_holes, "voxels are stored"),
        (with_too_much, "voxels are stored"),
    ],
)
def test_conversion_refuses_odd_files(hdf, tmp_path, monkeypatch, capsys, change, message):
    with h5py.File(hdf, "r+") as file:
        change(file, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, _, error = run(hdf_to_zarr_script, monkeypatch, capsys, hdf, tmp_path / "a.zarr")
    assert (status, error.count("\n")) == (2, 1), error
    assert re.search(message, error)
    assert len(error) < 500
    assert sorted(tmp_path.rglob("*")) == before


def test_volumes_of_other_byte_orders_and_odd_datasets_beside_them(hdf, tmp_path):
    with h5py.File(hdf, "r+") as file:
        big = file.create_dataset("volumes/big", data=RAW_DATA.astype(">u2"))
        big.attrs["resolution"] = (40, 4, 4)
        big.attrs["odd"] = h5py.Empty("f")
        big.attrs["pair"] = np.array([(1, b"x")], dtype=[("a", "i4"), ("b", "S1")])
        file.create_dataset("volumes/labels/strings", data=np.full((3, 4, 5), b"neuron"))
        file.create_dataset("volumes/none", (0, 4, 5))
        file["volumes/loop"] = file["volumes"]
        file["volumes/away"] = h5py.ExternalLink("nowhere.hdf", "/x")
        file["volumes/soft"] = h5py.SoftLink("/volumes/nothing")
    convert(hdf, tmp_path / "a.zarr")
    assert list_arrays(tmp_path / "a.zarr") == ["volumes/big", LABELS_MASK, "volumes/labels/mito_ids", LABELS, RAW]
    array = open_array(tmp_path / "a.zarr", "volumes/big")
    assert array.dtype == np.dtype("=u2")
    np.testing.assert_array_equal(read(array), RAW_DATA)


def test_damage_found_half_way_leaves_the_old_volume(hdf, tmp_path, monkeypatch, capsys):
    output = tmp_path / "a.zarr"
    write_array(output, RAW, RAW_DATA, voxel_size=(1, 1, 1), offset=(0, 0, 0))
    with h5py.File(hdf) as file:
        chunk = file[RAW].id.get_chunk_info(file[RAW].id.get_num_chunks() - 1)
    with open(hdf, "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    status, _, error = run(hdf_to_zarr_script, monkeypatch, capsys, hdf, output, "--overwrite")
    assert status == 2
    assert f"{RAW} in {hdf} cannot be read" in error
    assert list_arrays(output) == [RAW]
    assert open_array(output, RAW).voxel_size == (1, 1, 1)
    assert not list(tmp_path.glob("*.partial"))


# create_labels_mask.py


def test_labels_mask_is_made_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.zarr"
    write_array(path, LABELS, LABELS_DATA, voxel_size=(40, 4, 4), offset=(200, 24, 28))
    status, printed, _ = run(create_labels_mask_script, monkeypatch, capsys, path)
    assert (status, printed) == (0, f"{path}: {LABELS_MASK} written\n")
    np.testing.assert_array_equal(read(open_array(path, LABELS_MASK)), LABELS_DATA != 2**64 - 3)
    assert list_arrays(path) == [LABELS_MASK, LABELS]
    assert create_labels_mask(path) is False

    status, _, error = run(create_labels_mask_script, monkeypatch, capsys, tmp_path / "nope.zarr")
    assert (status, error.count("\n")) == (2, 1)


@pytest.mark.parametrize("mask", ["volumes", "volumes/labels", f"{RAW}/mask", "../mask", "/mask", ""])
def test_a_mask_replaces_nothing(tmp_path, monkeypatch, capsys, mask):
    path = tmp_path / "a.zarr"
    write_array(path, RAW, RAW_DATA, voxel_size=(40, 4, 4), offset=(0, 0, 0))
    write_array(path, LABELS, LABELS_DATA, voxel_size=(40, 4, 4), offset=(200, 24, 28))
    before = sorted(tmp_path.rglob("*"))
    status, _, error = run(create_labels_mask_script, monkeypatch, capsys, path, "--mask", mask)
    assert (status, error.count("\n")) == (2, 1), error
    assert sorted(tmp_path.rglob("*")) == before


# layout.py, create_dir_organisation.py


def test_folders_of_the_script_are_those_of_the_config(cfg, tmp_path, monkeypatch, capsys):
    base = tmp_path / cfg.DATA.DATA_DIR_PATH
    status, printed, _ = run(create_dir_organisation_script, monkeypatch, capsys, base, "HEMI", "CREMI")
    assert status == 0
    assert f"DATA.HOME {tmp_path}\n" in printed
    assert "DATA.DATA_DIR_PATH connexion/data\n" in printed
    for split in ("train", "test"):
        assert data_folder(cfg, split).is_dir()
        cfg.DATA.DIM_2D = not cfg.DATA.DIM_2D
        assert data_folder(cfg, split).is_dir()
    assert len(create_data_folders(base, ["CREMI"])) == 4  # a second time: nothing happens

    (tmp_path / "file").touch()
    status, _, error = run(create_dir_organisation_script, monkeypatch, capsys, tmp_path / "file", "A")
    assert (status, error.count("\n")) == (2, 1)


def test_volumes_in(cfg, tmp_path):
    with pytest.raises(UserError, match=r"data_3d/train does not exist: .*create_dir_organisation"):
        volumes_in(cfg, "train")
    folder = data_folder(cfg, "train")
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"no \*\.zarr in .*data_3d/train"):
        volumes_in(cfg, "train")
    for name in ("b.zarr", "a.zarr", "c.zarr.partial"):
        (folder / name).mkdir()
    assert volumes_in(cfg, "train") == [folder / "a.zarr", folder / "b.zarr"]
    for home in ("", str(tmp_path / "nope")):
        cfg.DATA.HOME = home
        with pytest.raises(UserError, match=r"DATA\.HOME"):
            volumes_in(cfg, "train")


def test_output_path(cfg, tmp_path):
    assert run_name("runs/run_7/model_checkpoint_5000") == "run_7"
    expected = tmp_path / "lsd_outputs/MTLSD/3d/run_7/model_checkpoint_5000/sample_A.zarr"
    assert output_path(cfg, "/data/test/sample_A.zarr") == expected
    cfg.TRAIN.CHECKPOINT = ""
    with pytest.raises(UserError, match=r"TRAIN\.CHECKPOINT is empty"):
        output_path(cfg, "/data/test/sample_A.zarr")


@pytest.mark.parametrize("arguments", [["/", "CREMI"], ["data", "x" * 300], ["~nosuchuser", "CREMI"]])
def test_folders_that_cannot_be_are_refused_before_any_is_made(tmp_path, arguments):
    script = [sys.executable, CHECKOUT / "data_utils" / "create_dir_organisation.py", *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []
    assert not Path("/CREMI").exists()


# checks.py


def write_volume(path, raw=RAW_DATA, labels=LABELS_DATA, mask=None, labels_grid=((40, 4, 4), (200, 24, 28))):
    """A volume that is fit for training unless told otherwise; None leaves a dataset out."""
    if raw is not None:
        write_array(path, RAW, raw, voxel_size=(40, 4, 4), offset=(0, 0, 0))
    for name, data in ((LABELS, labels), (LABELS_MASK, mask)):
        if data is not None:
            write_array(path, name, data, voxel_size=labels_grid[0], offset=labels_grid[1])
    return path


def float_raw(value):
    """Fit but for one voxel."""
    raw = RAW_DATA.astype(np.float32) / 255
    raw[3, 4, 5] = value
    return raw


def test_good_volumes_pass(cfg, tmp_path):
    check_training_volume(write_volume(tmp_path / "a.zarr"), cfg)
    check_training_volume(write_volume(tmp_path / "b.zarr", mask=np.ones((10, 12, 14), np.uint8)), cfg)
    check_training_volume(write_volume(tmp_path / "signed.zarr", labels=LABELS_DATA.astype(np.int16)), cfg)
    check_raw(write_volume(tmp_path / "c.zarr", raw=RAW_DATA[:4] / np.float32(255), labels=None), cfg)
    check_raw(write_volume(tmp_path / "d.zarr", raw=RAW_DATA.astype(np.uint16), labels=None), cfg)
    cfg.DATA.RAW_WINDOW = (0.0, 200.0)
    check_raw(write_volume(tmp_path / "e.zarr", raw=float_raw(137), labels=None), cfg)


@pytest.mark.parametrize(
    ("volume", "dataset", "message"),
    [
        ({"raw": None}, RAW, "it holds volumes/labels/neuron_ids"),
        ({"raw": RAW_DATA[None]}, RAW, "store it with the axes z, y, x"),
        ({"raw": RAW_DATA.astype(np.uint64)}, RAW, "is uint64, as labels are: name raw in DATA.RAW"),
        ({"raw": float_raw(np.nan)}, RAW, r"NaN or infinite values, the first at voxel \(3, 4, 5\)"),
        ({"raw": float_raw(-np.inf)}, RAW, r"NaN or infinite values, the first at voxel \(3, 4, 5\)"),
        (
            {"raw": float_raw(-0.25)},
            RAW,
            r"float32 and -0\.25 at voxel \(3, 4, 5\), outside 0\.\.1: say which gray",
        ),
        ({"raw": float_raw(137)}, RAW, r"137\.0 at voxel .* become 0 and 1 \(DATA\.RAW_WINDOW\)"),
        ({"raw": RAW_DATA[:15]}, RAW, r"smaller than the network's input \(16, 20, 20\): lower MODEL_ANISO"),
        ({"labels": None}, LABELS, "it holds volumes/raw"),
        ({"labels": LABELS_DATA % 9 / 2}, LABELS, r"is float64 and holds \d*\.5, .*: store labels as unsigned"),
        (
            {"labels": (LABELS_DATA % 9).astype(np.int64) - 9},
            LABELS,
            r"is int64 and holds -\d, .*: store labels as unsigned",
        ),
        ({"labels": LABELS_DATA[None]}, LABELS, "has shape .*: store labels with the axes z, y, x"),
        ({"labels_grid": ((40, 8, 8), (200, 24, 28))}, LABELS, r"voxel size \(40, 8, 8\) nm, .*resample"),
        ({"labels_grid": ((40, 4, 4), (440, 24, 28))}, LABELS, r"not inside volumes/raw .* attribute offset"),
        ({"labels_grid": ((40, 4, 4), (200, 26, 28))}, LABELS, "between the voxels"),
        ({"labels": np.full((4, 4, 4), 2**64 - 1, np.uint64)}, LABELS, "no labeled voxel"),
        ({"mask": np.zeros((10, 12, 14), np.uint8)}, LABELS_MASK, "is zero everywhere"),
        ({"mask": np.ones((9, 12, 14), np.uint8)}, LABELS_MASK, "or delete it and it is created again"),
    ],
)
def test_bad_training_volumes(cfg, tmp_path, volume, dataset, message):
    path = write_volume(tmp_path / "a.zarr", **volume)
    with pytest.raises(UserError, match=message) as error:
        check_training_volume(path, cfg)
    assert f"{dataset} in {path}" in str(error.value)
    assert "\n" not in str(error.value)


def test_voxel_size_must_be_that_of_the_network(cfg, tmp_path):
    path = write_volume(tmp_path / "a.zarr")
    cfg.MODEL.VOXEL_SIZE = (8, 8, 8)
    message = r"\(40, 4, 4\) nm, the config has \(8, 8, 8\): change MODEL_ANISO\.VOXEL_SIZE or resample"
    for check in (check_raw, check_training_volume):
        with pytest.raises(UserError, match=message):
            check(path, cfg)


def test_sections_trained_on_together_have_one_thickness(cfg, tmp_path):
    cfg.DATA.DIM_2D, cfg.MODEL.VOXEL_SIZE, cfg.MODEL.RAW_SHAPE = True, (4, 4), (20, 20)
    volumes = [write_volume(tmp_path / f"{name}.zarr") for name in "ab"]
    check_training_volumes(volumes, cfg)
    write_array(volumes[1], RAW, RAW_DATA, voxel_size=(50, 4, 4), offset=(0, 0, 0))
    message = rf"{RAW} in {volumes[1]} has voxel size \(50, 4, 4\) nm, in {volumes[0]} \(40, 4, 4\): leave one out"
    with pytest.raises(UserError, match=message):
        check_training_volumes(volumes, cfg)


def test_config_gives_the_voxel_size_of_arrays_without_attributes(cfg, tmp_path):
    path = write_volume(tmp_path / "a.zarr")
    (path / RAW / ".zattrs").unlink()
    with pytest.raises(UserError, match=r"PREPROCESS\.SOURCE_DATA_RESOLUTION"):
        check_raw(path, cfg)
    cfg.PREPROCESS.SOURCE_DATA_RESOLUTION = (40, 4, 4)
    check_raw(path, cfg)
