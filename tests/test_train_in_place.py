"""Training on volumes of other formats, read where they are: what it learns is what it learns from a zarr."""

import re

import h5py
import numpy as np
import pytest
import tifffile
from test_formats import write_n5, write_ome_zarr, write_precomputed
from test_in_place import served  # noqa: F401
from test_training import config

from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.checks import check_training_volumes
from lsdseg.data_utils.labels import FIRST_UNLABELED, create_labels_mask
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW, data_folder, volumes_in
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.reader import Reader
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.engine.training.train import train
from lsdseg.engine.training.volumes_report import report_volumes
from lsdseg.errors import UserError
from lsdseg.models.checkpoint import latest_checkpoint, read_checkpoint

SHAPE, SIZE, OFFSET = (44, 46, 48), (8, 8, 8), (80, 160, 0)
LABELS_SHAPE, LABELS_OFFSET = (40, 40, 40), (96, 184, 32)  # 2, 3 and 4 voxels inside of raw
INSIDE = tuple(slice(b, b + n) for b, n in zip((2, 3, 4), LABELS_SHAPE, strict=True))
PLACED = {"voxel_size": SIZE, "offset": OFFSET}
LABELS_PLACED = {"voxel_size": SIZE, "offset": LABELS_OFFSET}


@pytest.fixture(scope="module")
def tissue():
    """Raw uint8, and labels of a part of it, some of which nobody has labeled."""
    raw, labels, _ = make_phantom(SHAPE, seed=0, voxel_size=SIZE)
    labels = labels[INSIDE].astype(np.uint64)
    labels[:6, :20] = FIRST_UNLABELED
    return raw, labels


def train_folder(home, **overrides):
    folder = data_folder(config(home, **overrides), "train")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_cremi(path, raw, labels, dtype=None):
    with h5py.File(path, "w") as file:
        for name, data, offset in ((RAW, raw, OFFSET), (LABELS, labels.astype(dtype or labels.dtype), LABELS_OFFSET)):
            file.create_dataset(name, data=data, chunks=(7, 20, 30)).attrs.update(resolution=SIZE, offset=offset)


def write_place(path, **keys):
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))


def hdf(folder, raw, labels):
    write_cremi(folder / "fly.hdf", raw, labels)


def signed_hdf(folder, raw, labels):
    """Labels as int64: -3 is CREMI's first id for unlabeled voxels."""
    write_cremi(folder / "fly.h5", raw, labels, np.int64)


def write_container(folder, raw, labels, *names):
    """Write an N5 container with raw and labels under two names."""
    for name, data, placed in zip(names, (raw, labels), (PLACED, LABELS_PLACED), strict=True):
        write_n5(folder / "new", data, **placed, chunks=(16, 16, 16))
        (folder / "fly.n5" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "new/em").rename(folder / "fly.n5" / name)
    (folder / "new/attributes.json").rename(folder / "fly.n5/attributes.json")
    (folder / "new").rmdir()


def n5(folder, raw, labels):
    write_container(folder, raw, labels, RAW, LABELS)


def n5_with_other_names(folder, raw, labels):
    write_container(folder, raw, labels, "em/raw", "ids")
    write_place(folder / "place.volume", location="fly.n5", dataset="em/raw", neuron_labels="{dataset: ids}")


