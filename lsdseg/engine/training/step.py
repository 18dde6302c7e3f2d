"""One optimizer step: batches in, losses and new weights out."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cached_property

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lsdseg.config.model_types import TASKS
from lsdseg.engine.device import Precision, explain_device_errors
from lsdseg.engine.network import from_raw
from lsdseg.engine.training.pipeline import TrainingBatch
from lsdseg.engine.training.ranks import Ranks
from lsdseg.models import build_model
from lsdseg.models.checkpoint import load_checkpoint, network_settings, read_checkpoint, save_checkpoint
from lsdseg.models.losses import weighted_mse


def learning_rate(cfg, iteration: int) -> float:
    """Learning rate of an iteration (the first is 0): linear warm-up, then constant or a cosine down to zero."""
    rate = cfg.TRAIN.INITIAL_LR
    if cfg.TRAIN.LR_SCHEDULE == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / cfg.TRAIN.EPOCHS))
    return rate * min(1.0, (iteration + 1) / max(1, cfg.TRAIN.WARMUP))


class Trainer:
    """The network that is trained, its optimizer, and, with TRAIN.EMA, the average of its weights.

    Attributes:
        network: the model type's own network, whose weights are trained and saved.
        tasks: names of the network's tasks.
    """

    def __init__(self, cfg, precision: Precision, ranks: Ranks):
        self.cfg, self.precision, self.ranks = cfg, precision, ranks
        self.network = precision.place(build_model(cfg))
        self.tasks = self.network.tasks
        self.averaged = None
        if cfg.TRAIN.EMA:
            self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(cfg.TRAIN.EMA))
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=cfg.TRAIN.INITIAL_LR, betas=tuple(cfg.TRAIN.LR_BETAS)
        )
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype == torch.float16)

    def load(self, path) -> int:
        """Go on from a checkpoint; returns its iteration. Raises UserError as `load_checkpoint`."""
        iteration = load_checkpoint(path, self.network, self.cfg, self.optimizer)
        if self.averaged:
            load_checkpoint(path, self.averaged.module, self.cfg)
            self.averaged.n_averaged.fill_(iteration)
        if self.scaler.is_enabled() and (scale := read_checkpoint(path).get("scaler_state_dict")):
            self.scaler.load_state_dict(scale)
        return iteration

    def save(self, path, iteration: int, **more) -> None:
        """Write a checkpoint. Raises UserError if there is no room."""
        if self.averaged:
            more["ema_state_dict"] = self.averaged.module.state_dict()
        if self.scaler.is_enabled():
            more["scaler_state_dict"] = self.scaler.state_dict()
        save_checkpoint(path, self.network, self.optimizer, iteration, network_settings(self.cfg), **more)

    def connect(self) -> None:
        """Make the network ready to be trained, by all ranks together; once, after weights were loaded."""
        self.parallel = None
        forward = self.network
        if self.ranks.size > 1:
            forward = self.parallel = DistributedDataParallel(self.network)
        if self.cfg.TRAIN.COMPILE:
            forward = torch.compile(forward)
        self.model = self.precision.place(from_raw(self.cfg, forward))

    @cached_property
    def predicting(self) -> torch.nn.Module:
        """What predicts from raw data with the weights that a checkpoint of now would have, trained or averaged."""
        return from_raw(self.cfg, self.averaged.module if self.averaged else self.network)

    @explain_device_errors("make INPUT_SHAPE or NUM_FMAPS of the network's section, or TRAIN.BATCH_SIZE, smaller")
    def step(self, batches: list[TrainingBatch], iteration: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Train on batches, whose gradients are added up over all of them and over all ranks.

        The loss is the mean over all their weighted entries, so it does not matter how patches are spread over batches
        and ranks.

        Returns:
            Losses by task name and `total`; predictions for the last batch by task name, (batch, channels, z, y, x)
            float32.

        Raises:
            UserError: too little memory, or TRAIN.COMPILE failed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, iteration)
        self.model.train()
        self.optimizer.zero_grad()
        counts = [float(sum((batch.weights[task] > 0).sum() for batch in batches)) for task in self.tasks]
        entries = dict(zip(self.tasks, self.ranks.total(counts), strict=True))
        sums = dict.fromkeys(self.tasks, 0.0)
        for number, batch in enumerate(batches, start=1):
            alone = self.parallel is not None and number < len(batches)
            with self.parallel.no_sync() if alone else nullcontext():
                losses, predictions = self._losses(batch, entries)
                total = sum(getattr(self.cfg.TRAIN, TASKS[task].loss_weight) * loss for task, loss in losses.items())
                # DistributedDataParallel takes the mean over ranks of what is to be added up.
                self.scaler.scale(total * self.ranks.size).backward()
            for task, loss in losses.items():
                sums[task] += loss.item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update_parameters(self.network)
        values = dict(zip(self.tasks, self.ranks.total(list(sums.values())), strict=True))
        values["total"] = sum(getattr(self.cfg.TRAIN, TASKS[task].loss_weight) * loss for task, loss in values.items())
        return values, {task: prediction.detach() for task, prediction in predictions.items()}

    def _losses(self, batch: TrainingBatch, entries: dict[str, float]):
        def on_device(array):
            return self.precision.place(torch.from_numpy(array))

        with self.precision.autocast():
            outputs = self.model(on_device(batch.raw))
        predictions = {task: output.float() for task, output in outputs._asdict().items()}
        targets = {task: on_device(array) for task, array in batch.targets.items()}
        weights = {task: on_device(array) for task, array in batch.weights.items()}
        losses = {
            task: weighted_mse(prediction, targets[task], weights[task], entries[task])
            for task, prediction in predictions.items()
        }
        return losses, predictions
