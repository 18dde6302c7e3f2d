"""The training loop: plain PyTorch around the batches of `pipeline.py`.

A run is its checkpoint folder. When you start it again, it continues from the latest checkpoint there, with new batches
and the learning rate of that iteration. Stopping and resuming therefore gives the same result as running without a
stop. An auto-context type is two such runs, one after the other; the first one has its own folders.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.loader import derived_config, dump_config
from lsdseg.config.model_types import MODEL_TYPES
from lsdseg.data_utils.checks import check_training_volumes, label_datasets
from lsdseg.data_utils.in_place import is_in_place
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import PREDICT_CONFIG, others_in, volumes_in
from lsdseg.data_utils.volumes import source_defaults
from lsdseg.engine.device import resolve_device
from lsdseg.engine.network import first_network_config
from lsdseg.engine.statistics import Statistics, training_statistics
from lsdseg.engine.training.pipeline import TrainingBatch, training_batches
from lsdseg.engine.training.ranks import Ranks
from lsdseg.engine.training.runlog import TRAIN_LOG, keep_log, log, log_start, say_on_screen
from lsdseg.engine.training.snapshot import is_preview_due, preview_images, write_snapshot
from lsdseg.engine.training.stopping import stop_on_signal
from lsdseg.engine.training.suspicious import training_warnings
from lsdseg.engine.training.trainer import Trainer, learning_rate, training_precision
from lsdseg.engine.training.validate import Validation
from lsdseg.engine.training.weights_and_biases import Copy, import_wandb, wandb_copy
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk
from lsdseg.models.checkpoint import checkpoint_path, checkpoints_in, latest_checkpoint


def train(cfg: CfgNode) -> None:
    """Train the configured model type on the first volumes in the train folder, a share DATA.TRAIN_TEST_SPLIT.

    Writes checkpoints `model_checkpoint_N`, a config for `predicter.py` and `train.log` beside them, TensorBoard logs
    and snapshots.
    After SIGINT or SIGTERM, it saves the current iteration and exits with the shell's status for that signal.

    Raises:
        UserError: before anything is written, if the data, the config or a checkpoint cannot be used.
    """
    ranks = Ranks()
    volumes = volumes_in(cfg, "train")
    used = math.ceil(len(volumes) * cfg.DATA.TRAIN_TEST_SPLIT)
    volumes, left_out = volumes[:used], volumes[used:]
    _check_memory(cfg)
    check_training_volumes(volumes, cfg)
    device = resolve_device(cfg, cfg.SYSTEM.NUM_WORKERS, ranks.local_rank, ranks.local_size)
    validation = Validation(cfg, left_out) if cfg.TRAIN.VALIDATE_EVERY else None
    if cfg.PREPROCESS.USE_WANDB and ranks.is_first:
        import_wandb()
    with say_on_screen() if ranks.is_first else nullcontext(), ranks.connected(device):
        if MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].first and not cfg.TRAIN.CHECKPOINT_AC:
            first = first_network_config(cfg)
            log.info(
                f"training the first network, {first.TRAIN.MODEL_TYPE}, for {first.TRAIN.EPOCHS} iterations; "
                "the second one follows"
            )
            weights = _train_network(first, volumes, device, ranks, None)
            cfg = derived_config(cfg, {"TRAIN.CHECKPOINT_AC": str(weights)})
        _train_network(cfg, volumes, device, ranks, validation)


def _check_memory(cfg: CfgNode) -> None:
    """Check that the raw data of one batch fits into memory: else it takes hours until the machine gives up."""
    needed = 4 * cfg.TRAIN.BATCH_SIZE * math.prod(cfg.MODEL.RAW_SHAPE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}: raw data of so many patches takes {needed / 1e9:.0f} GB, and "
            f"this machine has {memory / 1e9:.0f} GB; lower it, or set TRAIN.ACCUMULATE instead"
        )


def seed_everything(seed: int) -> None:
    """Seed all random generators of this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _train_network(
    cfg: CfgNode, volumes: list[Path], device: torch.device, ranks: Ranks, validation: Validation | None
) -> Path | None:
    """Train one network from its latest checkpoint to TRAIN.EPOCHS.

    Returns:
        Its last checkpoint, None if there is none.
    """
    seed_everything(cfg.TRAIN.SEED)
    trainer = Trainer(cfg, training_precision(cfg, device), ranks)
    folder = Path(cfg.MODEL.CKPT_FOLDER)
    latest = latest_checkpoint(folder)
    start = trainer.load(latest) if latest else 0
    initial = None if latest else cfg.TRAIN.INITIAL_WEIGHTS
    if initial:
        trainer.start_from(initial)
    if start >= cfg.TRAIN.EPOCHS:
        log.info(f"{latest} already has all TRAIN.EPOCHS {cfg.TRAIN.EPOCHS} iterations: nothing to do")
        return latest
    trainer.prepare()
    with keep_log(folder) if ranks.is_first else nullcontext():
        begin = f"resuming from {latest}" if latest else "starting a new run"
        log.info(f"{begin}{f' with the weights {initial}' if initial else ''}: {len(volumes)} volume(s), {device}")
        if ranks.is_first:
            log_start(cfg, volumes, trainer.precision)
            for path in (path for path in volumes if not is_in_place(path)):
                for labels, mask in label_datasets(cfg):
                    create_labels_mask(path, labels, mask, **source_defaults(cfg))
            trainer.training_data = training_statistics(volumes, cfg)
            if others := others_in(cfg, "train"):
                names = ", ".join(path.name for path in others)
                log.warning(
                    f"warning: left out of {others[0].parent}, because they are in none of the formats: {names}"
                )
            for warning in training_warnings(volumes, [Statistics(**found) for found in trainer.training_data], cfg):
                log.warning(f"warning: {warning}; data_utils/report.py shows all volumes")
        return _run(cfg, trainer, volumes, start, validation)


