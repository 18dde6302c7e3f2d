"""The training loop: plain PyTorch around the batches of `pipeline.py`.

A run is its checkpoint folder. Started again, it goes on from the latest checkpoint there, with new batches and
the learning rate of that iteration, so that stopping and resuming is the same as never having stopped.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config.errors import UserError
from config.loader import dump_config
from data_utils.checks import check_training_volume
from data_utils.create_labels_mask import create_labels_mask
from data_utils.layout import volumes_in
from data_utils.volumes import room_on_disk, source_defaults
from engine.device import Precision, resolve_device
from engine.signals import handled
from engine.training.pipeline import TrainingBatch, training_batches
from engine.training.snapshot import sample_images, write_snapshot
from models import build_model
from models.checkpoint import (
    checkpoint_path,
    checkpoints_in,
    latest_checkpoint,
    load_checkpoint,
    network_settings,
    save_checkpoint,
)
from models.losses import weighted_mse

PREDICT_CONFIG = "config_predict.yaml"


def train(cfg) -> None:
    """Train the configured network on the zarrs in the train folder (DATA.TRAIN_TEST_SPLIT of them), by name the first.

    Leaves `model_checkpoint_N`, a config for `predicter.py` beside it, TensorBoard logs and snapshots. Ended by
    SIGINT or SIGTERM, it saves the iteration that it has reached and exits with the shell's status for that signal.

    Raises:
        UserError: before anything is written, if the data, the config or a checkpoint cannot be used.
    """
    volumes = volumes_in(cfg, "train")
    volumes = volumes[: math.ceil(len(volumes) * cfg.DATA.TRAIN_TEST_SPLIT)]
    for path in volumes:
        check_training_volume(path, cfg)
    device = resolve_device(cfg, busy_cores=cfg.SYSTEM.NUM_WORKERS)
    precision = Precision(cfg.TRAIN.MIXED_PRECISION, device)
    seed_everything(cfg.TRAIN.SEED)

    model = precision.place(build_model(cfg))
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.TRAIN.INITIAL_LR, betas=tuple(cfg.TRAIN.LR_BETAS))
    folder = Path(cfg.MODEL.CKPT_FOLDER)
    latest = latest_checkpoint(folder)
    start = load_checkpoint(latest, model, cfg, optimizer) if latest else 0
    if start >= cfg.TRAIN.EPOCHS:
        print(f"{latest} has all TRAIN.EPOCHS {cfg.TRAIN.EPOCHS} iterations: nothing to do")
        return
    if cfg.PREPROCESS.USE_WANDB:
        _start_wandb(cfg)
    print(f"{f'resuming from {latest}' if latest else 'starting a new run'}: {len(volumes)} volume(s), {device}")

    for path in volumes:
        create_labels_mask(path, cfg.DATA.NEURON_LABELS, cfg.DATA.NEURON_LABELS_MASK, **source_defaults(cfg))
    folder.mkdir(parents=True, exist_ok=True)
    step = TrainingStep(cfg, model, optimizer, precision)
    with (
        room_on_disk(folder),
        SummaryWriter(cfg.MODEL.LOG_DIR, purge_step=start) as log,
        training_batches(cfg, volumes, model.tasks, first_batch=start) as batches,
    ):
        reached, signal_number = _loop(cfg, step, batches, start, folder, log)

    print(
        f"{'stopped' if signal_number else 'trained'} at iteration {reached} of {cfg.TRAIN.EPOCHS}\n"
        f"checkpoint   {checkpoint_path(folder, reached)}\n"
        f"TensorBoard  tensorboard --logdir {cfg.MODEL.LOG_DIR}\n"
        f"snapshots    {cfg.MODEL.OUTPUT_DIR}\n"
        f"predict with python predicter.py -c {folder / PREDICT_CONFIG}"
    )
    if signal_number:
        sys.exit(128 + signal_number)


def seed_everything(seed: int) -> None:
    """Seed every random generator of this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def learning_rate(cfg, iteration: int) -> float:
    """Learning rate of an iteration (the first is 0): linear warm-up, then constant or a cosine down to zero."""
    rate = cfg.TRAIN.INITIAL_LR
    if cfg.TRAIN.LR_SCHEDULE == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / cfg.TRAIN.EPOCHS))
    return rate * min(1.0, (iteration + 1) / max(1, cfg.TRAIN.WARMUP))


