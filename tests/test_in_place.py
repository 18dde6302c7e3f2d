"""Volumes that are read where they are, on disk and behind a URL."""

import functools
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_formats import MARKED, OFFSET, SHAPE, VOXEL_SIZE, VOXELS, WRITERS, write_n5, write_precomputed

from lsdseg.config.loader import load_config
from lsdseg.data_utils.formats import PLACE
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW, data_folder, output_path, volumes_in
from lsdseg.data_utils.place_files import read_place
from lsdseg.data_utils.volumes import has_array, list_arrays, open_array, read, write_array
from lsdseg.engine.blocks.markers import record_files, records_in
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import save_untrained

WITH_OFFSET = {"volume.hdf", "volume.n5", "precomputed", "sharded", "ome04.zarr", "ome05.zarr", "zarr3.zarr"}


class Server:
    """A folder on loopback, which refuses to answer while `is_down()`."""

    def __init__(self, folder):
        self.is_down = lambda: False
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                if server.is_down():
                    self.send_error(503)
                else:
                    super().do_GET()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def served(tmp_path):
    server = Server(tmp_path)
    yield server
    server.server.shutdown()
    server.server.server_close()


def place(tmp_path, text):
    path = tmp_path / f"fly{PLACE}"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_where_it_is(name, tmp_path):
    WRITERS[name](tmp_path / name, VOXELS)
    array = open_array(tmp_path / name, RAW, default_voxel_size=VOXEL_SIZE)
    assert tuple(array.voxel_size) == VOXEL_SIZE
    assert tuple(array.offset) == (OFFSET if name in WITH_OFFSET else (0, 0, 0))
    np.testing.assert_array_equal(read(array), VOXELS)
    inside = np.s_[2:8:2, 3:9, 5:18]
    np.testing.assert_array_equal(read(array, inside), VOXELS[inside])
    np.testing.assert_array_equal(read(array, np.s_[-1, 3:9]), VOXELS[-1, 3:9])
    np.testing.assert_array_equal(array[array.roi], VOXELS)
    assert has_array(tmp_path / name, list_arrays(tmp_path / name)[0])
    assert not has_array(tmp_path / name, "volumes/labels/neuron_ids")


@pytest.mark.parametrize("name", ["volume.n5", "precomputed", "ome04.zarr", "ome05.zarr", "zarr3.zarr"])
def test_a_volume_behind_a_url(name, tmp_path, served):
    WRITERS[name](tmp_path / name, VOXELS)
    dataset = {"volume.n5": "em", "zarr3.zarr": "em"}.get(name)
    text = f"location: {served.url}/{name}\n" + (f"dataset: {dataset}\n" if dataset else "")
    array = open_array(place(tmp_path, text), RAW)
    assert (tuple(array.voxel_size), tuple(array.offset)) == (VOXEL_SIZE, OFFSET)
    np.testing.assert_array_equal(read(array), VOXELS)


def test_a_place_says_what_the_volume_does_not_and_which_box(tmp_path):
    write_n5(tmp_path / "fly.n5", VOXELS, attributes={})
    with pytest.raises(UserError, match=r"em in .*fly.n5 has no voxel size: .*or voxel_size in a file NAME.volume"):
        open_array(place(tmp_path, "fly.n5"), RAW)
    text = "location: fly.n5\nvoxel_size: [40, 8, 4]\noffset: [400, 80, 8]\nbegin: [1, 2, 3]\nshape: [8, 9, 10]\n"
    array = open_array(place(tmp_path, text), RAW)
    assert tuple(array.offset) == (440, 96, 20)
    np.testing.assert_array_equal(read(array), VOXELS[1:9, 2:11, 3:13])
    at = tuple(o + m * v for o, m, v in zip(OFFSET, MARKED, VOXEL_SIZE, strict=True))
    marked = np.argwhere(read(array) == 255)[0] * VOXEL_SIZE + array.offset
    assert tuple(marked) == at


def test_a_place_of_a_zarr_is_that_zarr(tmp_path):
    write_array(tmp_path / "fly.zarr", "em", VOXELS, voxel_size=VOXEL_SIZE, offset=OFFSET)
    write_array(tmp_path / "fly.zarr", "ids", VOXELS, voxel_size=VOXEL_SIZE, offset=OFFSET)
    path = place(tmp_path, "location: fly.zarr\ndataset: em\n")
    assert (
        open_array(path, RAW)._source_data.__class__ is open_array(tmp_path / "fly.zarr", "em")._source_data.__class__
    )
    assert has_array(path, "ids")
    assert not has_array(path, "others")
    with pytest.raises(UserError, match=r"box begins at .* correct begin and shape in the file NAME.volume"):
        open_array(place(tmp_path, "location: fly.zarr\ndataset: em\nbegin: [0, 0, 9]\nshape: [1, 1, 10]\n"), RAW)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no volume"),
        ("[1, 2]", "names no volume"),
        ("location: [", "cannot be read"),
        ("location: a\nvoxelsize: [1, 1, 1]", "has the key voxelsize: use location, dataset, voxel_size"),
        ("location: a\nvoxel_size: 8", "has voxel_size 8: give three numbers, z, y, x"),
        ("location: a\nbegin: [1, 2, 2.5]", "has begin .*: give three numbers"),
        ("none.n5", r"none.n5 does not exist"),
    ],
)
def test_damaged_places_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        open_array(place(tmp_path, text), RAW)