def _run(cfg: CfgNode, trainer: Trainer, volumes: list[Path], start: int, validation: Validation | None) -> Path | None:
    """Make batches, train on them from the iteration `start`, and return the last checkpoint."""
    ranks, folder = trainer.ranks, Path(cfg.MODEL.CKPT_FOLDER)
    ranks.wait()
    patches = start * cfg.TRAIN.ACCUMULATE * cfg.TRAIN.BATCH_SIZE * ranks.size
    with (
        room_on_disk(folder),
        SummaryWriter(cfg.MODEL.LOG_DIR, purge_step=start) if ranks.is_first else nullcontext() as board,
        training_batches(cfg, volumes, trainer.tasks, patches + ranks.rank, ranks.size) as batches,
        wandb_copy(cfg) if ranks.is_first else nullcontext(Copy()) as copy,
    ):
        outputs = RunOutputs(cfg, trainer, folder, board, copy, validation) if board else None
        reached, signal_number = _run_iterations(cfg, trainer, batches, start, outputs)
    ranks.wait()  # until the first rank has saved its last checkpoint

    last = latest_checkpoint(folder)
    how = f"{signal.Signals(signal_number).name}: stopped" if signal_number else "trained"
    log.info(f"{how} at iteration {reached} of {cfg.TRAIN.EPOCHS}")
    if last:
        log.info(
            f"checkpoint   {last}\n"
            f"log          {folder / TRAIN_LOG}\n"
            f"TensorBoard  tensorboard --logdir {cfg.MODEL.LOG_DIR}\n"
            f"snapshots    {cfg.MODEL.OUTPUT_DIR}\n"
            f"predict with python predicter.py -c {folder / PREDICT_CONFIG}"
        )
    if signal_number:
        sys.exit(128 + signal_number)
    return last


def _run_iterations(
    cfg: CfgNode, trainer: Trainer, batches: Iterator[TrainingBatch], start: int, outputs: RunOutputs | None
) -> tuple[int, int]:
    """Train until TRAIN.EPOCHS or a signal, and save the last iteration.

    Args:
        cfg: the config.
        trainer: the network to train.
        batches: an endless iterator.
        start: the number of iterations before this call.
        outputs: where to log and save; None in all ranks but the first.

    Returns:
        The number of iterations, and the number of the signal or 0.
    """
    ranks, iteration, pace = trainer.ranks, start, Pace()
    log.info("waiting for the first batch ...")
    bar = tqdm(total=cfg.TRAIN.EPOCHS, initial=start, unit="it", disable=not ranks.is_first)
    with stop_on_signal() as stop, bar:
        while iteration < cfg.TRAIN.EPOCHS:
            with pace.timed_wait(), stop.interruptible():
                # After a signal, the workers that make batches may have ended too.
                taken = [] if stop.signal_number else [next(batches) for _ in range(cfg.TRAIN.ACCUMULATE)]
            # Ranks wait for each other, so all of them must end after the same iteration.
            if ranks.largest(stop.signal_number or 0):
                break
            with trainer.watched_channels(iteration + 1):
                losses, predictions = trainer.run_iteration(taken, iteration)
            iteration += 1
            bar.update()
            bar.set_postfix_str(f"loss {losses['total']:.4f}, {pace.share_waiting:.0%} waiting for batches")
            if not math.isfinite(losses["total"]):
                raise UserError(
                    f"the loss is {losses['total']} at iteration {iteration}: lower TRAIN.INITIAL_LR or set "
                    "TRAIN.MIXED_PRECISION to 'no', and run the same command again; it goes on from iteration "
                    f"{outputs.saved if outputs else start}"
                )
            if outputs:
                outputs.add(iteration, losses, pace, taken[-1], predictions)
        if outputs and iteration > outputs.saved:
            outputs.save(iteration)
        return iteration, int(ranks.largest(stop.signal_number or 0))