def precomputed(folder, raw, labels):
    """Two volumes elsewhere. Those of labels are larger than what is taken of raw."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    wide = np.pad(raw, [(3, 1), (2, 2), (0, 4)], mode="edge")
    offset = tuple(o - 8 * before for o, before in zip(OFFSET, (3, 2, 0), strict=True))
    write_precomputed(elsewhere / "em", wide, voxel_size=SIZE, offset=offset, chunks=(16, 16, 16))
    write_precomputed(elsewhere / "ids", labels, **LABELS_PLACED, chunks=(16, 16, 16))
    box = {"begin": [3, 2, 0], "shape": list(SHAPE)}
    write_place(folder / "place.volume", location="../elsewhere/em", **box, neuron_labels="../elsewhere/ids")


def ome_zarr(folder, raw, labels):
    """Labels of all of raw and more, cut to a box of their own."""
    write_ome_zarr(folder / "em.zarr", raw, axes="zyx", **PLACED)
    write_ome_zarr(folder / "ids", np.pad(labels, 5), voxel_size=SIZE, offset=[o - 40 for o in LABELS_OFFSET])
    box = f"{{location: ids, begin: [5, 5, 5], shape: {list(LABELS_SHAPE)}}}"
    write_place(folder / "place.volume", location="em.zarr", neuron_labels=box)


def tiff(folder, raw, labels):
    """Files that say nothing of their place; raw is big-endian, labels have 32 bits, and unlabeled is in a mask."""
    tifffile.imwrite(folder / "raw.tif", raw, byteorder=">", photometric="minisblack")
    known = labels < FIRST_UNLABELED
    tifffile.imwrite(folder / "ids.tif", np.where(known, labels, 0).astype(np.uint32), compression="zlib")
    tifffile.imwrite(folder / "known.tif", known.astype(np.uint8), compression="zlib")
    at = f"offset: {list(LABELS_OFFSET)}"
    write_place(
        folder / "place.volume",
        location="raw.tif",
        voxel_size=list(SIZE),
        offset=list(OFFSET),
        neuron_labels=f"{{location: ids.tif, {at}}}",
        neuron_labels_mask=f"{{location: known.tif, {at}}}",
    )


FORMATS = [hdf, signed_hdf, n5, n5_with_other_names, precomputed, ome_zarr, tiff]


def batches_of(cfg, count):
    volumes = volumes_in(cfg, "train")
    check_training_volumes(volumes, cfg)
    with training_batches(cfg, volumes, tuple(task_channels(cfg))) as batches:
        return [next(batches) for _ in range(count)]


def write_zarr(folder, raw, labels):
    path = folder / "fly.zarr"
    write_array(path, RAW, raw, **PLACED)
    write_array(path, LABELS, labels, **LABELS_PLACED)
    create_labels_mask(path)


@pytest.fixture(scope="module")
def expected(tissue, tmp_path_factory):
    """Batches from a zarr, by type of raw."""
    found = {}
    for dtype in (np.uint8, np.uint16):
        home = tmp_path_factory.mktemp(dtype.__name__)
        write_zarr(train_folder(home), tissue[0].astype(dtype) * (dtype(1) if dtype is np.uint8 else 200), tissue[1])
        found[dtype] = batches_of(config(home), 4)
    return found


def assert_same(batch, other):
    np.testing.assert_array_equal(batch.raw, other.raw)
    np.testing.assert_array_equal(batch.labels, other.labels)
    for task in other.targets:
        np.testing.assert_array_equal(batch.targets[task], other.targets[task])
        np.testing.assert_array_equal(batch.known[task], other.known[task])


@pytest.mark.parametrize("write", FORMATS)
def test_batches_are_those_of_a_zarr(write, tissue, expected, tmp_path):
    write(train_folder(tmp_path), *tissue)
    assert len(volumes_in(config(tmp_path), "train")) == 1
    for batch, other in zip(batches_of(config(tmp_path), 2), expected[np.uint8][:2], strict=True):
        assert_same(batch, other)
    assert any((other.known["lsds"] == 0).any() for other in expected[np.uint8])


@pytest.mark.parametrize("write", [hdf, tiff])
def test_gray_values_of_other_integers_become_what_they_become_in_a_zarr(write, tissue, expected, tmp_path):
    write(train_folder(tmp_path), tissue[0].astype(np.uint16) * 200, tissue[1])
    (batch,) = batches_of(config(tmp_path), 1)
    assert_same(batch, expected[np.uint16][0])
    (batch,) = batches_of(config(tmp_path, DATA__RAW_WINDOW=(0, 255 * 200)), 1)
    np.testing.assert_allclose(batch.raw, expected[np.uint8][0].raw, atol=1e-5)


@pytest.mark.parametrize("write", [hdf, n5])
def test_workers_read_in_processes_of_their_own(write, tissue, expected, tmp_path):
    write(train_folder(tmp_path), *tissue)
    here = {batch.raw.tobytes() for batch in expected[np.uint8]}
    cfg = config(tmp_path, SYSTEM__NUM_WORKERS=2, SYSTEM__CACHE_SIZE=1)
    there = [batch.raw.tobytes() for batch in batches_of(cfg, 2)]
    assert len(set(there)) == 2
    assert here.issuperset(there)


def test_a_reader_says_what_it_cannot_read_and_ends_with_its_connection(tissue, tmp_path):
    write_n5(tmp_path / "fly.n5", tissue[0], **PLACED)
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{tmp_path}/fly.n5/em/s0/"}}
    process = Reader()
    box = np.s_[3:9, 2:4, 30:]
    np.testing.assert_array_equal(process.read(spec, box), tissue[0].T[box])
    with pytest.raises(OSError, match="none"):
        process.read({"driver": "n5", "kvstore": {"driver": "file", "path": f"{tmp_path}/none/"}}, box)
    process.connection.close()
    assert process.process.wait(60) == 0


def test_a_pair_behind_a_url(tissue, expected, tmp_path, served):  # noqa: F811
    n5(tmp_path, *tissue)
    write_precomputed(tmp_path / "ids", tissue[1], **LABELS_PLACED, chunks=(16, 16, 16))
    home = tmp_path / "home"
    container = train_folder(home) / "whole.volume"
    write_place(container, location=f"{served.url}/fly.n5")
    check(home)
    write_place(container, location=f"{served.url}/fly.n5", neuron_labels=f"{served.url}/ids")
    cfg = config(home, SYSTEM__NUM_WORKERS=1, SYSTEM__CACHE_SIZE=1)
    assert_same(batches_of(cfg, 1)[0], expected[np.uint8][0])


def test_a_run_keeps_statistics_and_warns_of_the_same_raw_in_another_format(tissue, tmp_path, capsys):
    """The second file names the first one's raw, with labels that are three voxels off."""
    folder = train_folder(tmp_path)
    raw, labels = tissue[0].astype(np.uint16) * 200, tissue[1]
    write_cremi(folder / "fly.hdf", raw, labels)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    write_n5(elsewhere / "fly.n5", raw, **PLACED, chunks=(9, 9, 9))
    write_cremi(elsewhere / "shifted.hdf", raw, np.roll(labels, 3, axis=2))
    write_place(folder / "other.volume", location="../elsewhere/fly.n5", neuron_labels="../elsewhere/shifted.hdf")
    (folder / "notes.txt").touch()
    validation = {"TRAIN__VALIDATE_EVERY": 1, "TRAIN__VALIDATION_VOLUME": folder / "fly.hdf"}
    cfg = config(tmp_path, TRAIN__EPOCHS=1, DATA__RAW_WINDOW=(0, 51000), **validation)
    train(cfg)
    said = capsys.readouterr().out
    assert "fly.hdf has the same volumes/raw as" in said or "other.volume has the same volumes/raw as" in said
    assert re.search(r"neuron_ids in \S*other.volume fit raw better if moved by \(-?\d, 0, -3\)", said)
    assert "iteration 1: VOI sum" in said
    assert "because they are in none of the formats: notes.txt" in said
    checkpoint = read_checkpoint(latest_checkpoint(cfg.MODEL.CKPT_FOLDER))
    assert len(checkpoint["training_data"]) == 2
    log = (latest_checkpoint(cfg.MODEL.CKPT_FOLDER).parent / "train.log").read_text()
    assert log.count("uint16, 0 becomes 0, and 51000 becomes 1") == 2
    assert np.dot(checkpoint["training_data"][0]["histogram"], np.linspace(0, 1, 256)) > 0.2
    report_volumes([str(folder / "fly.hdf"), str(folder / "other.volume")], None, tmp_path / "volumes_report.html")
    page = (tmp_path / "volumes_report.html").read_text(encoding="utf-8")
    assert re.search(r"fit raw better if moved by \(-?\d, 0, -3\)", page)
    assert "uint16" in page