class TrainingStep:
    """One optimizer step: forward, loss per task, backward, update."""

    def __init__(self, cfg, model, optimizer, precision: Precision):
        self.cfg, self.model, self.optimizer, self.precision = cfg, model, optimizer, precision
        self.network = torch.compile(model) if cfg.TRAIN.COMPILE else model
        self.task_weights = {"lsds": cfg.TRAIN.LSD_LOSS_WEIGHT, "affs": cfg.TRAIN.AFF_LOSS_WEIGHT}
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype == torch.float16)

    def __call__(self, batch: TrainingBatch, iteration: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Train on one batch.

        Returns:
            Losses by task name and `total`; predictions by task name, (batch, channels, z, y, x) float32.
        """
        place = self.precision.place
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, iteration)
        self.model.train()
        with self.precision.autocast():
            outputs = self.network(place(torch.from_numpy(batch.raw)))
        predictions = {task: output.float() for task, output in outputs._asdict().items()}
        losses = {
            task: weighted_mse(
                prediction,
                place(torch.from_numpy(batch.targets[task])),
                place(torch.from_numpy(batch.weights[task])),
            )
            for task, prediction in predictions.items()
        }
        total = sum(self.task_weights[task] * loss for task, loss in losses.items())
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        values = {task: loss.item() for task, loss in losses.items()}
        return {"total": total.item(), **values}, {task: p.detach() for task, p in predictions.items()}


def _loop(cfg, step: TrainingStep, batches, start: int, folder: Path, log: SummaryWriter) -> tuple[int, int | None]:
    """Train until TRAIN.EPOCHS or a signal; returns the last iteration, which is saved, and the signal's number."""
    print("waiting for the first batch ...", flush=True)
    iteration, pace = start, Pace()
    with stop_on_signal() as stopped:
        batch = next(batches)
        bar = tqdm(total=cfg.TRAIN.EPOCHS, initial=start, unit="it")
        while True:
            losses, predictions = step(batch, iteration)
            iteration += 1
            bar.update()
            bar.set_postfix_str(f"loss {losses['total']:.4f}, {pace.waiting:.0%} waiting for batches")
            if not math.isfinite(losses["total"]):
                raise UserError(
                    f"the loss is {losses['total']} at iteration {iteration}: lower TRAIN.INITIAL_LR "
                    f"or set TRAIN.MIXED_PRECISION to 'no', and resume from {latest_checkpoint(folder)}"
                )
            if iteration % cfg.TRAIN.LOG_EVERY == 0:
                scalars = {f"loss/{task}": loss for task, loss in losses.items()}
                scalars["learning_rate"] = learning_rate(cfg, iteration - 1)
                scalars |= pace.lap()
                for name, value in scalars.items():
                    log.add_scalar(name, value, iteration)
            done = iteration >= cfg.TRAIN.EPOCHS or bool(stopped)
            if done or iteration % cfg.TRAIN.SAVE_EVERY == 0:
                _save(cfg, step, iteration, folder)
                write_snapshot(cfg, iteration, batch, predictions)
                for name, image in sample_images(batch, predictions).items():
                    log.add_image(name, image, iteration)
            if done:
                break
            with pace.wait():
                batch = next(batches)
    return iteration, stopped[0] if stopped else None


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


def _save(cfg, step: TrainingStep, iteration: int, folder: Path) -> None:
    path = checkpoint_path(folder, iteration)
    save_checkpoint(path, step.model, step.optimizer, iteration, network_settings(cfg))
    predict = cfg.clone()
    predict.defrost()
    predict.TRAIN.CHECKPOINT = str(path.resolve())
    predict.DATA.HOME = str(Path(cfg.DATA.HOME).resolve())
    dump_config(predict, folder / PREDICT_CONFIG)
    if cfg.TRAIN.KEEP_CHECKPOINTS:
        for old in checkpoints_in(folder)[: -cfg.TRAIN.KEEP_CHECKPOINTS]:
            old.unlink()


@contextmanager
def stop_on_signal():
    """Give a list that gets the number of the first SIGINT or SIGTERM, so that the step in progress ends and is saved.

    A second one ends the process at once. Processes that are forked meanwhile end by SIGTERM only: Ctrl-C reaches them,
    too, and this process decides when they end.
    """
    received: list[int] = []
    this_process = os.getpid()

    def receive(number, _frame):
        if os.getpid() != this_process:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if received:
            raise KeyboardInterrupt
        received.append(number)
        tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint after this iteration")

    with handled(receive, signal.SIGINT, signal.SIGTERM):
        yield received


def _start_wandb(cfg) -> None:
    """Have Weights & Biases copy everything that TensorBoard gets."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "PREPROCESS.USE_WANDB is True but wandb is not installed: pip install wandb, or set it to False"
        ) from None
    wandb.init(project="lsd", config=dict(cfg.TRAIN), sync_tensorboard=True)
