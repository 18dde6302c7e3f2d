"""What a training run leaves to read: its log, and the report of its logs."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import batches_of, config
from test_training import home as home
from test_training import volume as volume

from lsdseg.engine.training.channels import ChannelWatch
from lsdseg.engine.training.report import report_training
from lsdseg.engine.training.snapshot import is_preview_due
from lsdseg.engine.training.train import train
from lsdseg.errors import UserError
from lsdseg.html import chart


def log_of(cfg):
    return (Path(cfg.MODEL.CKPT_FOLDER) / "train.log").read_text()


def test_a_log_tells_of_a_run_and_of_its_continuation(home, volume, capsys, monkeypatch):
    monkeypatch.setattr(ChannelWatch, "warning", lambda _watch: "warning: channels are dead")
    validation = {"TRAIN__VALIDATE_EVERY": 2, "TRAIN__VALIDATION_VOLUME": volume}
    cfg = config(home, TRAIN__EPOCHS=2, TRAIN__VALIDATION_SHAPE=(16, 24, 24), **validation)
    train(cfg)
    first = log_of(cfg)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in first.splitlines()[:5])
    for part in (
        "starting a new run: 1 volume(s), cpu",
        "TRAIN.INITIAL_LR 0.001, ",
        "device: cpu (1 thread(s)), precision torch.float32",
        "phantom.zarr, (48, 52, 56) voxels of (8, 8, 8) nm, uint8",
        "warning: channels are dead",
        "model_checkpoint_2",
        "iteration 2: VOI sum ",
        "trained at iteration 2 of 2",
    ):
        assert part in first
    points = re.findall(r"iteration (\d): loss/(.*)", first)
    assert [number for number, _ in points] == ["1", "2"]
    for name in ("lsds ", "loss/affs ", "loss/total ", "learning_rate 0.001", "iterations_per_second ", "waiting"):
        assert name in points[0][1]
    on_screen = capsys.readouterr().out
    assert "warning: channels are dead" in on_screen
    assert "loss/lsds" not in on_screen

    train(config(home, TRAIN__EPOCHS=3, **validation))
    again = log_of(cfg)
    assert again.startswith(first)
    assert re.search(r"resuming from .*model_checkpoint_2: 1 volume", again[len(first) :])
    assert "trained at iteration 3 of 3" in again[len(first) :]


def test_a_log_says_why_a_run_ended(home):
    cfg = config(home, TRAIN__INITIAL_LR=1e9, TRAIN__SAVE_EVERY=100, TRAIN__EPOCHS=20)
    with pytest.raises(UserError):
        train(cfg)
    assert re.search(r"  ended: error: the loss is (nan|inf) at iteration", log_of(cfg).splitlines()[-1])


def test_a_log_that_cannot_be_written_any_more_ends_no_run(home, monkeypatch, capsys):
    cfg = config(home)
    folder = Path(cfg.MODEL.CKPT_FOLDER)
    folder.mkdir(parents=True)
    (folder / "train.log").symlink_to("/dev/full")
    train(cfg)
    said = capsys.readouterr().out
    assert said.count("train.log cannot be written any more") == 1
    assert "trained at iteration 4 of 4" in said


def test_pictures_of_the_first_hundred_iterations_are_large_enough_to_judge(home):
    due = [iteration for iteration in range(1, 3001) if is_preview_due(iteration, save_every=1000)]
    assert due == [100, 200, 400, 800, 1000, 2000, 3000]
    cfg = config(home, TRAIN__EPOCHS=1)
    train(cfg)
    events = EventAccumulator(cfg.MODEL.LOG_DIR).Reload()
    assert events.Tags()["images"] == ["preview/labels", "preview/lsds", "preview/affs"]
    batch = batches_of(cfg, 1)[0]
    width = batch.labels.shape[-1]
    zoom = 400 // width
    for task in ("lsds", "affs"):
        image = np.asarray(Image.open(io.BytesIO(events.Images(f"preview/{task}")[0].encoded_image_string)))
        assert min(image.shape[0], image.shape[1] // 3) > 300
        target = batch.targets[task][0, :3, width // 2].transpose(1, 2, 0).repeat(zoom, 0).repeat(zoom, 1)
        middle = image[:, width * zoom + 8 :][:, : width * zoom]
        np.testing.assert_allclose(middle, 255 * target.astype(np.float32), atol=1)


def test_a_report_shows_what_training_logged(home, volume, capsys):
    validation = {"TRAIN__VALIDATE_EVERY": 2, "TRAIN__VALIDATION_VOLUME": volume}
    cfg = config(home, TRAIN__EPOCHS=2, TRAIN__VALIDATION_SHAPE=(16, 24, 24), **validation)
    train(cfg)
    report_training([str(home / "lsd_logs")], None, None)
    path = home / "lsd_logs/training_report.html"
    assert capsys.readouterr().out.splitlines()[-1].split() == ["report", str(path)]
    page = path.read_text()
    assert not re.search(r"https?://|<script|src=\"(?!data:)", page)
    events = EventAccumulator(cfg.MODEL.LOG_DIR).Reload()
    for tag in ("loss/lsds", "loss/affs", "validation/voi_sum"):
        last = f'<td class="number">{events.Scalars(tag)[-1].value:.4g}</td><td class="number">2</td>'
        assert f"<td>{tag}</td>{last}" in page
    for title in ("Loss", "Learning rate", "Iterations per second", "Share of the time", "Validation: VOI"):
        assert f"<strong>{title}" in page
    assert page.count('src="data:image/png') == 3
    assert "Dead channels" not in page  # known after ten watched iterations
    assert '<td>volume 1</td><td class="number">8 x 8 x 8</td>' in page
    assert "trained at iteration 2 of 2" in page


def test_a_chart_draws_points_where_they_are():
    drawn = chart("t", {"a<b": ([0, 10], [0, 1]), "c": ([5], [0.5]), "none": ([], [])}, "x")
    (x0, y0), (x1, y1) = [map(float, point.split(",")) for point in re.search(r'points="(\S+ \S+)"', drawn)[1].split()]
    x, y = map(float, re.findall(r'cx="(\S+)" cy="(\S+)"', drawn)[-1])
    assert x0 < x1
    assert y0 > y1
    assert (x, y) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.11)
    assert "a&lt;b" in drawn
    assert "none" not in drawn
    assert chart("t", {"none": ([1], [float("nan")])}, "x") == ""


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["nowhere"], None, "there are no TensorBoard logs in nowhere"),
        ([], None, "name a config or a folder of logs"),
        (["a", "b"], None, "'b' is one word too many"),
        (["TRAIN.EPOCHZ", "1"], "config_fib25.py", "unknown key TRAIN.EPOCHZ"),
    ],
)
def test_a_report_of_nothing_is_refused(words, given, message):
    with pytest.raises(UserError, match=message):
        report_training(words, given, None)


def test_damaged_logs_are_reported_as_far_as_they_can_be_read(tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"not a log " * 100)
    report_training([str(tmp_path)], None, tmp_path / "page.html")
    assert "has logged nothing yet" in (tmp_path / "page.html").read_text()
