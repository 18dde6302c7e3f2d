"""One page about training runs, made from what they left: TensorBoard logs, the log and the last checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from tqdm import tqdm

from lsdseg.config.loader import RUN_FOLDERS, load_config
from lsdseg.engine.statistics import Statistics, statistics_in
from lsdseg.engine.training.runlog import TRAIN_LOG
from lsdseg.errors import UserError
from lsdseg.html import bullets, chart, grid, picture, section, table, text, write_page
from lsdseg.models.checkpoint import HISTOGRAM_BINS, latest_checkpoint

EVENTS = "events.out.tfevents.*"
REPORT = "training_report.html"
MOST_WARNINGS = 20  # that are shown, the last ones
LAST_LINES = 4  # of the log
# Title of a chart -> prefix of the scalars that it shows.
CHARTS = {
    "Loss": "loss/",
    "Learning rate": "learning_rate",
    "Iterations per second": "pace/iterations_per_second",
    "Share of the time spent waiting for batches": "pace/share_waiting_for_batches",
    "Validation: VOI (bits, lower is better)": "validation/voi_",
    "Validation: best threshold": "validation/threshold",
    "Dead channels": "dead_channels/",
}


class Run(NamedTuple):
    """Where a training run left its outputs.

    Attributes:
        logs: the folder of its TensorBoard logs.
        checkpoints: the folder of its checkpoints; None if it is not known.
    """

    logs: Path
    checkpoints: Path | None


def report_training(words: Sequence[str], config: str | None, to: Path | None) -> None:
    """Write a page about the run of a config, or about all runs in a folder, and print where it is.

    Args:
        words: a folder with TensorBoard logs, or nothing; then KEY VALUE ... that override the config.
        config: the config file of the run.
        to: the file to write. None: training_report.html in the folder of logs.

    Raises:
        UserError: neither a folder nor a config is given, there are no logs, or the page cannot be written.
    """
    if config is None and not words:
        raise UserError(
            "name a config or a folder of logs: python training_report.py -c CONFIG, or python training_report.py LOGS"
        )
    if config is None:
        if len(words) > 1:
            raise UserError(f"{words[1]!r} is one word too many: give one folder of logs, or a config with -c")
        folder = Path(words[0])
        checkpoints = None
    else:
        model = load_config(config, words).MODEL
        folder, checkpoints = Path(model.LOG_DIR), Path(model.CKPT_FOLDER)
    runs = [_run(logs, folder, checkpoints) for logs in sorted({file.parent for file in folder.rglob(EVENTS)})]
    if not runs:
        raise UserError(f"there are no TensorBoard logs in {folder}: name the LOG_DIR of a run that trainer.py began")
    path = to or folder / REPORT
    pieces = [piece for run in tqdm(runs, desc="reading logs", unit="run", delay=2) for piece in _pieces(run)]
    write_page(path, f"Training: {folder.resolve().name}", pieces)
    print(f"report       {path}")


def _run(logs: Path, folder: Path, checkpoints: Path | None) -> Run:
    """Find the checkpoints that belong to a folder of logs: those of the config, or those below the same HOME."""
    if checkpoints is not None:
        return Run(logs, checkpoints / logs.relative_to(folder))
    names = [RUN_FOLDERS["CKPT_FOLDER"] if part == RUN_FOLDERS["LOG_DIR"] else part for part in logs.resolve().parts]
    guess = Path(*names)
    return Run(logs, guess if guess != logs.resolve() and guess.is_dir() else None)


def _pieces(run: Run) -> list[str]:
    """Return the pieces of the page about one run."""
    # Of the pictures of a name, the last one is kept.
    events = EventAccumulator(str(run.logs), size_guidance={SCALARS: 0, IMAGES: 1})
    try:
        events.Reload()
    except Exception as error:  # whatever is in the file, it is none of ours
        raise UserError(f"the TensorBoard logs in {run.logs} cannot be read ({error}): move them away") from error
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags[SCALARS]}
    charts = [
        chart(
            title,
            {tag.rpartition("/")[2]: tuple(np.array(scalars[tag]).T) for tag in scalars if tag.startswith(prefix)},
            "iteration",
            from_zero=True,
        )
        for title, prefix in CHARTS.items()
    ]
    pictures = []
    for tag in tags[IMAGES]:
        last = events.Images(tag)[-1]
        pictures.append(picture(last.encoded_image_string, f"{_caption(tag)}, iteration {last.step}"))
    return [
        section(str(run.logs), _last_values(scalars), grid(*charts)),
        section("Pictures of the last batch", *pictures),
        section("Gray values of the training data", *_training_data(run)),
        section("From the log", *_log_lines(run)),
    ]


def _caption(tag: str) -> str:
    name = tag.removeprefix("preview/")
    colors = "red, green and blue are the first three channels, such as along z, y and x"
    return "raw and labels" if name == "labels" else f"{name}: raw, target, prediction ({colors})"


def _last_values(scalars: dict[str, list[tuple[int, float]]]) -> str:
    """Return a table of losses and scores: the last value, the lowest and where it was."""
    if not scalars:
        return text("The run has logged nothing yet: wait for TRAIN.LOG_EVERY iterations.", "faint")
    rows = []
    for tag, points in scalars.items():
        if tag.startswith(("loss/", "validation/voi")):
            step, lowest = min(points, key=lambda point: point[1])
            rows.append((tag, points[-1][1], points[-1][0], lowest, step))
    dead = [points[-1][1] for tag, points in scalars.items() if tag.startswith("dead_channels/")]
    words = text(f"Dead channels in the end: {sum(dead):.0f}", "faint") if dead else ""
    return table(("value", "last", "at iteration", "lowest", "at iteration"), rows) + words


def _training_data(run: Run) -> list[str]:
    """Return histograms of the training data and what else is known of it."""
    checkpoint = latest_checkpoint(run.checkpoints) if run.checkpoints else None
    if checkpoint is None:
        return [text("No checkpoint was found, which would hold them.", "faint")]
    found = statistics_in(checkpoint)
    if not found:
        return [text(f"{checkpoint.name} holds no statistics of its training data.", "faint")]
    return [
        text(f"From {checkpoint}.", "faint"),
        *statistics_pieces({f"volume {n}": s for n, s in enumerate(found, 1)}),
    ]


def statistics_pieces(found: dict[str, Statistics]) -> list[str]:
    """Return a chart and a table of the gray values of volumes, name -> statistics."""
    values = np.linspace(0, 1, HISTOGRAM_BINS)
    lines = {name: (values, statistics.histogram) for name, statistics in found.items()}
    rows = [
        (
            name,
            " x ".join(f"{size:g}" for size in statistics.voxel_size),
            statistics.median,
            statistics.spread,
            statistics.lines,
            "unknown" if statistics.contrast is None else statistics.contrast,
        )
        for name, statistics in found.items()
    ]
    head = ("volume", "voxel size (nm)", "median", "standard deviation", "lines", "inside minus boundary")
    remark = "Gray values are in 0..1. Lines: below 0 if thin lines such as membranes are dark, above 0 if bright."
    return [chart("Share of the voxels", lines, "gray value", from_zero=True), table(head, rows), text(remark, "faint")]


def _log_lines(run: Run) -> list[str]:
    """Return the warnings in train.log, and its last lines."""
    path = run.checkpoints / TRAIN_LOG if run.checkpoints else None
    if path is None or not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    warnings = [line for line in lines if "  warning: " in line]
    shown = [bullets(warnings[-MOST_WARNINGS:], "bad")] if warnings else [text("No warnings.", "faint")]
    said = [line for line in lines if line[:1].isdigit() and "  warning: " not in line]
    return [*shown, text("The last lines:"), bullets(said[-LAST_LINES:]), text(f"All of it: {path}", "faint")]
