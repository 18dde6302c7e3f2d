"""What a report of labeled volumes sees, and what training warns of at its start."""

import base64
import io
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from test_training import CHECKOUT, config

from lsdseg.data_utils.layout import data_folder
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.volumes import open_array, write_array
from lsdseg.engine.training.suspicious import alignment_of
from lsdseg.engine.training.train import train
from lsdseg.engine.training.volumes_report import islands_of, report_volumes
from lsdseg.errors import UserError

RAW, LABELS = "volumes/raw", "volumes/labels/neuron_ids"


@pytest.fixture(scope="module")
def tissue():
    raw, labels, _ = make_phantom((48, 96, 96), seed=0, voxel_size=(8, 8, 8))
    return raw, labels


def store(path, raw, labels, voxel_size=(8, 8, 8)):
    for name, array in ((RAW, raw), (LABELS, labels)):
        write_array(path, name, array, voxel_size=voxel_size, offset=(0, 0, 0))
    return path


def alignment(path):
    return alignment_of(open_array(path, RAW), open_array(path, LABELS))


@pytest.mark.parametrize("moved", [(0, 0, 0), (0, 0, 1), (0, 2, 0), (2, 0, 0), (0, -3, 3), (0, 0, 6)])
def test_a_shift_of_two_voxels_between_raw_and_labels_is_found(tmp_path, tissue, moved):
    raw, labels = tissue
    found = alignment(store(tmp_path / "a.zarr", raw, np.roll(labels, moved, (0, 1, 2))))
    assert found.best == tuple(-step for step in moved)
    assert found.is_shifted == (max(map(abs, moved)) > 1)


@pytest.mark.parametrize("moved", [0, 3])
def test_a_shift_is_found_in_fib25(data_dir, tmp_path, moved):
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        raw, labels = (file[name][:64, :200, :200] for name in (RAW, LABELS))
    path = store(tmp_path / "a.zarr", raw, np.roll(labels.astype(np.uint64), moved, 1))
    assert alignment(path).best == (0, -moved, 0)


def test_what_is_flat_or_has_no_boundary_has_no_shift(tmp_path, tissue):
    raw, labels = tissue
    assert alignment(store(tmp_path / "flat.zarr", np.full_like(raw, 9), labels)) is None
    assert alignment(store(tmp_path / "one.zarr", raw, np.ones_like(labels))) is None


def test_islands_are_pieces_that_cannot_go_on_outside():
    labels = np.zeros((9, 9, 9), np.uint64)
    labels[1:5, 1:5, 1:5] = 7
    labels[6:8, 6:8, 6:8] = 7  # an island
    labels[8, 0, 0] = 7  # may go on outside
    labels[0, 8, :] = 2**63
    labels[1:3, 6, 2] = 5
    labels[3, 7, 3] = 5  # connected by an edge
    assert islands_of(labels) == [(7, 8, (6, 6, 6))]


def test_a_report_lists_what_is_wrong_and_shows_every_volume(tmp_path, tissue, capsys):
    raw, labels = tissue
    spoiled = np.roll(labels, 3, 1)
    lost = np.argwhere(labels == labels[24, 48, 48])[0]
    spoiled[40:42, 80:82, 80:82] = spoiled[tuple(lost)]
    good, bad = store(tmp_path / "good.zarr", raw, labels), store(tmp_path / "bad.zarr", 255 - raw, spoiled)
    thick = store(tmp_path / "thick.zarr", raw, labels, (16, 8, 8))
    report_volumes([str(good), str(bad), str(thick)], None, tmp_path / "page.html")
    assert capsys.readouterr().out.split() == ["report", str(tmp_path / "page.html")]
    page = (tmp_path / "page.html").read_text()
    listed = re.findall(r"<li>(.*?)</li>", page.partition("<h2>Volumes")[0])
    for part in (
        r"thick.zarr has voxel size \(16, 8, 8\) nm",
        r"membranes look dark in 2 volume\(s\) and bright in 1",
        r"neuron_ids in .*bad.zarr fit raw better if moved by \(0, -3, 0\) voxels",
        r"neuron_ids in .*bad.zarr: 1 label\(s\) are not connected",
        r"bad.zarr is unlike the other volumes: its contrast is inverted",
        rf"good.zarr and bad.zarr share {len(np.unique(labels))} id\(s\)",
    ):
        assert len([line for line in listed if re.search(part, line)]) == 1, part
    assert not [line for line in listed if "good.zarr" in line and "share" not in line]
    assert page.count('href="data:image/png') == 6 + 6 + 3
    assert not re.search(r"https?://|<script", page)
    assert f'<td>good.zarr</td><td class="number">{len(np.unique(labels))}</td>' in page