def test_a_volume_that_another_file_names_is_not_one_of_its_own(tissue, tmp_path):
    folder = train_folder(tmp_path)
    write_zarr(folder, *tissue)
    write_cremi(folder / "fly.hdf", *tissue)  # the zarr may be a copy of it
    assert [path.name for path in volumes_in(config(tmp_path), "train")] == ["fly.zarr"]
    write_place(folder / "fly.volume", location="fly.zarr", begin=[0, 0, 0], shape=[40, 40, 40])
    assert [path.name for path in volumes_in(config(tmp_path), "train")] == ["fly.hdf", "fly.volume"]
    assert list_arrays(folder / "fly.volume") == [LABELS_MASK, LABELS, RAW]
    for name in (LABELS, LABELS_MASK):
        array = open_array(folder / "fly.volume", name)
        assert (array.shape, tuple(array.offset)) == ((38, 37, 36), LABELS_OFFSET)
        whole = read(open_array(folder / "fly.zarr", name))
        np.testing.assert_array_equal(read(array), whole[:38, :37, :36])


def check(home):
    cfg = config(home)
    check_training_volumes(volumes_in(cfg, "train"), cfg)


PLACE_ERRORS = {
    "no labels": (
        {"location": "raw.n5"},
        r"no dataset volumes/labels/neuron_ids in .*; it holds em: .*a file NAME.vol",
    ),
    "itself": ({"location": "place.volume"}, r"place.volume is no HDF5 file or damaged"),
    "a missing file": ({"neuron_labels": "none.tif"}, r"none.tif does not exist"),
    "no such dataset": (
        {"neuron_labels": "{dataset: ids}"},
        r"raw.n5 holds em: name .* as dataset of neuron_labels in",
    ),
    "nothing": ({"neuron_labels": "{}"}, r"raw.n5 holds em: name .* as dataset of neuron_labels in a file NAME"),
    "two datasets": ({"neuron_labels": "fly.hdf"}, r"holds a, b: name .* as dataset of neuron_labels in a file NAME"),
    "no overlap": (
        {"begin": [0, 0, 0], "shape": [44, 46, 40], "neuron_labels": "{location: ids.n5, offset: [80, 160, 320]}"},
        r"neuron_ids in .* does not overlap volumes/raw, .* correct begin, shape or offset in the file NAME.volume",
    ),
    "outside": (
        {"neuron_labels": "{location: ids.n5, offset: [80, 160, 240]}"},
        r"which is not inside volumes/raw .* correct their offset of neuron_labels in a file NAME.volume",
    ),
    "other voxels": (
        {"neuron_labels": "{location: ids.n5, voxel_size: [8, 8, 4]}"},
        r"has voxel size \(8, 8, 4\) nm, volumes/raw has \(8, 8, 8\): correct its voxel_size of neuron_labels in a ",
    ),
    "an unknown key": (
        {"neuron_labels": "{location: a, box: 3}"},
        r"neuron_labels in .* has the key box: use location",
    ),
    "no name": ({"neuron_labels": "{dataset: ''}"}, r"neuron_labels in .* has dataset '': give a name"),
    "no place": ({"neuron_labels": "[1, 2]"}, r"has neuron_labels \[1, 2\]: give a location"),
}


