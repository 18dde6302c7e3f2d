"""The page of view.py in a real browser, and what is wrong before there is a page."""

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import neuroglancer
import numpy as np
import pytest
from PIL import Image

from lsdseg.config.loader import load_config
from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.checks import check_training_volumes
from lsdseg.data_utils.layout import data_folder, edits_path, quality_path
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.records import identity
from lsdseg.data_utils.segment_tables import find_tables, write_tables
from lsdseg.data_utils.volumes import open_array, read, write_array
from lsdseg.engine.post.segments import segments_of_volume
from lsdseg.engine.sample import Sample
from lsdseg.engine.training.lsd import local_shape_descriptors
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.engine.view.export_labels import export_labels
from lsdseg.engine.view.layers import find_layer, layers_of
from lsdseg.engine.view.page import Voxels, listen, make_page
from lsdseg.engine.view.proofread import Editor, open_proofreading
from lsdseg.engine.view.sizes import Sizes
from lsdseg.engine.view.walk import Walk, read_places
from lsdseg.errors import UserError
from lsdseg.rag import open_store

CHECKOUT = Path(__file__).resolve().parents[1]
PLACED = {"voxel_size": (10, 10, 10), "offset": (200, -100, 40)}
NEAR = [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
FAR = [[-3, 0, 0], [0, -3, 0], [0, 0, -3], [-9, 0, 0]]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LETTERS, BUTTONS = 40, 30  # pixels at the left, where the axes are named, and at the top
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A volume and an output with every kind of array."""
    folder = tmp_path_factory.mktemp("view")
    volume, output = folder / "volume.zarr", folder / "sample.zarr"
    raw, labels, mito = make_phantom((24, 40, 48), seed=1)
    write_array(volume, "volumes/raw", raw, **PLACED)
    write_array(volume, "volumes/labels/neuron_ids", labels, **PLACED)
    write_array(volume, "volumes/labels/labels_mask", np.ones_like(raw), **PLACED)
    rng = np.random.default_rng(0)
    affinities = rng.integers(100, 256, (7, *raw.shape), np.uint8)
    write_array(output, "volumes/pred_affs", affinities, attributes={"offsets": NEAR + FAR}, **PLACED)
    write_array(output, "volumes/pred_placement", affinities[:3], attributes={"offsets": NEAR}, **PLACED)
    write_array(output, "volumes/pred_lsds", local_shape_descriptors(labels, 80, (10, 10, 10)), **PLACED)
    write_array(output, "volumes/pred_mito", (mito[None] % 2 + 1).astype(np.uint8) * 100, **PLACED)
    write_array(
        output, "volumes/fragments", labels * 8 + (np.indices(labels.shape) // 12).sum(0).astype("u8"), **PLACED
    )
    for threshold in (0.4, 0.6):
        made = {"method": "waterz", "merge_function": "mean", "threshold": threshold}
        write_array(output, f"volumes/segmentation_0{threshold * 100:.0f}", labels, attributes=made, **PLACED)
    made = {"method": "waterz", "merge_function": "hist_quant_75", "threshold": 0.5}
    write_array(output, "volumes/final_segmentation_hist_quant_75_050", labels, attributes=made, **PLACED)
    return volume, output


@pytest.fixture(scope="module")
def layers(sample):
    return layers_of(load_config(), *sample)


@pytest.fixture(scope="module")
def server():
    listen("127.0.0.1", 0)
    yield
    neuroglancer.server.stop()


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium that draws on the CPU."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright here (pip install playwright)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A page in the browser, without anything around the volume, and what went wrong in it."""

    def __init__(self, chromium, page, name):
        self.page, self.name, self.errors = page, name, []
        with page.config_state.txn() as state:
            state.show_ui_controls = state.show_panel_borders = False
        with page.txn() as state:
            state.show_axis_lines = state.show_default_annotations = state.show_scale_bar = False
            state.cross_section_background_color = "#000000"
        self.tab = chromium.new_page(viewport={"width": 480, "height": 400})
        # Neuroglancer asks a layer that was replaced, while its source was on the way, for its chunks. Nothing is lost.
        replaced = "undefined (reading 'chunkManager')"
        self.tab.on("pageerror", lambda error: replaced in str(error) or self.errors.append(str(error)))
        self.tab.on("console", self._note)
        self.tab.goto(str(page))

    def _note(self, message):
        url = message.location["url"]
        # Chromium counts an answer of 412 as an error: page and server changed the state at the same moment, and the
        # page takes that of the server. There is no icon.
        expected = url.endswith("favicon.ico") or ("/state/" in url and " 412 " in message.text)
        if message.type == "error" and not expected:
            self.errors.append(f"{message.text} ({url})")

    def show(self, *names, layout="xy", **controls):
        with self.page.txn() as state:
            state.layout = layout
            for layer in state.layers:
                layer.visible = layer.name in names
                if layer.visible and controls:
                    layer.layer.shader_controls = controls

    def wait_for(self, condition, seconds=30):
        """The pixels (y, x, 3) of the page as soon as they meet a condition. It is a picture to look at, too."""
        until = time.monotonic() + seconds
        while True:
            picture = self.tab.screenshot()
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)[BUTTONS:, LETTERS:]
            if condition(pixels) or time.monotonic() > until:
                break
            self.tab.wait_for_timeout(100)
        assert condition(pixels), f"{self.name} was not drawn"
        return pixels


