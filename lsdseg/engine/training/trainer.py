"""One training iteration: from batches to losses and new weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from yacs.config import CfgNode

from lsdseg.config.model_types import TASKS, input_channels
from lsdseg.config.network_shapes import nearest_input_shapes
from lsdseg.engine.device import Precision, explain_device_errors
from lsdseg.engine.fastest import find_precision
from lsdseg.engine.network import complete_network
from lsdseg.engine.training.channels import ChannelWatch
from lsdseg.engine.training.pipeline import TrainingBatch
from lsdseg.engine.training.ranks import Ranks
from lsdseg.models import build_model
from lsdseg.models.checkpoint import (
    TRAINING_DATA,
    load_checkpoint,
    network_settings,
    read_checkpoint,
    save_checkpoint,
)
from lsdseg.models.losses import LOSSES, Loss, balanced_weights
from lsdseg.models.unet import CONV

# Voxels along each axis of the patch with which precisions are timed, at most.
MOST_TIMED = 64


def learning_rate(cfg: CfgNode, iteration: int) -> float:
    """Return the learning rate: a linear warm-up, then constant or a cosine down to zero. The first iteration is 0."""
    rate: float = cfg.TRAIN.INITIAL_LR
    if cfg.TRAIN.LR_SCHEDULE == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / cfg.TRAIN.EPOCHS))
    return rate * min(1.0, (iteration + 1) / max(1, cfg.TRAIN.WARMUP))


def parameter_groups(network: nn.Module, fan_in: int) -> list[tuple[float, list[nn.Parameter]]]:
    """Group parameters by the share of the learning rate that they take.

    Adam moves all weights equally far. The inputs of a convolution behind a ReLU are all positive, so its weights often
    move the same way, and its sum then moves by the step times its fan-in: in the wide layers of a U-Net by several
    standard deviations in one step, below zero for every input. With shares that fall with the fan-in, it moves equally
    far in all layers (Yang et al., Tensor Programs V, NeurIPS 2021).

    Args:
        network: the network to train.
        fan_in: TRAIN.LR_FAN_IN, the largest number of inputs with a share of 1. 0: all shares are 1.

    Returns:
        The share, and the parameters that take it. Each parameter is in one group.
    """
    convolutions = [module for module in network.modules() if isinstance(module, tuple(CONV.values()))]
    shares: dict[nn.Parameter, float] = {}
    for weight in (cast(nn.Parameter, convolution.weight) for convolution in convolutions):
        shares[weight] = min(1.0, fan_in / weight[0].numel()) if fan_in else 1.0
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in network.parameters():
        groups.setdefault(shares.get(parameter, 1.0), []).append(parameter)
    return list(groups.items())


def loss_weights(cfg: CfgNode, task: str, target: Tensor, known: Tensor) -> Tensor:
    """Return the weights of a task's target in its loss.

    Affinities of 0 and 1 have the same total weight in each patch, and with TRAIN.AFF_LOSS "bce" in each of its
    channels.

    Args:
        cfg: the config.
        task: name of the task.
        target: (batch, channels, z, y, x), as in a `TrainingBatch`.
        known: where it is known, as in a `TrainingBatch`.

    Returns:
        float32, of the shape of the target, or with one channel for all; 0 where the target is unknown.
    """
    if not TASKS[task].balanced:
        return known.float()
    return balanced_weights(target, known, per_channel=cfg.TRAIN.AFF_LOSS == "bce")


def training_precision(cfg: CfgNode, device: torch.device) -> Precision:
    """Return the precision to train in. The random numbers that follow do not depend on whether it had to be found.

    Raises:
        UserError: fp16 on a CPU.
    """
    model = cfg.MODEL
    shapes = model.DOWNSAMPLE_FACTORS, model.KERNEL_SIZE_DOWN, model.KERNEL_SIZE_UP, model.PAD_CONV
    size = tuple(min(MOST_TIMED, voxels) for voxels in model.INPUT_SHAPE)

    def training_pass(network: nn.Module, precision: Precision) -> Sequence[Tensor]:
        shape, _ = nearest_input_shapes(size, *shapes)[-1]
        patch = np.random.default_rng(0).random((1, input_channels(cfg), *shape), np.float32) * 2 - 1
        with precision.autocast():
            outputs = network(precision.place(torch.from_numpy(patch)))
        sum(output.float().sum() for output in outputs).backward()
        return [output.detach() for output in outputs]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return find_precision(cfg.TRAIN.MIXED_PRECISION, device, build_model(cfg), training_pass)


class Trainer:
    """A network in training, its optimizer and, with TRAIN.EMA, the average of its weights.

    Args:
        cfg: the config.
        precision: the precision and the device of the network.
        ranks: the processes that train together.

    Attributes:
        network: the model type's own network, whose weights are trained and saved.
        tasks: names of the network's tasks.
        channels: finds dead channels.
        training_data: statistics of the volumes, to save with the weights; see `training_statistics`.
    """

    def __init__(self, cfg: CfgNode, precision: Precision, ranks: Ranks) -> None:
        self.cfg, self.precision, self.ranks = cfg, precision, ranks
        self.network = precision.place(build_model(cfg))
        self.tasks = self.network.tasks
        self.channels = ChannelWatch()
        self.training_data: list[dict[str, Any]] = []
        self.averaged: AveragedModel | None = None
        if cfg.TRAIN.EMA:
            self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(cfg.TRAIN.EMA))
        self.rate_shares, groups = zip(*parameter_groups(self.network, cfg.TRAIN.LR_FAN_IN), strict=True)
        self.optimizer = torch.optim.Adam(
            [{"params": group} for group in groups], lr=cfg.TRAIN.INITIAL_LR, betas=tuple(cfg.TRAIN.LR_BETAS)
        )
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype == torch.float16)

    def load(self, path: Path | str) -> int:
        """Continue from a checkpoint.

        Returns:
            The iteration at which it was saved.

        Raises:
            UserError: the checkpoint cannot be used; see `load_checkpoint`.
        """
        iteration = load_checkpoint(path, self.network, self.cfg, self.optimizer)
        if self.averaged:
            load_checkpoint(path, self.averaged.module, self.cfg)
            self.averaged.n_averaged.fill_(iteration)
        if self.scaler.is_enabled() and (scale := read_checkpoint(path).get("scaler_state_dict")):
            self.scaler.load_state_dict(scale)
        return iteration

    def start_from(self, path: Path | str) -> None:
        """Start from the weights of another run, those that it predicts with.

        Raises:
            UserError: the checkpoint cannot be used; see `load_checkpoint`.
        """
        for network in [self.network, *([self.averaged.module] if self.averaged else [])]:
            load_checkpoint(path, network, self.cfg, key="TRAIN.INITIAL_WEIGHTS")

    def save(self, path: Path | str, iteration: int, **more: Any) -> None:
        """Write a checkpoint.

        Args:
            path: the file.
            iteration: the number of iterations so far.
            more: further entries of the file.

        Raises:
            UserError: the file cannot be written.
        """
        if self.averaged:
            more["ema_state_dict"] = self.averaged.module.state_dict()
        if self.scaler.is_enabled():
            more["scaler_state_dict"] = self.scaler.state_dict()
        if self.training_data:
            more[TRAINING_DATA] = self.training_data
        save_checkpoint(path, self.network, self.optimizer, iteration, network_settings(self.cfg), **more)

    def prepare(self) -> None:
        """Get ready to train, together with all ranks. Call this once, after `load`."""
        self.parallel: DistributedDataParallel | None = None
        forward: nn.Module = self.network
        if self.ranks.size > 1:
            forward = self.parallel = DistributedDataParallel(self.network)
        if self.cfg.TRAIN.COMPILE:
            forward = cast(nn.Module, torch.compile(forward))
        self.model = self.precision.place(complete_network(self.cfg, forward))

    @cached_property
    def prediction_network(self) -> nn.Module:
        """A network that predicts from raw data, with the averaged weights if there are any, else the trained ones.

        A checkpoint that is saved now predicts with the same weights.
        """
        return complete_network(self.cfg, self.averaged.module if self.averaged else self.network)

    def watched_channels(self, iteration: int) -> AbstractContextManager[None]:
        """Return the context for the step to an iteration, in which all ranks watch the channels if it is time to."""
        if iteration % max(self.cfg.TRAIN.LOG_EVERY, ChannelWatch.MIN_INTERVAL):
            return nullcontext()
        return self.channels.watch(self.network)

    @explain_device_errors("reduce INPUT_SHAPE or NUM_FMAPS in the network's section, or TRAIN.BATCH_SIZE")
    def run_iteration(self, batches: list[TrainingBatch], iteration: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Train on batches. Gradients are added up over all of them and over all ranks.

        The loss is the mean over all their weighted entries. It therefore does not matter how patches are distributed
        over batches and ranks.

        Args:
            batches: the batches of this rank.
            iteration: the number of the iteration, from 0.

        Returns:
            Losses by task and `total`, and predictions for the last batch by task, float32 (batch, channels, z, y, x).

        Raises:
            UserError: there is not enough memory, or TRAIN.COMPILE failed.
        """
        for group, share in zip(self.optimizer.param_groups, self.rate_shares, strict=True):
            group["lr"] = share * learning_rate(self.cfg, iteration)
        self.model.train()
        self.optimizer.zero_grad()
        counts = [float(sum(self._entries(task, batch) for batch in batches)) for task in self.tasks]
        entries = dict(zip(self.tasks, self.ranks.total(counts), strict=True))
        sums = dict.fromkeys(self.tasks, 0.0)
        for number, batch in enumerate(batches, start=1):
            # Ranks exchange gradients once, after the last batch.
            more_follow = number < len(batches)
            with self.parallel.no_sync() if self.parallel is not None and more_follow else nullcontext():
                losses, predictions = self._losses(batch, entries)
                total = sum(getattr(self.cfg.TRAIN, TASKS[task].loss_weight) * loss for task, loss in losses.items())
                # DistributedDataParallel averages over ranks, but the sum is needed.
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

    def _losses(self, batch: TrainingBatch, entries: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the network on one batch.

        Args:
            batch: the batch.
            entries: task -> number of weighted entries in all batches of the iteration, by which its loss is divided.

        Returns:
            Losses by task, and predictions by task.
        """

        def on_device(array: NDArray[Any]) -> Tensor:
            return self.precision.place(torch.from_numpy(array))

        with self.precision.autocast():
            outputs = self.model(on_device(batch.raw))
        predictions = {task: output.float() for task, output in outputs._asdict().items()}
        targets = {task: on_device(array) for task, array in batch.targets.items()}
        losses = {
            task: self._loss(task)(
                prediction,
                targets[task].float(),
                loss_weights(self.cfg, task, targets[task], on_device(batch.known[task])),
                entries[task],
            )
            for task, prediction in predictions.items()
        }
        return losses, predictions

    @staticmethod
    def _entries(task: str, batch: TrainingBatch) -> int:
        """Return the number of entries of a task's target that are known."""
        known = batch.known[task]
        return int(np.count_nonzero(known)) * batch.targets[task].shape[1] // known.shape[1]

    def _loss(self, task: str) -> Loss:
        key = TASKS[task].loss
        return LOSSES[self.cfg.TRAIN[key] if key else "mse"]