def test_labels_may_cover_a_part_of_raw(tmp_path, tissue):
    raw, labels = tissue
    path = tmp_path / "part.zarr"
    write_array(path, RAW, raw, voxel_size=(8, 8, 8), offset=(80, 80, 80))
    write_array(path, LABELS, labels[8:40, 16:80, 8:], voxel_size=(8, 8, 8), offset=(144, 208, 144))
    assert alignment(path).best == (0, 0, 0)
    report_volumes([str(path)], None, tmp_path / "page.html")
    assert "Nothing was found" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw, labels: (np.stack([raw] * 3), labels), r"raw in .* has shape \(3, 48, 96, 96\)"),
        (lambda raw, labels: (raw.astype(np.float32), labels), r"outside 0..1"),
        (lambda raw, labels: (np.where(raw > 200, np.nan, 0.5), labels), r"holds NaN"),
        (
            lambda raw, labels: (raw, labels.astype(np.int64) - 9),
            r"is int64 and holds -\d, .*: store labels as unsigned",
        ),
        (lambda raw, labels: (raw[:20], labels), r"which is not inside volumes/raw"),
    ],
)
def test_what_cannot_be_trained_on_is_listed_and_the_rest_is_shown(tmp_path, tissue, spoil, message):
    good, bad = store(tmp_path / "good.zarr", *tissue), store(tmp_path / "bad.zarr", *spoil(*tissue))
    report_volumes([str(good), str(bad)], None, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.search(rf"<li>[^<]*bad.zarr[^<]*{message}|<li>[^<]*{message}", page)
    assert "<h2>good.zarr</h2>" in page
    assert page.count('href="data:image/png') >= 6


def test_of_large_labels_the_middle_sections_are_looked_at(tmp_path, tissue, monkeypatch):
    raw, labels = tissue
    monkeypatch.setattr("lsdseg.engine.training.volumes_report.MOST_VOXELS", 10 * 96 * 96 + 5)
    report_volumes([str(store(tmp_path / "a.zarr", raw, labels))], None, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f'<td>a.zarr</td><td class="number">{len(np.unique(labels[19:29]))}</td>' in page
    assert "<td>the middle sections</td>" in page


def test_what_the_mask_leaves_out_does_not_count(tmp_path, tissue):
    raw, labels = tissue
    path = store(tmp_path / "a.zarr", raw, labels)
    mask = np.zeros(labels.shape, np.uint8)
    mask[:, :, :24] = 1
    write_array(path, "volumes/labels/labels_mask", mask, voxel_size=(8, 8, 8), offset=(0, 0, 0))
    report_volumes([str(path)], None, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f'<td>a.zarr</td><td class="number">{len(np.unique(labels[:, :, :24]))}</td>' in page
    assert '<td class="number">25.0%</td>' in page
    pictures = re.findall(r"base64,([^\"]+)", page)
    outlined = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[3]))).convert("RGB")).astype(int)
    zoom = outlined.shape[0] // 96
    known, unknown = (outlined[:, part, 0].mean() for part in (slice(23 * zoom), slice(25 * zoom, None)))
    assert known > 2 * unknown


def test_sections_are_shown_as_a_stack(tmp_path, tissue):
    for name, array in ((RAW, tissue[0]), (LABELS, tissue[1])):
        for z in range(6):
            write_array(tmp_path / "a.zarr", f"{name}/{z}", array[8 * z], voxel_size=(8, 8), offset=(0, 0))
    report_volumes([str(tmp_path / "a.zarr")], None, tmp_path / "page.html")
    assert '<td class="number">6 x 96 x 96</td>' in (tmp_path / "page.html").read_text()


def test_training_warns_of_shifted_labels_and_of_a_volume_given_twice(tmp_path, tissue, capsys):
    raw, labels = tissue
    folder = data_folder(config(tmp_path), "train")
    store(folder / "a.zarr", raw, labels)
    store(folder / "b.zarr", raw, np.roll(labels, 3, 2))
    cfg = config(tmp_path, TRAIN__EPOCHS=1)
    train(cfg)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2
    assert "b.zarr has the same volumes/raw as" in warned[0]
    assert "b.zarr fit raw better if moved by (0, 0, -3) voxels" in warned[1]
    report_volumes(
        ["TRAIN.EPOCHS", "1", "DATA.HOME", str(tmp_path)], str(CHECKOUT / "config/config.py"), tmp_path / "p"
    )
    assert "2 volume(s) to train on" in (tmp_path / "p").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name volumes or a config"),
        (["nowhere.zarr"], "nowhere.zarr does not exist"),
        (["-c", "x"], "no config file"),
    ],
)
def test_a_report_of_nothing_is_one_line_and_status_2(tmp_path, arguments, message):
    command = [sys.executable, CHECKOUT / "data_utils/report.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_volume_of_which_nothing_is_a_zarr_is_refused(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(UserError, match=r"no dataset volumes/raw in .*empty.zarr"):
        report_volumes([str(tmp_path / "empty.zarr")], None, tmp_path / "page.html")