def test_several_volumes_need_a_choice(tmp_path):
    for name in ("a", "b"):
        write_n5(tmp_path / "fly.n5" / name, VOXELS)
    (tmp_path / "fly.n5/attributes.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a/em, b/em: name the one to take with DATA.RAW, or as dataset"):
        open_array(tmp_path / "fly.n5", RAW)
    assert open_array(tmp_path / "fly.n5", "b/em").shape == SHAPE


def test_a_server_that_refuses_or_has_nothing_is_named(tmp_path, served):
    with pytest.raises(UserError, match=f"{served.url}/none holds no volume: tried info of Neuroglancer precomputed"):
        open_array(place(tmp_path, f"{served.url}/none"), RAW)
    served.is_down = lambda: True
    with pytest.raises(UserError, match=f"{served.url}/fly (cannot be read|has not answered)"):
        open_array(place(tmp_path, f"{served.url}/fly"), RAW)


def test_a_server_that_is_not_there_is_named_within_seconds(tmp_path):
    with pytest.raises(UserError, match=r"127.0.0.1:9/fly (cannot be read|has not answered)"):
        open_array(place(tmp_path, "http://127.0.0.1:9/fly"), RAW)


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A tiny network with random weights."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "DATA.HOME": tmp_path,
        "TRAIN.CHECKPOINT": tmp_path / "run/model_checkpoint_1",
        "TRAIN.DEVICE": "cpu",
        "TRAIN.THREADS": 1,
        "SYSTEM.NUM_WORKERS": 2,
        "CLUSTER.SAME_ERRORS": 1,
        "MODEL_ISO.VOXEL_SIZE": VOXEL_SIZE,
        "MODEL_ISO.NUM_FMAPS": 2,
        "MODEL_ISO.NUM_FMAPS_OUT": 2,
        "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2]],
        "MODEL_ISO.KERNEL_SIZE_DOWN": None,
        "MODEL_ISO.KERNEL_SIZE_UP": None,
        "MODEL_ISO.PAD_CONV": "same",
        "MODEL_ISO.INPUT_SHAPE": (8, 8, 8),
        "MODEL_ISO.GROW_INPUT": (0, 0, 0),
    }
    made = load_config(overrides=[str(part) for item in settings.items() for part in item])
    torch.manual_seed(0)
    save_untrained(made.TRAIN.CHECKPOINT, build_model(made), made)
    return made


def predicted(cfg, name="fly"):
    return read(open_array(output_path(cfg, f"{name}.zarr"), "volumes/pred_affs"))


def test_volumes_of_any_format_are_predicted_from_the_test_folder(cfg):
    folder = data_folder(cfg, "test")
    write_array(folder / "fly.zarr", RAW, VOXELS, voxel_size=VOXEL_SIZE, offset=OFFSET)
    predict(cfg)
    expected = predicted(cfg)
    WRITERS["imagej.tif"](folder / "fly.tif", VOXELS)  # the zarr may be a copy of it
    (folder / "notes.txt").touch()
    assert [path.name for path in volumes_in(cfg, "test")] == ["fly.zarr"]
    WRITERS["imagej.tif"](folder / "stack.tif", VOXELS)
    write_precomputed(folder / "pre", VOXELS)
    write_precomputed(folder / "part", VOXELS)
    (folder / "named.volume").write_text("part")
    assert [path.name for path in volumes_in(cfg, "test")] == ["fly.zarr", "named.volume", "pre", "stack.tif"]
    predict(cfg)
    for name in ("named", "pre", "stack"):
        np.testing.assert_array_equal(predicted(cfg, name), expected)


def test_a_served_volume_is_predicted_in_blocks_and_goes_on_when_its_server_is_back(cfg, tmp_path, served):
    folder = data_folder(cfg, "test")
    folder.mkdir(parents=True)
    write_precomputed(tmp_path / "pre", VOXELS)
    (folder / "fly.volume").write_text(f"{served.url}/pre")
    markers = output_path(cfg, "fly.zarr").with_suffix(".blocks") / "predict"
    served.is_down = lambda: len(records_in(record_files(markers))) >= 3
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/pre cannot be read .* the same command does only these"):
        predict_blockwise(cfg)
    served.is_down = lambda: False
    assert 3 <= len(records_in(record_files(markers))) < 12
    predict_blockwise(cfg)
    assert len(records_in(record_files(markers))) == 12
    found = predicted(cfg)
    write_array(folder / "copy.zarr", RAW, VOXELS, voxel_size=VOXEL_SIZE, offset=OFFSET)
    predict(cfg)
    np.testing.assert_array_equal(found, predicted(cfg, "copy"))


def test_a_place_is_read_as_it_was_written(tmp_path, monkeypatch):
    path = place(tmp_path, "location: file:///data/em\nbegin: [0, 1, 2]\n")
    assert read_place(path).location == "/data/em"
    monkeypatch.chdir(tmp_path)
    path.write_text("location: ../em\nneuron_labels: {dataset: ids}\nneuron_labels_mask: mask.tif\n")
    beside = read_place(Path("..", tmp_path.name, path.name)).beside
    assert beside[LABELS][:2] == (f"../{tmp_path.name}/../em", "ids")
    assert beside[LABELS_MASK][:2] == (f"../{tmp_path.name}/mask.tif", None)
    assert read_place(tmp_path / "other.tif").location == str(tmp_path / "other.tif")