@pytest.mark.parametrize("name", PLACE_ERRORS)
def test_pairs_that_do_not_fit_are_refused(name, tissue, tmp_path):
    keys, message = PLACE_ERRORS[name]
    folder = train_folder(tmp_path)
    write_n5(folder / "raw.n5", tissue[0], **PLACED, chunks=(16, 16, 16))
    write_n5(folder / "ids.n5", tissue[1], **LABELS_PLACED, chunks=(16, 16, 16))
    with h5py.File(folder / "fly.hdf", "w") as file:
        file["a"] = file["b"] = np.ones((3, 3, 3), np.uint64)
    write_place(folder / "place.volume", **({"location": "raw.n5"} | keys))
    for path in ("raw.n5", "ids.n5", "fly.hdf"):
        if path not in (folder / "place.volume").read_text():
            (folder / path).rename(tmp_path / path)
    with pytest.raises(UserError, match=message):
        check(tmp_path)


def test_ids_that_would_change_are_refused(tissue, tmp_path):
    path = train_folder(tmp_path) / "fly.hdf"
    raw, labels = tissue
    write_cremi(path, raw, np.minimum(labels, 99), np.float32)
    check(tmp_path)
    with pytest.raises(UserError, match=r"fly.hdf is only read, and training makes the mask of its labels itself"):
        create_labels_mask(path)
    with h5py.File(path, "r+") as file:
        file[LABELS][39, 39, 39] = 0.5
    with pytest.raises(
        UserError, match=r"neuron_ids in \S*fly.hdf is float32 and holds 0.5, .*store labels as unsigned"
    ):
        check(tmp_path)
    write_cremi(path, raw, np.where(labels == 1, -4, 1), np.int32)
    with pytest.raises(UserError, match=r"is int32 and holds -4, which is no exact id: store labels as unsigned"):
        check(tmp_path)


def test_a_truncated_file_is_refused_before_anything_is_written(tissue, tmp_path):
    path = train_folder(tmp_path) / "fly.hdf"
    write_cremi(path, *tissue)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"fly.hdf is no HDF5 file or damaged \(.*truncated.*\): use another file$"):
        train(config(tmp_path))
    assert not list(tmp_path.rglob("model_checkpoint*"))


def test_a_folder_with_nothing_but_unknown_formats_is_refused(tmp_path):
    (train_folder(tmp_path) / "fly.mrc").touch()
    with pytest.raises(
        UserError, match=r"no \*.zarr in \S*/train, and no volume in another format \(fly.mrc is in none"
    ):
        check(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_damaged_during_training_is_named(workers, tissue, tmp_path):
    folder = train_folder(tmp_path)
    n5(folder, *tissue)
    cfg = config(tmp_path, SYSTEM__NUM_WORKERS=workers, SYSTEM__CACHE_SIZE=1)

    def train_on_damaged_chunks():
        with training_batches(cfg, volumes_in(cfg, "train"), ("affs",)) as batches:
            for file in (folder / "fly.n5/volumes/raw/s0").glob("*/*/*"):
                file.write_bytes(b"no chunk")
            for _ in range(3):
                next(batches)

    with pytest.raises(UserError, match=r"volumes/raw in \S*fly.n5 cannot be read at the voxels .*: use another copy"):
        train_on_damaged_chunks()
