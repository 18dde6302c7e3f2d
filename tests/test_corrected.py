"""Round trips: a region is sent out, other readers and writers change ids in it, and it comes back to train on."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorstore
import tifffile
from PIL import Image

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.checks import check_training_volumes
from lsdseg.data_utils.corrected import add_ground_truth, import_proofread, read_ids
from lsdseg.data_utils.export import export_dataset
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW, data_folder
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.errors import UserError

SHAPE, VOXEL_SIZE, OFFSET = (50, 56, 64), (8, 8, 8), (80, 160, 24)
SEGMENTATION = "volumes/segmentation_050"
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 255, SHAPE, dtype=np.uint8)
IDS = np.kron(RNG.integers(1, 9, (5, 7, 8)), np.ones((10, 8, 8))).astype(np.uint64) * 2**40  # more than 32 bits
# Voxels 4..45, 6..49, 10..59 of the sample.
REGION, PART = "112:448,208:560,104:504", (slice(4, 46), slice(6, 50), slice(10, 60))
BEGIN, SENT = (112, 208, 104), IDS[PART]
CHANGED, NEW, UNCLEAR = (3, 5, 7), 77, 99


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sample.zarr"
    write_array(path, RAW, GRAY, voxel_size=VOXEL_SIZE, offset=OFFSET)
    write_array(path, SEGMENTATION, IDS, voxel_size=VOXEL_SIZE, offset=OFFSET)
    return path


def script(name, *arguments):
    command = [sys.executable, CHECKOUT / "data_utils" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)


def send(sample, out, to, renumbered=False, dataset=SEGMENTATION):
    options = {"overwrite": False, "region": REGION, "renumbered": renumbered}
    export_dataset(sample, out, to=to, dataset=dataset, **options)


def change(ids):
    """Do what a person does: give one voxel a new id, and say of a box that it is unclear."""
    ids = np.array(ids)
    ids[CHANGED], ids[:2, :3, :4] = NEW, UNCLEAR
    return ids


def by_sections(sample, folder):
    """Seg2Link reads a folder of TIFFs with PIL, and exports another one."""
    send(sample, folder / "sent", "tiff-sections", renumbered=True)
    ids = change([np.array(Image.open(file)) for file in sorted((folder / "sent").glob("*.tif*"))])
    (folder / "seg_tiff").mkdir()
    for z, section in enumerate(ids):
        Image.fromarray(section.astype(np.uint16)).save(folder / "seg_tiff" / f"seg_slice{z:04}.tiff")
    return folder / "seg_tiff", {"region": REGION}


def by_npy(sample, folder):
    """Seg2Link saves y, x, z."""
    back, options = by_sections(sample, folder)
    ids = np.array([np.array(Image.open(file)) for file in sorted(back.iterdir())])
    np.save(folder / "seg-modified.npy", ids.transpose(1, 2, 0))
    return folder / "seg-modified.npy", options | {"axes": "yxz"}


def by_tiff(sample, folder):
    """An OME-TIFF, of which Fiji leaves the voxels only."""
    send(sample, folder / "sent.tif", "tiff", renumbered=True)
    tifffile.imwrite(folder / "back.tif", change(tifffile.imread(folder / "sent.tif")))
    return folder / "back.tif", {"region": REGION}


def by_store(to, driver, inside):
    """A program that changes what was sent in place, so it says where it lies."""

    def edit(sample, folder):
        send(sample, folder / "sent", to)
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder / 'sent' / inside}/"}}
        store = tensorstore.open(spec).result()
        ids = store[..., 0].T if driver == "neuroglancer_precomputed" else store
        ids.write(change(ids.read().result())).result()
        return folder / "sent", {}

    return edit


def write_annotation(path, ids, chunks, scale=VOXEL_SIZE, name="volumeAnnotationData/1"):
    """What the library of webKnossos writes: ids (z, y, x) from the origin of the world, in these chunks of 32."""
    folder = path.parent / "unpacked"
    codecs = [{"name": "transpose", "configuration": {"order": [3, 2, 1, 0]}}, {"name": "bytes"}]
    metadata = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 32, 32, 32]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [*codecs, {"name": "blosc", "configuration": {"cname": "lz4", "shuffle": "shuffle", "typesize": 1}}],
        "dimension_names": ["c", "x", "y", "z"],
        "data_type": "uint64",
        "shape": [1, *ids.shape[::-1]],
        "fill_value": 0,
    }
    codecs[1]["configuration"] = {"endian": "little"}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / name}/"}, "metadata": metadata}
    store = tensorstore.open(spec, create=True).result()
    for z, y, x in chunks:
        box = tuple(slice(n * 32, min(n * 32 + 32, size)) for n, size in zip((z, y, x), ids.shape, strict=True))
        store[(0, *box[::-1])].write(ids[box].T).result()
    properties = {"scale": {"factor": scale[::-1], "unit": "nanometer"}, "version": 1}
    (folder / "datasource-properties.json").write_text(json.dumps(properties))
    with zipfile.ZipFile(path.parent / "data_0_Volume.zip", "w") as layer:
        for file in sorted(folder.rglob("*")):
            layer.write(file, file.relative_to(folder))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("annotation.nml", "<things/>")
        outer.write(path.parent / "data_0_Volume.zip", "data_0_Volume.zip")
    return path


def in_world(ids):
    """Ids of the region, as voxels from the origin of the world."""
    begin = [b // v for b, v in zip(BEGIN, VOXEL_SIZE, strict=True)]
    world = np.zeros([b + n for b, n in zip(begin, ids.shape, strict=True)], np.uint64)
    world[tuple(slice(b, None) for b in begin)] = ids
    return world


def by_webknossos(sample, folder):
    """Only the chunk in which something was changed is stored."""
    send(sample, folder / "sent", "precomputed")
    annotation = write_annotation(folder / "back.zip", in_world(change(SENT)), [(0, 0, 0)])
    return annotation, {"region": REGION, "before": folder / "sent"}


def by_zarr(sample, folder):
    """A copy of the segmentation in which something was changed, as this suite writes it, beside another one."""
    write_array(folder / "back.zarr", "volumes/fragments", SENT, voxel_size=VOXEL_SIZE, offset=BEGIN)
    write_array(folder / "back.zarr", SEGMENTATION, change(SENT), voxel_size=VOXEL_SIZE, offset=BEGIN)
    return folder / "back.zarr", {"dataset": SEGMENTATION}


WAYS = {
    "zarr": by_zarr,
    "folder of TIFFs": by_sections,
    "npy": by_npy,
    "tiff": by_tiff,
    "precomputed": by_store("precomputed", "neuroglancer_precomputed", ""),
    "OME-Zarr": by_store("ome-zarr", "zarr", "0"),
    "webKnossos": by_webknossos,
}


def same_segments(ids, others):
    """Whether each id of one array is one id of the other."""
    pairs = np.unique(np.stack([ids.ravel(), others.ravel()]), axis=1)
    return all(len(np.unique(one)) == pairs.shape[1] for one in pairs)


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_back_lies_where_it_was_with_its_changes_and_a_mask(sample, tmp_path, way):
    if way == "webKnossos":  # its stored chunk ends in the region, and holds all that was changed
        assert all(b // v < 32 < b // v + n for b, v, n in zip(BEGIN, VOXEL_SIZE, SENT.shape, strict=True))
    back, options = WAYS[way](sample, tmp_path)
    import_proofread(back, tmp_path / "new.zarr", sample=sample, unknown=[UNCLEAR], context=(2, 3, 100), **options)
    raw, labels, mask = (open_array(tmp_path / "new.zarr", name) for name in (RAW, LABELS, LABELS_MASK))
    assert {tuple(array.voxel_size) for array in (raw, labels, mask)} == {VOXEL_SIZE}
    assert tuple(labels.offset) == tuple(mask.offset) == BEGIN
    np.testing.assert_array_equal(read(raw), GRAY[2:48, 3:53])
    assert tuple(raw.offset) == (96, 184, 24)
    expected = change(SENT)
    np.testing.assert_array_equal(read(mask), expected != UNCLEAR)
    ids = read(labels)
    assert (ids.dtype, ids[CHANGED]) == (np.uint64, NEW)
    assert not ids[expected == UNCLEAR].any()
    if way in ("zarr", "precomputed", "OME-Zarr", "webKnossos"):
        np.testing.assert_array_equal(ids[expected != UNCLEAR], expected[expected != UNCLEAR])
    else:  # with ids of few bits
        assert same_segments(ids, np.where(expected == UNCLEAR, 0, expected))
        assert ids.max() == NEW


def test_raw_and_segmentation_are_sent_and_trained_on_from_the_command_line(sample, tmp_path):
    settings = {
        "SYSTEM.NUM_WORKERS": 0,
        "TRAIN.DEVICE": "cpu",
        "TRAIN.THREADS": 1,
        "TRAIN.EPOCHS": 1,
        "MODEL_ISO.NUM_FMAPS": 2,
        "MODEL_ISO.NUM_FMAPS_OUT": 2,
        "MODEL_ISO.FMAP_INC_FACTOR": 1,
        "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2]],
        "MODEL_ISO.KERNEL_SIZE_DOWN": None,
        "MODEL_ISO.KERNEL_SIZE_UP": None,
        "MODEL_ISO.INPUT_SHAPE": (36, 36, 36),
        "MODEL_ISO.LSD_SIGMA": 24,
        "DATA.HOME": tmp_path,
    }
    cfg = load_config(overrides=[str(part) for pair in settings.items() for part in pair])
    folder = data_folder(cfg, "train")
    for name, options in [("raw", ["--dataset", RAW]), ("segments", ["--renumber"])]:
        sent = script("export.py", sample, tmp_path / name, "--to", "tiff-sections", f"--region={REGION}", *options)
        assert sent.returncode == 0, sent.stderr
        assert len(list((tmp_path / name).iterdir())) == 42
    np.testing.assert_array_equal([Image.open(f) for f in sorted((tmp_path / "raw").iterdir())], GRAY[PART])
    place = ["--sample", sample, "--region", REGION]
    done = script("import_proofread.py", tmp_path / "segments", folder / "new.zarr", *place)
    assert (done.returncode, "8 neurons, 100.0% of the voxels known" in done.stdout) == (0, True), done.stderr
    assert sorted(list_arrays(folder / "new.zarr")) == sorted([RAW, LABELS, LABELS_MASK])
    check_training_volumes([folder / "new.zarr"], cfg)
    with training_batches(cfg, [folder / "new.zarr"], tuple(task_channels(cfg)), 0, 1) as batches:
        batch = next(batches)
    assert batch.targets["affs"].any()


def test_numbers_are_the_ids_in_their_order(tmp_path):
    ids = np.array([[[0, 2**63 + 5, 7], [2**63 + 5, 9, 7]]], np.uint64)
    write_array(tmp_path / "in.zarr", SEGMENTATION, ids, voxel_size=VOXEL_SIZE, offset=OFFSET)
    options = {"to": "tiff", "dataset": None, "overwrite": True}
    export_dataset(tmp_path / "in.zarr", tmp_path / "out.tif", renumbered=True, **options)
    back = tifffile.imread(tmp_path / "out.tif")
    assert (back.dtype, back.tolist()) == (np.uint16, [[0, 3, 1], [3, 2, 1]])
    ids[0, 0, 0] = 2**64 - 3
    write_array(tmp_path / "in.zarr", SEGMENTATION, ids, voxel_size=VOXEL_SIZE, offset=OFFSET)
    with pytest.raises(UserError, match="holds ids for unlabeled voxels, which cannot be renumbered"):
        export_dataset(tmp_path / "in.zarr", tmp_path / "out.tif", renumbered=True, **options)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), back)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("112:448,208:560", "is not of the form Z0:Z1,Y0:Y1,X0:X1 in nm"),
        ("448:112,208:560,104:504", "every end must be larger than its begin"),
        ("112:448,208:560,104:5040", r"is not inside .* which covers 80:480,160:608,24:536 nm"),
        ("113:449,208:560,104:504", r"cuts voxels of .*\(8, 8, 8\) nm wide and begin at \(80, 160, 24\)"),
    ],
)
def test_regions_that_do_not_fit_are_refused(sample, tmp_path, region, message):
    with pytest.raises(UserError, match=message):
        export_dataset(sample, tmp_path / "out", to="tiff", dataset=RAW, overwrite=False, region=region)
    np.save(tmp_path / "back.npy", SENT)
    with pytest.raises(UserError, match=message):
        import_proofread(tmp_path / "back.npy", tmp_path / "new.zarr", sample=sample, region=region)
    assert [path.name for path in tmp_path.iterdir()] == ["back.npy"]


def _turned(folder, _):
    np.save(folder / "back.npy", SENT.transpose(1, 2, 0))
    return folder / "back.npy", {"region": REGION}


def _elsewhere(folder, _):
    write_array(folder / "back.zarr", LABELS, SENT, voxel_size=VOXEL_SIZE, offset=(80, 160, 24))
    return folder / "back.zarr", {"region": REGION}


def _annotation_with_axes(folder, _):
    return write_annotation(folder / "back.zip", in_world(SENT), [(0, 0, 0)]), {"region": REGION, "axes": "xyz"}


def _two_datasets(folder, sample):
    back, _ = by_zarr(sample, folder)
    return back, {}


def _cube(folder, _):
    np.save(folder / "back.npy", SENT[:40, :40, :40])
    return folder / "back.npy", {"region": "112:432,208:528,104:424"}


def _placeless(folder, _):
    np.save(folder / "back.npy", SENT)
    return folder / "back.npy", {}


def _nothing_known(folder, _):
    np.save(folder / "back.npy", np.full_like(SENT, 5))
    return folder / "back.npy", {"region": REGION, "unknown": [5]}


def _coarse(folder, sample):
    back = folder / "back.zarr"
    write_array(back, LABELS, SENT[::2, ::2, ::2], voxel_size=(16, 16, 16), offset=BEGIN)
    return back, {}


def _fractions(folder, _):
    np.save(folder / "back.npy", SENT / 2.0**41 + 0.25)
    return folder / "back.npy", {"region": REGION}


def _as_wkw(folder, _):
    (folder / "1").mkdir()
    with zipfile.ZipFile(folder / "layer.zip", "w") as layer:
        layer.writestr("1/z0/y0/x0.wkw", b"WKW")
    with zipfile.ZipFile(folder / "back.zip", "w") as outer:
        outer.write(folder / "layer.zip", "data_0_Volume.zip")
    return folder / "back.zip", {"region": REGION}


def _no_layer(folder, _):
    with zipfile.ZipFile(folder / "back.zip", "w") as outer:
        outer.writestr("annotation.nml", "<things/>")
    return folder / "back.zip", {"region": REGION}


def _no_zip(folder, _):
    (folder / "back.zip").write_text("hello")
    return folder / "back.zip", {"region": REGION}


def _other_voxels(folder, _):
    return write_annotation(folder / "back.zip", in_world(SENT), [(0, 0, 0)], scale=(40, 4, 4)), {"region": REGION}


def _pickled(folder, _):
    np.save(folder / "back.npy", np.array([{}]), allow_pickle=True)
    return folder / "back.npy", {"region": REGION}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_turned, r"holds \(44, 50, 42\) voxels, but region .* has \(42, 44, 50\): add --axes yxz"),
        (_elsewhere, f"covers 80:416,160:512,24:424 nm, not region {REGION}: correct or omit --region"),
        (_annotation_with_axes, "says which axis is which: omit --axes"),
        (_two_datasets, "holds volumes/fragments, volumes/segmentation_050: name the one to take with --dataset"),
        (_cube, "does not say which axis is which: add --axes yxz if Seg2Link wrote it, else --axes zyx"),
        (_placeless, "does not say where it lies in volumes/raw in .*: add --region Z0:Z1,Y0:Y1,X0:X1"),
        (_nothing_known, "no voxel of .* is known to be right"),
        (_coarse, r"has voxels of \(16, 16, 16\) nm, but .* of \(8, 8, 8\)"),
        (_fractions, "is float64 and holds [0-9.]*5, which is no exact id"),
        (_as_wkw, "was downloaded as WKW: download the annotation with volume data as Zarr"),
        (_no_layer, "has 0 volume layers"),
        (_no_zip, "is no annotation of webKnossos or damaged"),
        (_other_voxels, r"has voxels of \(40, 4, 4\) nm, but"),
        (_pickled, "is no array of numpy or damaged"),
    ],
)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(sample, tmp_path, make, message):
    (tmp_path / "in").mkdir()
    back, options = make(tmp_path / "in", sample)
    with pytest.raises(UserError, match=message):
        import_proofread(back, tmp_path / "new.zarr", sample=sample, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_without_what_was_sent_only_stored_chunks_of_an_annotation_are_known(sample, tmp_path):
    annotation = write_annotation(tmp_path / "back.zip", in_world(SENT), [(0, 0, 1), (1, 1, 0)])
    import_proofread(annotation, tmp_path / "new.zarr", sample=sample, region=REGION)
    z, y, x = (np.arange(n) + b // v for n, b, v in zip(SENT.shape, BEGIN, VOXEL_SIZE, strict=True))
    inside = np.zeros(SENT.shape, bool)
    for chunk in [(0, 0, 1), (1, 1, 0)]:
        along = [axis // 32 == n for axis, n in zip((z, y, x), chunk, strict=True)]
        inside |= along[0][:, None, None] & along[1][:, None] & along[2]
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(read(open_array(tmp_path / "new.zarr", LABELS_MASK)), inside)
    np.testing.assert_array_equal(read(open_array(tmp_path / "new.zarr", LABELS)), np.where(inside, SENT, 0))


def test_a_table_says_which_ids_are_right(tmp_path):
    table = tmp_path / "ids.csv"
    for text, ids in [
        ("7\n9\n\n7\n", [7, 9]),
        ("made by me,,\nName,ID_BBOX2,ID_BBOX3\naxon,12.0,\nglia 4,3,18446744073709551612\n", [3, 12, 2**64 - 4]),
        ("\ufeffid;note\n5;see 6\n", [5]),
    ]:
        table.write_text(text, encoding="utf-8")
        assert read_ids(table).tolist() == ids
    for text, message in [("ID\n3\naxon\n", "line 3: 'axon' is no id"), ("ID,x\n,4\n", "holds no ids")]:
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read_ids(table)
    table.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(UserError, match=r"is no table of ids .*: save it as CSV"):
        read_ids(table)


def test_the_published_script_adds_the_proofread_ids_to_a_volume(tmp_path):
    volume, ids = tmp_path / "a.zarr", SENT // 2**40
    write_array(volume, RAW, GRAY[PART], voxel_size=VOXEL_SIZE, offset=BEGIN)
    np.save(tmp_path / "seg-modified.npy", ids.transpose(1, 2, 0).astype(np.uint16))
    (tmp_path / "ids.csv").write_text("ID_BBOX2,ID_BBOX3\n3,1\n,4\n")
    published = ["-f", tmp_path / "seg-modified.npy", "-df", tmp_path / "ids.csv", "-op", volume]
    for _ in range(2):  # a second run replaces what the first one wrote
        done = script("make_gt_from_seg2link_vols.py", *published, "-res", "8,8,8", "-off", "112,208,104")
        assert done.returncode == 0, done.stderr
    right = np.isin(ids, [1, 3, 4])
    labels, mask = open_array(volume, LABELS), open_array(volume, LABELS_MASK)
    np.testing.assert_array_equal(read(labels), np.where(right, ids, 0))
    np.testing.assert_array_equal(read(mask), right)
    assert (tuple(labels.offset), tuple(labels.voxel_size)) == (BEGIN, VOXEL_SIZE)
    np.testing.assert_array_equal(read(open_array(volume, RAW)), GRAY[PART])


def test_the_published_script_takes_the_place_of_raw_or_says_what_is_wrong(tmp_path):
    np.save(tmp_path / "seg.npy", SENT.transpose(1, 2, 0))
    with pytest.raises(UserError, match=r"holds no volumes/raw .*: give -res Z,Y,X and -off Z,Y,X"):
        add_ground_truth(tmp_path / "seg.npy", tmp_path / "a.zarr")
    write_array(tmp_path / "a.zarr", RAW, GRAY[PART], voxel_size=VOXEL_SIZE, offset=BEGIN)
    (tmp_path / "none.csv").write_text("2\n")
    for options, message in [
        ({"only": tmp_path / "none.csv"}, r"no voxel of .* is known"),
        ({"axes": "zyx"}, r"is not inside volumes/raw in .*a.zarr"),
        ({"offset": (0, 0, 0)}, r"is not inside volumes/raw in .*a.zarr"),
    ]:
        with pytest.raises(UserError, match=message):
            add_ground_truth(tmp_path / "seg.npy", tmp_path / "a.zarr", **options)
        assert list_arrays(tmp_path / "a.zarr") == [RAW]
        assert "partial" not in " ".join(map(str, (tmp_path / "a.zarr").rglob("*")))
    add_ground_truth(tmp_path / "seg.npy", tmp_path / "a.zarr")
    labels = open_array(tmp_path / "a.zarr", LABELS)
    assert tuple(labels.offset) == BEGIN
    np.testing.assert_array_equal(read(labels), SENT)
