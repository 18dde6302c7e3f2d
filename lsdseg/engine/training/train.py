"""The training loop: plain PyTorch around the batches of `pipeline.py`.

A run is its checkpoint folder. Started again, it goes on from the latest checkpoint there, with new batches and
the learning rate of that iteration, so that stopping and resuming is the same as never having stopped. An auto-context
type is two such runs, one after the other, the first one in folders of its own.
"""

from __future__ import annotations

import math
import random
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lsdseg.config.loader import derived_config, dump_config
from lsdseg.config.model_types import MODEL_TYPES
from lsdseg.data_utils.checks import check_training_volumes, label_datasets
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import PREDICT_CONFIG, volumes_in
from lsdseg.data_utils.volumes import source_defaults
from lsdseg.engine.device import Precision, resolve_device
from lsdseg.engine.network import first_config
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.engine.training.ranks import Ranks
from lsdseg.engine.training.snapshot import sample_images, write_snapshot
from lsdseg.engine.training.step import Trainer, learning_rate
from lsdseg.engine.training.stopping import stop_on_signal
from lsdseg.engine.training.validate import Validation
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk
from lsdseg.models.checkpoint import checkpoint_path, checkpoints_in, latest_checkpoint


def train(cfg) -> None:
    """Train the configured model type on the zarrs in the train folder, the first DATA.TRAIN_TEST_SPLIT of them.

    Leaves `model_checkpoint_N`, a config for `predicter.py` beside it, TensorBoard logs and snapshots. Ended by
    SIGINT or SIGTERM, it saves the iteration that it has reached and exits with the shell's status for that signal.

    Raises:
        UserError: before anything is written, if the data, the config or a checkpoint cannot be used.
    """
    ranks = Ranks()
    volumes = volumes_in(cfg, "train")
    used = math.ceil(len(volumes) * cfg.DATA.TRAIN_TEST_SPLIT)
    volumes, left_out = volumes[:used], volumes[used:]
    check_training_volumes(volumes, cfg)
    device = resolve_device(cfg, cfg.SYSTEM.NUM_WORKERS, ranks.local_rank, ranks.local_size)
    validation = Validation(cfg, left_out) if cfg.TRAIN.VALIDATE_EVERY else None
    if cfg.PREPROCESS.USE_WANDB and ranks.first:
        _start_wandb(cfg)
    with ranks.connected(device):
        if MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].first and not cfg.TRAIN.CHECKPOINT_AC:
            first = first_config(cfg)
            if ranks.first:
                print(f"{first.TRAIN.MODEL_TYPE} network first, {first.TRAIN.EPOCHS} iterations, then its successor")
            weights = _train_network(first, volumes, device, ranks, None)
            cfg = derived_config(cfg, {"TRAIN.CHECKPOINT_AC": str(weights)})
        _train_network(cfg, volumes, device, ranks, validation)