class RunOutputs:
    """The outputs of a run: checkpoints with a config to predict with, TensorBoard logs and snapshots.

    Args:
        cfg: the config.
        trainer: the network in training.
        folder: the checkpoint folder.
        board: the TensorBoard log.
        copy: gets what the TensorBoard log gets.
        validation: scores the network every TRAIN.VALIDATE_EVERY iterations. None: it is not scored.

    Attributes:
        saved: the iteration of the last checkpoint.
    """

    def __init__(
        self,
        cfg: CfgNode,
        trainer: Trainer,
        folder: Path,
        board: SummaryWriter,
        copy: Copy,
        validation: Validation | None,
    ) -> None:
        self.cfg, self.trainer, self.folder = cfg, trainer, folder
        self.board, self.copy, self.validation = board, copy, validation
        latest = latest_checkpoint(folder)
        self.saved = int(latest.name.rpartition("_")[2]) if latest else 0

    def add(
        self,
        iteration: int,
        losses: dict[str, float],
        pace: Pace,
        batch: TrainingBatch,
        predictions: dict[str, torch.Tensor],
    ) -> None:
        """Log, save and validate after an iteration, as often as the config says.

        Args:
            iteration: the number of iterations so far.
            losses: those of the iteration, by task and `total`.
            pace: how fast the run is.
            batch: the last batch.
            predictions: those for `batch`, by task.
        """
        every = self.cfg.TRAIN
        if iteration % every.LOG_EVERY == 0:
            scalars = {f"loss/{task}": loss for task, loss in losses.items()}
            scalars["learning_rate"] = learning_rate(self.cfg, iteration - 1)
            scalars |= pace.read_and_reset()
            dead = {f"dead_channels/{level}": count for level, count in self.trainer.channels.dead().items()}
            self._log(scalars | dead, iteration)
            log.debug(f"iteration {iteration}: {', '.join(f'{name} {value:.4g}' for name, value in scalars.items())}")
            if warning := self.trainer.channels.warning():
                log.warning(warning)
        if iteration % every.SAVE_EVERY == 0 or iteration == every.EPOCHS:
            self.save(iteration)
            write_snapshot(self.cfg, iteration, batch, predictions)
        if is_preview_due(iteration, every.SAVE_EVERY) or iteration == every.EPOCHS:
            images = preview_images(batch, predictions)
            for name, image in images.items():
                self.board.add_image(name, image, iteration, dataformats="HWC")
            self.copy.add_pictures(images, iteration)
        if self.validation and iteration % every.VALIDATE_EVERY == 0:
            self._log(self.validation.run(self.trainer, iteration), iteration)

    def save(self, iteration: int) -> None:
        """Write a checkpoint and the config to predict with it, and remove old checkpoints."""
        cfg, path = self.cfg, checkpoint_path(self.folder, iteration)
        self.trainer.save(path, iteration)
        self.saved = iteration
        settings = {"TRAIN.CHECKPOINT": str(path.resolve()), "DATA.HOME": str(Path(cfg.DATA.HOME).resolve())}
        dump_config(derived_config(cfg, settings), self.folder / PREDICT_CONFIG)
        log.debug(f"checkpoint: {path}")
        if cfg.TRAIN.KEEP_CHECKPOINTS:
            for old in checkpoints_in(self.folder)[: -cfg.TRAIN.KEEP_CHECKPOINTS]:
                old.unlink()

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        for name, value in scalars.items():
            self.board.add_scalar(name, value, iteration)
        self.copy.add(scalars, iteration)


class Pace:
    """Measure iterations per second, and the share of time in which the network waits for batches.

    Attributes:
        iterations: number of iterations since the last reset.
        waited: seconds of waiting since the last reset.
        elapsed: seconds of training and waiting since the last reset.
    """

    def __init__(self) -> None:
        self.last_reset = self.last_batch = time.monotonic()
        self.iterations, self.waited, self.elapsed = 0, 0.0, 0.0

    @contextmanager
    def timed_wait(self) -> Iterator[None]:
        """Measure how long this context waits for batches. It ends one cycle of training and waiting."""
        before = time.monotonic()
        yield
        now = time.monotonic()
        self.iterations += 1
        self.waited += now - before
        self.elapsed += now - self.last_batch
        self.last_batch = now

    @property
    def share_waiting(self) -> float:
        """Share of the time spent waiting."""
        return self.waited / self.elapsed if self.elapsed else 0.0

    def read_and_reset(self) -> dict[str, float]:
        """Return both numbers since the last reset, by the names that they have in TensorBoard."""
        now = time.monotonic()
        speed = self.iterations / max(now - self.last_reset, 1e-6)
        scalars = {"pace/iterations_per_second": speed, "pace/share_waiting_for_batches": self.share_waiting}
        self.last_reset, self.iterations, self.waited, self.elapsed = now, 0, 0.0, 0.0
        return scalars
