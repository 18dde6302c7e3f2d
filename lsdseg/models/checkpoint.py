"""Checkpoints: one file per saved iteration, written as a whole or not at all.

Files are read with `weights_only=True`: a checkpoint from a stranger can contain tensors and plain values but cannot
run code. Weights alone do not say which settings they belong to. The settings that shape the network are therefore
saved with them, so that a message about a mismatch can name the config key instead of a tensor.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from lsdseg.config.model_types import task_channels
from lsdseg.config.rules import NETWORK, RULES, canonical, settings_of
from lsdseg.errors import UserError, quoted
from lsdseg.files import write_whole

# Entries of a checkpoint that are dicts with names as keys, and those that are numbers, from 0. All but the first may
# be missing.
DICTS = ("model_state_dict", "optimizer_state_dict", "scaler_state_dict", "ema_state_dict", "network_settings")
NUMBERS = {"iteration": (int,), "validation_voi": (int, float)}
# Statistics of the volumes of the training run, a list with a dict for each; see `lsdseg.engine.statistics`.
TRAINING_DATA = "training_data"
HISTOGRAM_BINS, MOST_STATISTICS = 256, 64
# What a loss scaler reads from its entry, which may be empty.
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def network_settings(cfg: CfgNode) -> dict[str, Any]:
    """Collect the values of all config keys that shape the network.

    Returns:
        Config key -> number, bool, text or nested lists of numbers.
    """
    settings = settings_of(cfg, NETWORK)
    if "affs" not in task_channels(cfg):
        del settings["TRAIN.NEIGHBORHOOD"], settings["TRAIN.PLACEMENT"]
    return settings


def checkpoint_path(folder: Path | str, iteration: int) -> Path:
    """Return the path of the checkpoint of an iteration."""
    return Path(folder) / f"model_checkpoint_{iteration}"


def checkpoints_in(folder: Path | str) -> list[Path]:
    """Return the numbered checkpoints in a folder, ordered by iteration."""
    numbered = {
        int(match[1]): path
        for path in Path(folder).glob("model_checkpoint_*")
        if (match := re.fullmatch(r"model_checkpoint_(\d+)", path.name))
    }
    return [numbered[iteration] for iteration in sorted(numbered)]


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Return the checkpoint of the highest iteration in a folder, None if there is none."""
    checkpoints = checkpoints_in(folder)
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(
    path: Path | str, model: nn.Module, optimizer: Optimizer, iteration: int, settings: dict[str, Any], **more: Any
) -> None:
    """Write a checkpoint file.

    Args:
        path: the file.
        model: its weights are saved.
        optimizer: its state is saved.
        iteration: number of iterations that the weights were trained for.
        settings: what `network_settings` returns.
        more: further entries, such as `ema_state_dict`: averaged weights, which are used to predict instead of those
            of the model.

    Raises:
        UserError: the file cannot be written.
    """
    state = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "iteration": iteration,
        "network_settings": settings,
        **more,
    }
    write_state(path, state)