def seed_everything(seed: int) -> None:
    """Seed every random generator of this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _train_network(cfg, volumes: list[Path], device, ranks: Ranks, validation: Validation | None) -> Path:
    """Train one network from its latest checkpoint to TRAIN.EPOCHS; returns its last checkpoint."""
    seed_everything(cfg.TRAIN.SEED)
    trainer = Trainer(cfg, Precision(cfg.TRAIN.MIXED_PRECISION, device), ranks)
    folder = Path(cfg.MODEL.CKPT_FOLDER)
    latest = latest_checkpoint(folder)
    start = trainer.load(latest) if latest else 0
    say = print if ranks.first else _nothing
    if start >= cfg.TRAIN.EPOCHS:
        say(f"{latest} has all TRAIN.EPOCHS {cfg.TRAIN.EPOCHS} iterations: nothing to do")
        return latest
    trainer.connect()
    say(f"{f'resuming from {latest}' if latest else 'starting a new run'}: {len(volumes)} volume(s), {device}")

    if ranks.first:
        for path in volumes:
            for labels, mask in label_datasets(cfg):
                create_labels_mask(path, labels, mask, **source_defaults(cfg))
        folder.mkdir(parents=True, exist_ok=True)
    ranks.wait()
    samples = start * cfg.TRAIN.ACCUMULATE * cfg.TRAIN.BATCH_SIZE * ranks.size
    with (
        room_on_disk(folder),
        SummaryWriter(cfg.MODEL.LOG_DIR, purge_step=start) if ranks.first else nullcontext() as log,
        training_batches(cfg, volumes, trainer.tasks, samples + ranks.rank, ranks.size) as batches,
    ):
        reached, signal_number = _loop(cfg, trainer, batches, start, Records(cfg, trainer, folder, log, validation))
    ranks.wait()  # for the first one to have saved its last checkpoint

    last = latest_checkpoint(folder)
    say(f"{'stopped' if signal_number else 'trained'} at iteration {reached} of {cfg.TRAIN.EPOCHS}")
    if last:
        say(
            f"checkpoint   {last}\n"
            f"TensorBoard  tensorboard --logdir {cfg.MODEL.LOG_DIR}\n"
            f"snapshots    {cfg.MODEL.OUTPUT_DIR}\n"
            f"predict with python predicter.py -c {folder / PREDICT_CONFIG}"
        )
    if signal_number:
        sys.exit(128 + signal_number)
    return last


def _nothing(*_) -> None:
    """What the other ranks say."""


def _loop(cfg, trainer: Trainer, batches, start: int, records: Records) -> tuple[int, int]:
    """Train until TRAIN.EPOCHS or a signal; returns the last iteration, which is saved, and the signal or 0."""
    ranks, iteration, pace = trainer.ranks, start, Pace()
    if ranks.first:
        print("waiting for the first batch ...", flush=True)
    bar = tqdm(total=cfg.TRAIN.EPOCHS, initial=start, unit="it", disable=not ranks.first)
    with stop_on_signal() as stop, bar:
        while iteration < cfg.TRAIN.EPOCHS:
            with pace.wait(), stop.while_waiting():
                # A signal may have ended those who make batches, too.
                together = [] if stop.number else [next(batches) for _ in range(cfg.TRAIN.ACCUMULATE)]
            # Ranks wait for each other, so all of them have to end after the same iteration.
            if ranks.largest(stop.number or 0):
                break
            losses, predictions = trainer.step(together, iteration)
            iteration += 1
            bar.update()
            bar.set_postfix_str(f"loss {losses['total']:.4f}, {pace.waiting:.0%} waiting for batches")
            if not math.isfinite(losses["total"]):
                raise UserError(
                    f"the loss is {losses['total']} at iteration {iteration}: lower TRAIN.INITIAL_LR "
                    f"or set TRAIN.MIXED_PRECISION to 'no', and resume from {latest_checkpoint(cfg.MODEL.CKPT_FOLDER)}"
                )
            if ranks.first:
                records.add(iteration, losses, pace, together[-1], predictions)
        if ranks.first and iteration > records.saved:
            records.save(iteration)
        return iteration, int(ranks.largest(stop.number or 0))


class Records:
    """What a run leaves: checkpoints with a config to predict with, scalars, images and snapshots.

    Attributes:
        saved: the iteration of the last checkpoint.
    """

    def __init__(self, cfg, trainer: Trainer, folder: Path, log: SummaryWriter, validation: Validation | None):
        self.cfg, self.trainer, self.folder, self.log, self.validation = cfg, trainer, folder, log, validation
        latest = latest_checkpoint(folder)
        self.saved = int(latest.name.rpartition("_")[2]) if latest else 0

    def add(self, iteration: int, losses: dict[str, float], pace: Pace, batch, predictions) -> None:
        """Record an iteration, as often as the config says; `predictions` are those for `batch`."""
        every = self.cfg.TRAIN
        if iteration % every.LOG_EVERY == 0:
            scalars = {f"loss/{task}": loss for task, loss in losses.items()}
            scalars["learning_rate"] = learning_rate(self.cfg, iteration - 1)
            self._log(scalars | pace.lap(), iteration)
        if iteration % every.SAVE_EVERY == 0 or iteration == every.EPOCHS:
            self.save(iteration)
            write_snapshot(self.cfg, iteration, batch, predictions)
            for name, image in sample_images(batch, predictions).items():
                self.log.add_image(name, image, iteration)
        if self.validation and iteration % every.VALIDATE_EVERY == 0:
            self._log(self.validation.run(self.trainer, iteration), iteration)

    def save(self, iteration: int) -> None:
        """Write a checkpoint and the config to predict with it, and remove old ones."""
        cfg, path = self.cfg, checkpoint_path(self.folder, iteration)
        self.trainer.save(path, iteration)
        self.saved = iteration
        settings = {"TRAIN.CHECKPOINT": str(path.resolve()), "DATA.HOME": str(Path(cfg.DATA.HOME).resolve())}
        dump_config(derived_config(cfg, settings), self.folder / PREDICT_CONFIG)
        if cfg.TRAIN.KEEP_CHECKPOINTS:
            for old in checkpoints_in(self.folder)[: -cfg.TRAIN.KEEP_CHECKPOINTS]:
                old.unlink()

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        for name, value in scalars.items():
            self.log.add_scalar(name, value, iteration)


class Pace:
    """Iterations per second, and the share of time in which the network waits for batches."""

    def __init__(self):
        self.lap_began = self.cycle_began = time.monotonic()
        self.iterations, self.waited, self.cycled = 0, 0.0, 0.0

    @contextmanager
    def wait(self):
        """Context manager around waiting for a batch, which ends a cycle of training and waiting."""
        before = time.monotonic()
        yield
        now = time.monotonic()
        self.iterations += 1
        self.waited += now - before
        self.cycled += now - self.cycle_began
        self.cycle_began = now

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting."""
        return self.waited / self.cycled if self.cycled else 0.0

    def lap(self) -> dict[str, float]:
        """The two numbers since the last lap."""
        now = time.monotonic()
        speed = self.iterations / max(now - self.lap_began, 1e-6)
        numbers = {"pace/iterations_per_second": speed, "pace/share_waiting_for_batches": self.waiting}
        self.lap_began, self.iterations, self.waited, self.cycled = now, 0, 0.0, 0.0
        return numbers


def _start_wandb(cfg) -> None:
    """Have Weights & Biases copy everything that TensorBoard gets."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "PREPROCESS.USE_WANDB is True but wandb is not installed: pip install wandb, or set it to False"
        ) from None
    wandb.init(project="lsd", config=dict(cfg.TRAIN), sync_tensorboard=True)