def drawn(pixels):
    return (pixels.max(axis=2) > 30).mean()


def colored(pixels):
    return ((pixels.max(axis=2) - pixels.min(axis=2)) > 30).mean()


def test_every_kind_of_layer_is_drawn(layers, server, chromium, tmp_path):
    tab = Tab(chromium, make_page(layers, "test"), "page")
    tab.show()
    tab.wait_for(lambda pixels: drawn(pixels) < 0.01)
    for layer in layers:
        tab.name = layer.name
        tab.show()
        tab.wait_for(lambda pixels: drawn(pixels) < 0.01)
        tab.show(layer.name)
        pixels = tab.wait_for(lambda pixels: drawn(pixels) > 0.2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{layer.name}.png")
        if layer.name in ("affinities", "LSDs", "fragments") or layer.kind == "segmentation":
            assert colored(pixels) > 0.1, layer.name
        elif layer.name in ("raw", "mito"):
            assert colored(pixels) < 0.01, layer.name
    assert not tab.errors


def test_a_slider_shows_other_channels(layers, server, chromium):
    tab = Tab(chromium, make_page(layers, "test"), "other channels")
    tab.show("LSDs", group=1)  # one channel, in gray
    tab.wait_for(lambda pixels: drawn(pixels) > 0.2 and colored(pixels) < 0.01)
    tab.show("affinities", group=2)  # one offset along z, in red
    pixels = tab.wait_for(lambda pixels: drawn(pixels) > 0.2 and pixels[..., 1:].max() == 0)
    assert pixels[..., 0].max() > 100
    assert not tab.errors


def test_two_segmentations_side_by_side(layers, server, chromium):
    compare = [find_layer(layers, name) for name in ("segmentation_040", "volumes/segmentation_060")]
    page = make_page(layers, "test", compare)
    tab = Tab(chromium, page, "side by side")
    halves = tab.wait_for(lambda pixels: min(colored(pixels[:, :190]), colored(pixels[:, 250:])) > 0.1)
    with page.txn() as state:
        assert [side.layers[-1] for side in state.layout.children] == ["segmentation mean 0.4", "segmentation mean 0.6"]
        state.position = np.array(state.position) + [10, 0, 0]
    moved = tab.wait_for(lambda pixels: abs(pixels - halves).mean() > 1)
    assert abs(moved[:, :190] - halves[:, :190]).mean() > 1
    assert abs(moved[:, 250:] - halves[:, 250:]).mean() > 1
    assert not tab.errors


def test_layers_lie_where_their_attributes_say(server, chromium, tmp_path):
    """The same box in voxels of two sizes, and with an offset between the voxels of raw."""
    raw, boxes = np.zeros((40, 40, 40), np.uint8), np.zeros((10, 12, 14), np.uint64)
    raw[10:30, 12:20, 16:28] = 255  # in nm from 0: z 100..300, y 120..200, x 160..280
    boxes[2:7, 2:4, 4:7] = 7
    write_array(tmp_path / "v.zarr", "volumes/raw", raw, voxel_size=(10, 10, 10), offset=(0, 0, 0))
    write_array(tmp_path / "v.zarr", "volumes/boxes", boxes, voxel_size=(40, 40, 40), offset=(20, 40, 0))
    layers = layers_of(load_config(), tmp_path / "v.zarr", None)
    tab = Tab(chromium, make_page(layers, "test"), "boxes")
    places = []
    for layer in layers:
        tab.show()
        tab.wait_for(lambda pixels: drawn(pixels) == 0)
        tab.show(layer.name)
        pixels = tab.wait_for(lambda pixels: drawn(pixels) > 0.01)
        rows, columns = np.nonzero(pixels.max(axis=2) > 30)
        places.append([rows.min(), rows.max(), columns.min(), columns.max()])
    assert np.abs(np.subtract(*places)).max() <= 2
    assert not tab.errors


@pytest.mark.parametrize("dtype", ["bool", "int8", ">u2", "int64", "float16", "float64"])
def test_types_of_voxels(dtype, server, chromium, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 2, (8, 8, 8)).astype(dtype)
    write_array(tmp_path / "v.zarr", "volumes/some", voxels, voxel_size=(40, 10, 10), offset=(0, 0, 0))
    layers = layers_of(load_config(), tmp_path / "v.zarr", None)
    tab = Tab(chromium, make_page(layers, "test"), dtype)
    tab.show("some")
    tab.wait_for(lambda pixels: 0.01 < drawn(pixels) < 0.04)  # about half of the voxels
    assert not tab.errors


def test_a_damaged_chunk_is_one_line(tmp_path, capsys):
    voxels = np.random.default_rng(0).integers(0, 255, (8, 8, 8), np.uint8)
    write_array(tmp_path / "v.zarr", "volumes/raw", voxels, voxel_size=(10, 10, 10), offset=(0, 0, 0))
    (layer,) = layers_of(load_config(), tmp_path / "v.zarr", None)
    chunk = tmp_path / "v.zarr" / "volumes" / "raw" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.raises(ValueError, match="volumes/raw"):
        Voxels(layer.array)[:4, :4, :4]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    (layer,) = layers_of(load_config(), tmp_path / "v.zarr", None)  # the rest is shown
    assert "is damaged" in capsys.readouterr().out
    assert layer.kind == "image"


def test_meshes_of_selected_segments(layers, server, chromium):
    tab = Tab(chromium, make_page(layers, "test"), "mesh")
    tab.show("neuron_ids", layout="3d")
    with tab.page.txn() as state:
        state.show_slices = False
        state.layers["neuron_ids"].segments = [1, 2, 3, 4, 5, 6]
    tab.wait_for(lambda pixels: colored(pixels) > 0.02)
    assert not tab.errors


def test_layers_and_their_names(layers, sample):
    assert [layer.name for layer in layers] == [
        "raw",
        "labels_mask",
        "neuron_ids",
        "LSDs",
        "affinities",
        "mito",
        "placement",
        "fragments",
        "final segmentation hist_quant_75 0.5",
        "segmentation mean 0.4",
        "segmentation mean 0.6",
    ]
    kinds = {layer.name: layer.kind for layer in layers}
    images = {name for name, kind in kinds.items() if kind == "image"}
    assert images == {"raw", "LSDs", "affinities", "mito", "placement"}
    assert [layer.name for layer in layers if layer.visible] == ["raw", "segmentation mean 0.4"]
    sample[1].with_name("sample_scores.json").write_text('{"best": "volumes/segmentation_060"}')
    best = layers_of(load_config(), *sample)
    sample[1].with_name("sample_scores.json").unlink()
    assert [layer.name for layer in best if layer.visible] == ["raw", "segmentation mean 0.6"]


def test_sections_and_pyramids(tmp_path):
    for number in (3, 4):
        section = np.full((8, 9), number, np.uint8)
        write_array(tmp_path / "v.zarr", f"volumes/raw/{number}", section, voxel_size=(10, 10), offset=(0, 0))
        level = np.full((8 // (number - 2),) * 3, number, np.uint8)
        write_array(tmp_path / "v.zarr", f"pyramid/{number}", level, voxel_size=(10,) * 3, offset=(0, 0, 0))
    found = {layer.dataset: layer.array.shape for layer in layers_of(load_config(), tmp_path / "v.zarr", None)}
    assert found == {"volumes/raw": (2, 8, 9), "pyramid/3": (8, 8, 8)}


def test_what_cannot_be_shown_is_said(tmp_path, capsys):
    write_array(tmp_path / "v.zarr", "volumes/raw", np.zeros((8, 9, 9), "u1"), voxel_size=(10,) * 3, offset=(0,) * 3)
    write_array(tmp_path / "v.zarr", "volumes/flat", np.zeros((8, 9), "u1"), voxel_size=(10, 10), offset=(0, 0))
    assert [layer.name for layer in layers_of(load_config(), tmp_path / "v.zarr", None)] == ["raw"]
    assert "left out: volumes/flat" in capsys.readouterr().out


def run(*arguments, cwd=None):
    command = [sys.executable, str(CHECKOUT / "view.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def refused(*arguments, cwd=None):
    """The one line that view.py ends with."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_port_taken(sample):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(sample[1], "--port", port)
    assert f"port {port} of 127.0.0.1 is taken: choose another with --port" in line


def test_address_of_another_machine(sample):
    assert "cannot listen at 192.0.2.1" in refused(sample[1], "--host", "192.0.2.1")


def test_missing_and_empty_zarrs(tmp_path, sample):
    assert "does not exist" in refused(tmp_path / "no.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(UserError, match=r"nothing to show in .*empty.zarr.*no datasets"):
        layers_of(load_config(), None, tmp_path / "empty.zarr")
    with pytest.raises(UserError, match=r"no.zarr does not exist"):
        layers_of(load_config(), tmp_path / "no.zarr", sample[1])


def test_config_without_output(tmp_path, sample):
    folder = tmp_path / "data" / "X" / "data_3d" / "test"
    folder.mkdir(parents=True)
    shutil.copytree(sample[0], folder / "volume.zarr")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"DATA: {{HOME: {tmp_path}, DATA_DIR_PATH: data, BRAIN_VOL: X, OUTFILE: {tmp_path}/out}}\n"
        f"TRAIN: {{CHECKPOINT: {tmp_path}/run/model_checkpoint_1}}\n"
    )
    assert "there is no output" in refused("-c", config)


def test_comparing_and_proofreading_exclude_each_other(sample):
    assert "--compare shows" in refused(sample[1], "--compare", "a", "b", "--proofread", "0.5")


def test_neither_zarr_nor_config():
    assert "name a zarr or a config" in refused()


def test_volume_elsewhere(tmp_path):
    arrays = {"volume.zarr": ("volumes/raw", "u1", 0), "sample.zarr": ("volumes/fragments", "u8", 1000)}
    for name, (dataset, dtype, offset) in arrays.items():
        voxels = np.ones((8, 8, 8), dtype)
        write_array(tmp_path / name, dataset, voxels, voxel_size=(10, 10, 10), offset=(offset, 0, 0))
    with pytest.raises(UserError, match=r"volumes/fragments at 1000:1080,.* share no voxel"):
        layers_of(load_config(), tmp_path / "volume.zarr", tmp_path / "sample.zarr")


def test_unknown_segmentation_to_compare(layers):
    with pytest.raises(UserError, match=r"no segmentation 'segmentation_99' to compare: choose from .*fragments"):
        find_layer(layers, "segmentation_99")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_prints_link_and_tunnel(sample, number):
    command = [sys.executable, str(CHECKOUT / "view.py"), str(sample[1]), "--volume", str(sample[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stdout.readline() for _ in range(4)]
        finally:
            process.send_signal(number)
        assert process.wait(60) == 0
    assert lines[0].startswith("sample: http://127.0.0.1:")
    assert len(lines[0].split("/v/")[1].strip(" /\n")) == 40  # the token
    port = lines[0].split(":")[3].split("/")[0]
    assert f"ssh -L {port}:127.0.0.1:{port} " in lines[2]


@pytest.fixture
def chain(tmp_path):
    """Four fragments side by side along x; the contact in the middle is the least sure."""
    cfg = load_config(overrides=["DATA.HOME", str(tmp_path), "INS_SEGMENT.BLOCK_SIZE", "(8, 32, 32)"])
    output = tmp_path / "sample.zarr"
    fragments = np.broadcast_to(np.repeat(np.arange(1, 5, dtype=np.uint64), 8), (8, 32, 32)).copy()
    write_array(output, "volumes/fragments", fragments, **PLACED)
    sample = Sample(cfg, output, output)
    store = open_store(cfg, output, "w", identity(open_array(output, "volumes/fragments")))
    centers = [[240, 60, x] for x in (80, 160, 240, 320)]
    store.write_nodes(0, np.arange(1, 5, dtype=np.uint64), centers)
    ends = np.arange(1, 4, dtype=np.uint64)
    store.write_edges("mean", 0, ends, ends + np.uint64(1), np.array([0.1, 0.4, 0.2], np.float32))
    store.finish_nodes()
    store.finish_edges("mean")
    return sample


def actions_in(sample):
    return [json.loads(line)["action"] for line in edits_path(sample.output).read_text().splitlines()]


class Columns:
    """What the page shows of the four fragments."""

    def __init__(self, tab):
        self.tab = tab
        pixels = tab.wait_for(lambda pixels: colored(pixels) > 0.1)
        rows, columns = np.nonzero((pixels.max(axis=2) - pixels.min(axis=2)) > 20)
        width = (np.ptp(columns) + 1) / 4
        self.xs = [int(columns.min() + width * (n + 0.5)) for n in range(4)]
        self.y = int(np.mean(rows))

    def groups(self, pixels):
        """A number for each color, in the order of the fragments."""
        colors = [tuple(pixels[self.y, x] // 8) for x in self.xs]
        return [colors.index(color) for color in colors]

    def wait_for(self, *groups):
        return self.tab.wait_for(lambda pixels: self.groups(pixels) == list(groups))

    def point(self, number):
        self.tab.tab.mouse.move(self.xs[number] + LETTERS, self.y + BUTTONS)
        self.tab.tab.wait_for_timeout(200)

    def press(self, key, number):
        self.point(number)
        self.tab.tab.keyboard.press(key)
        self.tab.tab.wait_for_timeout(200)


def editing_tab(chromium, sample):
    page = make_page(layers_of(sample.cfg, sample.volume, sample.output), "test")
    editor = Editor(page, open_proofreading(sample, 0.5, author="ada"))
    tab = Tab(chromium, page, "proofread")
    tab.show(editor.name)
    return Columns(tab)


def test_keys_split_merge_and_undo(chain, server, chromium):
    columns, others = (editing_tab(chromium, chain) for _ in range(2))
    columns.wait_for(0, 0, 0, 0)
    columns.press("c", 0)
    columns.press("c", 3)
    columns.wait_for(0, 0, 2, 2)
    others.wait_for(0, 0, 2, 2)
    assert actions_in(chain) == ["split"]
    columns.press("u", 0)
    columns.wait_for(0, 0, 0, 0)
    columns.press("c", 2)
    columns.press("c", 3)
    columns.wait_for(0, 0, 0, 3)
    for number in (0, 3):  # select both
        columns.point(number)
        columns.tab.tab.mouse.dblclick(columns.xs[number] + LETTERS, columns.y + BUTTONS)
        columns.tab.tab.wait_for_timeout(300)
    columns.press("m", 1)
    columns.wait_for(0, 0, 0, 0)
    others.wait_for(0, 0, 0, 0)
    assert actions_in(chain) == ["split", "undo", "split", "merge"]
    columns.press("u", 0)
    columns.wait_for(0, 0, 0, 3)
    assert actions_in(chain)[-1] == "undo"
    columns.press("d", 3)
    columns.tab.tab.get_by_text("segment 4 is done, one of 1").wait_for(timeout=5000)
    assert actions_in(chain)[-1] == "mark"
    assert not columns.tab.errors
    assert not others.tab.errors


def test_a_key_shows_edges_by_their_scores(chain, server, chromium):
    columns = editing_tab(chromium, chain)
    columns.press("g", 1)
    columns.tab.tab.get_by_text("3 edges of segment 1").wait_for(timeout=5000)
    columns.tab.show("edges")
    pixels = columns.tab.wait_for(lambda pixels: colored(pixels) > 0.001)
    bluish, reddish = pixels[..., 2] > pixels[..., 0] + 60, pixels[..., 0] > pixels[..., 2] + 60
    assert bluish.sum() > 20  # the edge of 0.1
    assert reddish.sum() > 20  # that of 0.4
    assert np.nonzero(bluish)[1].mean() < np.nonzero(reddish)[1].mean()
    assert not columns.tab.errors


def test_mistakes_are_said_on_the_page(chain, server, chromium):
    columns = editing_tab(chromium, chain)
    for keys, reason in (("m", "select two segments"), ("cc", "both places are in one fragment"), ("u", "no edit in")):
        for key in keys:
            columns.press(key, 0)
        columns.tab.tab.get_by_text(reason).wait_for(timeout=5000)
    assert not edits_path(chain.output).exists() or actions_in(chain) == []


def test_edits_of_segments_that_are_gone(chain):
    proofreading = open_proofreading(chain, 0.5)
    with pytest.raises(UserError, match="segment 99 is no longer there"):
        proofreading.merge(1, 99)
    with pytest.raises(UserError, match="no segment at this place"):
        proofreading.fragment_at((0, 0, 0))
    assert proofreading.fragment_at((205, -95, 40 + 319)) == 4
    assert proofreading.split(1, 4) == (1, 3)
    with pytest.raises(UserError, match="in two segments already"):
        proofreading.split(1, 4)
    proofreading.log.merge(2, 77)
    with pytest.raises(UserError, match="edit 2 names fragment 77, which is no longer there"):
        open_proofreading(chain, 0.5)


def test_marked_segments_become_ground_truth(chain, tmp_path):
    write_array(chain.output, "volumes/raw", np.arange(8 * 32 * 32, dtype=np.uint8).reshape(8, 32, 32), **PLACED)
    proofreading, target = open_proofreading(chain, 0.5, author="ada"), tmp_path / "truth.zarr"
    proofreading.split(1, 4)
    with pytest.raises(UserError, match=r"no segment is marked as right in .*sample\.edits: point at one"):
        export_labels(proofreading, chain, target)
    proofreading.mark(4)
    proofreading.mark(2)
    assert proofreading.marked() == [1, 3]
    assert proofreading.undo().action == "mark"
    assert proofreading.marked() == [3]
    assert open_proofreading(chain, 0.5).lut.tolist() == [[1, 2, 3, 4], [1, 1, 3, 3]]

    export_labels(proofreading, chain, target)
    labels, mask = (open_array(target, f"volumes/labels/{name}") for name in ("neuron_ids", "labels_mask"))
    assert tuple(labels.offset) == (200, -100, 40 + 15 * 10)
    assert (read(labels) == np.repeat([0, 3], [1, 16])).all()
    assert (read(mask) == 1).all()  # and so the face of the segment is known to be one
    assert np.array_equal(read(open_array(target, "volumes/raw")), read(chain.raw))
    with pytest.raises(UserError, match=r"truth\.zarr exists: add --overwrite"):
        export_labels(proofreading, chain, target)

    # Where two are marked that do not touch, what lies between them is not known.
    proofreading.split(3, 4)
    proofreading.split(1, 2)
    proofreading.mark(1)
    export_labels(proofreading, chain, target, overwrite=True)
    known = np.repeat([1, 0, 1], [9, 14, 9])
    assert (read(open_array(target, "volumes/labels/labels_mask")) == known).all()


def test_ground_truth_is_exported_from_the_command_line_and_trained_on(chain, tmp_path):
    write_array(chain.output, "volumes/raw", np.zeros((8, 32, 32), np.uint8), **PLACED)
    network = {
        "NUM_FMAPS": 2,
        "NUM_FMAPS_OUT": 2,
        "FMAP_INC_FACTOR": 1,
        "DOWNSAMPLE_FACTORS": [[1, 2, 2]],
        "KERNEL_SIZE_DOWN": None,
        "KERNEL_SIZE_UP": None,
        "INPUT_SHAPE": (8, 16, 16),
        "PAD_CONV": "same",
        "LSD_SIGMA": 20,
        "PROB_ELASTIC": 0.0,
        "VOXEL_SIZE": (10, 10, 10),
    }
    settings = {f"MODEL_ISO.{key}": value for key, value in network.items()}
    settings |= {"DATA.HOME": tmp_path, "SYSTEM.NUM_WORKERS": 0, "TRAIN.AUGMENT": False, "TRAIN.DEVICE": "cpu"}
    overrides = [str(part) for pair in settings.items() for part in pair]
    cfg = load_config(overrides=overrides)
    target = data_folder(cfg, "train") / "truth.zarr"
    line = refused(chain.output, "--export-labels", target)
    assert "goes with --proofread THRESHOLD" in line
    proofreading = open_proofreading(chain, 0.5)
    proofreading.split(1, 4)
    proofreading.mark(4)
    done = run(chain.output, *overrides, "--proofread", 0.5, "--export-labels", target, "--author", "ada")
    assert (done.returncode, "1 neurons, 100.0% of the voxels known" in done.stdout) == (0, True), done.stderr
    check_training_volumes([target], cfg)
    with training_batches(cfg, [target], tuple(task_channels(cfg)), 0, 1) as batches:
        taken = [next(batches) for _ in range(10)]
    # Inside of the segment voxels are connected, at its face they are not.
    known = [set(batch.targets["affs"][batch.known["affs"] > 0].tolist()) for batch in taken]
    assert set.union(*known) == {0, 1}


def test_no_graph_to_proofread(sample, chain):
    volume, output = sample
    with pytest.raises(UserError, match=r"there is no graph .*run 02_extract"):
        open_proofreading(Sample(load_config(), volume, output), 0.5)
    with pytest.raises(UserError, match=r"no edges of max in .*, but of mean"):
        open_proofreading(chain, 0.5, "max")


def test_a_key_walks_through_doubtful_places(layers, server, chromium, tmp_path):
    places = [
        {"segment": n, "doubt": 1.0, "worst_nm": 50.0, "z": 300.0, "y": 0.0 + n, "x": 100.0 * n} for n in (1, 2, 3)
    ]
    splits = [{"segment": 4, "other": 7, "affinity": 0.4, "faces": 9, "z": 300.0, "y": 50.0, "x": 400.0}]
    quality_path(tmp_path / "sample.zarr").write_text(json.dumps({"segments": places, "splits": splits}))
    contacts = make_page(layers, "contacts")
    Walk(contacts, read_places(tmp_path / "sample.zarr", "splits"), "splits").go(1)
    assert contacts.state.position == pytest.approx([40, 5, 30], abs=1e-3)
    page = make_page(layers, "test")
    Walk(page, read_places(tmp_path / "sample.zarr"))
    tab = Tab(chromium, page, "walk")
    tab.tab.get_by_text("3 doubtful segments").wait_for(timeout=10_000)
    tab.tab.mouse.move(200, 200)
    for key, segment in (("w", 1), ("w", 2), ("w", 3), ("w", 3), ("q", 2)):
        tab.tab.keyboard.press(key)
        tab.tab.get_by_text(f"segment {segment}, doubt").wait_for(timeout=10_000)
        assert page.state.position == pytest.approx([10 * segment, segment / 10, 30], abs=1e-3)
    assert not tab.errors


def test_the_size_of_a_selected_segment_is_said(layers, sample, server, chromium, capsys):
    output, name = sample[1], "volumes/segmentation_040"
    labels, layer = read(open_array(output, name)), find_layer(layers, "segmentation_040")
    write_tables(output, name, open_array(output, name), "a test", segments_of_volume(labels))
    page = make_page(layers, "sizes")
    Sizes(page, layers, output)
    tab = Tab(chromium, page, "sizes")

    def select(*segments):
        with page.txn() as state:
            state.layers[layer.name].segments = segments

    ids, counts = np.unique(labels[labels > 0], return_counts=True)
    for number, (segment, voxels) in enumerate(list(zip(ids, counts, strict=True))[:3], 1):
        select(*ids[:number])  # one more than before
        tab.tab.get_by_text(f"segment {segment}: {voxels} voxels").wait_for(timeout=10_000)
    select()
    select(10**6)
    tab.tab.get_by_text("has no segment 1000000 in its tables").wait_for(timeout=10_000)
    assert not tab.errors

    (labels := labels.copy())[:] += 1
    write_array(output, "volumes/segmentation_070", labels, **PLACED)
    write_tables(output, "volumes/segmentation_070", open_array(output, name), "a test", segments_of_volume(labels))
    assert find_tables(output, "volumes/segmentation_070") is None
    assert "sizes of segments are left out: " in capsys.readouterr().out
    shutil.rmtree(output / "volumes/segmentation_070")
    shutil.rmtree(output.with_suffix(".segments"))


def test_no_list_of_doubtful_places(tmp_path):
    output = tmp_path / "sample.zarr"
    with pytest.raises(UserError, match=r"sample_quality.json cannot be read .*run quality.py first"):
        read_places(output)
    for content, reason in (
        ('{"segments": []}', "lists no doubtful segments"),
        ('{"segments": [{"z": 1}]}', "is damaged"),
    ):
        quality_path(output).write_text(content)
        with pytest.raises(UserError, match=reason):
            read_places(output)
    with pytest.raises(UserError, match="lists no contacts that may be splits"):
        read_places(output, "splits")