def write_state(path: Path | str, state: dict[str, Any]) -> None:
    """Write the entries of a checkpoint file, as a whole or not at all.

    Raises:
        UserError: the disk is full, or the file cannot be written for another reason.
    """
    with write_whole(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # raised by torch's zip writer when it cannot write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def save_untrained(path: Path | str, model: nn.Module, cfg: CfgNode) -> None:
    """Write a network that was never trained, as a baseline to predict with.

    Raises:
        UserError: the file cannot be written.
    """
    save_checkpoint(path, model, torch.optim.Adam(model.parameters()), 0, network_settings(cfg))


def load_checkpoint(
    path: Path | str,
    model: nn.Module,
    cfg: CfgNode,
    optimizer: Optimizer | None = None,
    key: str = "TRAIN.CHECKPOINT",
) -> int:
    """Load weights, to predict with or to continue training.

    Args:
        path: the checkpoint file.
        model: gets the weights.
        cfg: the config that `model` was built from.
        optimizer: gets its state. The model then gets the weights to train on. Without an optimizer, it gets those to
            predict with: they differ where the training run averages its weights.
        key: the config key that names the file, for messages.

    Returns:
        The iteration at which the weights were saved. Published checkpoints do not contain it: then it is the number
        at the end of the file name, or 0 if there is none.

    Raises:
        UserError: the file does not exist, is damaged, is not a checkpoint, contains pickled code, holds weights that
            are not finite floating-point numbers, or belongs to another network, or the optimizer was trained with
            another TRAIN.LR_FAN_IN.
    """
    if not path:
        raise UserError(f"{key} is empty: set it to a file model_checkpoint_ITERATION that trainer.py wrote")
    path = Path(path)
    state = read_checkpoint(path, key)
    weights = state["model_state_dict"]
    if optimizer is None:
        weights = state.get("ema_state_dict", weights)
    _check_settings(path, state.get("network_settings", {}), cfg, key)
    _check_shapes(path, weights, model)
    for name, tensor in weights.items():
        _check_tensor(path, name, tensor)
    model.load_state_dict(weights, strict=True)
    if optimizer is not None and "optimizer_state_dict" in state:
        _load_optimizer(path, state["optimizer_state_dict"], optimizer)
    number = re.search(r"_(\d+)$", path.name)
    iteration: int = state.get("iteration", int(number[1]) if number else 0)
    return iteration


def read_checkpoint(path: Path | str, key: str = "TRAIN.CHECKPOINT") -> dict[str, Any]:
    """Read all entries of a checkpoint file, onto the CPU.

    Args:
        path: the checkpoint file.
        key: the config key that names the file, for messages.

    Returns:
        At least `model_state_dict`: name -> tensor.

    Raises:
        UserError: the file does not exist, is damaged, is not a checkpoint, or contains pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: set {key} to a model_checkpoint_N file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for broken files; the remedy is the same for all
        if _is_pickle(path) and "GLOBAL" in str(error):
            reason = "contains pickled code, which is never run"
        else:
            reason = "is truncated or not a checkpoint"
        raise UserError(
            f"{path} {reason}: copy it again from its source, or set {key} to another model_checkpoint_N file"
        ) from None
    if isinstance(state, dict) and state and all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        state = {"model_state_dict": state}  # bare weights, as `torch.save(model.state_dict(), path)` writes them
    if not isinstance(state, dict) or not isinstance(state.get("model_state_dict"), dict):
        raise UserError(f"{path} is not an LSD checkpoint (it has no model_state_dict): set {key} to another file")
    for field in DICTS:
        entries = state.get(field, {})
        if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
            raise _damaged(path, f"{field} is {quoted(entries)}")
    settings = state.get("network_settings", {})
    for setting, value in settings.items():
        try:
            settings[setting] = canonical(setting, value) if setting in RULES else value
        except ValueError:
            raise _damaged(path, f"{setting} is {quoted(value)} in network_settings") from None
    scaler = state.get("scaler_state_dict") or dict.fromkeys(SCALER, 0)
    if not scaler.keys() >= SCALER or not all(type(n) in (int, float) and 0 <= n < math.inf for n in scaler.values()):
        raise _damaged(path, f"scaler_state_dict is {quoted(scaler)}")
    for field, kinds in NUMBERS.items():
        number = state.get(field, 0)
        if type(number) not in kinds or not 0 <= number < math.inf:
            raise _damaged(path, f"{field} is {quoted(number)}")
    statistics = state.get(TRAINING_DATA, [])
    if not isinstance(statistics, list) or len(statistics) > MOST_STATISTICS or not all(map(_is_known, statistics)):
        raise _damaged(path, f"{TRAINING_DATA} is {quoted(statistics)}")
    return state


def _is_known(statistics: Any) -> bool:
    """Return whether an entry of TRAINING_DATA holds what `lsdseg.engine.statistics.Statistics` takes."""

    def numbers(values: Any, low: float, high: float) -> bool:
        return isinstance(values, list) and all(type(n) in (int, float) and low <= n <= high for n in values)

    if not isinstance(statistics, dict):
        return False
    histogram: Any = statistics.get("histogram")
    voxel_size: Any = statistics.get("voxel_size")
    contrast = statistics.get("contrast", "missing")
    return (
        numbers(histogram, 0, 1)
        and len(histogram) == HISTOGRAM_BINS
        and math.isclose(sum(histogram), 1, abs_tol=1e-3)
        and numbers(voxel_size, 1e-3, 1e9)
        and len(voxel_size) in (2, 3)
        and numbers([statistics.get("lines")], -1, 1)
        and (contrast is None or numbers([contrast], -1, 1))
    )


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged, {reason}: copy it again from its source, or use another checkpoint")


def _is_pickle(path: Path) -> bool:
    """Return whether the first bytes of a file are those of a torch archive or a bare pickle."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def _check_settings(path: Path, trained: dict[str, Any], cfg: CfgNode, key: str) -> None:
    """Compare the settings in a checkpoint with the config.

    Raises:
        UserError: they describe different networks.
    """
    # Older checkpoints do not say it: they had ReLUs. No tensor would show it, and predictions would be wrong.
    trained = {f"{section}.ACTIVATION": "relu" for section in ("MODEL_ISO", "MODEL_ANISO")} | trained
    for setting, now in network_settings(cfg).items():
        then = trained.get(setting, now)
        if canonical(setting, then) != canonical(setting, now):
            if key == "TRAIN.CHECKPOINT":
                remedy = "use that value, or choose another CKPT_FOLDER for the new network"
            else:
                remedy = f"name another checkpoint in {key}"
            raise UserError(f"{setting} is {now} but {path} was trained with {then}: {remedy}")


def _check_shapes(path: Path, weights: dict[str, Any], model: nn.Module) -> None:
    """Compare the names and shapes of the tensors in a checkpoint with those of a network.

    Raises:
        UserError: they differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} belongs to another network: {name} is {_shape_text(found.get(name))} there and "
                f"{_shape_text(expected.get(name))} here; {_keys_to_check(name)}"
            )


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    """Check that a tensor holds what a network can be made of.

    Raises:
        UserError: it is not a plain tensor of finite floating-point numbers.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
        raise _damaged(path, f"{name} is {getattr(tensor, 'dtype', type(tensor))}, not floating-point numbers")
    if tensor.is_meta or not torch.isfinite(tensor).all():
        raise _damaged(path, f"{name} holds NaN, infinite or no values")


def _load_optimizer(path: Path, state: dict[str, Any], optimizer: Optimizer) -> None:
    """Load the moments of Adam. Its options remain those of the config.

    Raises:
        UserError: the state belongs to other groups of parameters, or is damaged.
    """
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError:  # other groups of parameters, which only this key makes
        raise UserError(
            f"{path} was trained with another TRAIN.LR_FAN_IN: use that value, or choose another CKPT_FOLDER"
        ) from None
    except Exception as error:  # torch assumes that it wrote the state itself
        raise _damaged(path, f"{type(error).__name__} in optimizer_state_dict") from None
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            if not isinstance(moments, dict):
                raise _damaged(path, f"optimizer_state_dict holds {quoted(moments)}")
            shapes = {name: getattr(tensor, "shape", None) for name, tensor in moments.items()}
            if shapes not in ({}, {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}):
                raise _damaged(path, "optimizer_state_dict does not fit the weights")
            for name, tensor in moments.items():
                _check_tensor(path, f"{name} in optimizer_state_dict", tensor)


def _shape_text(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def _keys_to_check(tensor_name: str) -> str:
    if "_head." in tensor_name:
        return "check TRAIN.MODEL_TYPE, TRAIN.NEIGHBORHOOD, TRAIN.PLACEMENT and NUM_FMAPS_OUT"
    return "check NUM_FMAPS, FMAP_INC_FACTOR, DOWNSAMPLE_FACTORS and KERNEL_SIZE_DOWN/UP"
