"""Checkpoints: one file per saved iteration, written whole or not at all.

Files are read with `weights_only=True`, so a checkpoint from a stranger can hold tensors and plain values but
cannot run code. Weights alone do not tell which settings they belong to, so the settings that shape the network
are saved with them, and a mismatch can name the config key instead of a tensor.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch

from lsdseg.config.model_types import task_channels
from lsdseg.errors import UserError
from lsdseg.files import write_whole

NETWORK_KEYS = (
    "IN_CHANNELS",
    "NUM_FMAPS",
    "NUM_FMAPS_OUT",
    "FMAP_INC_FACTOR",
    "DOWNSAMPLE_FACTORS",
    "KERNEL_SIZE_DOWN",
    "KERNEL_SIZE_UP",
    "PAD_CONV",
)


def network_settings(cfg) -> dict:
    """Config key -> plain value, for every key that shapes the network."""
    section = "MODEL_ISO" if cfg.DATA.FIB else "MODEL_ANISO"
    settings = {f"{section}.{key}": _plain(cfg.MODEL[key]) for key in NETWORK_KEYS}
    if "affs" in task_channels(cfg):
        settings["TRAIN.NEIGHBORHOOD"] = _plain(cfg.TRAIN.NEIGHBORHOOD)
    return {"TRAIN.MODEL_TYPE": cfg.TRAIN.MODEL_TYPE, **settings}


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def checkpoint_path(folder: Path | str, iteration: int) -> Path:
    """Path of the checkpoint of an iteration."""
    return Path(folder) / f"model_checkpoint_{iteration}"


def checkpoints_in(folder: Path | str) -> list[Path]:
    """The numbered checkpoints in a folder, by iteration."""
    numbered = {
        int(match[1]): path
        for path in Path(folder).glob("model_checkpoint_*")
        if (match := re.fullmatch(r"model_checkpoint_(\d+)", path.name))
    }
    return [numbered[iteration] for iteration in sorted(numbered)]


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The checkpoint of the highest iteration in a folder, None if there is none."""
    checkpoints = checkpoints_in(folder)
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(path: Path | str, model, optimizer, iteration: int, settings: dict, **more) -> None:
    """Write weights, optimizer state, iteration and `network_settings` to a temporary file and rename it.

    more: further entries, such as `ema_state_dict`, averaged weights that predict in place of the model's.
    """
    state = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "iteration": iteration,
        "network_settings": settings,
        **more,
    }
    write_state(path, state)


def write_state(path: Path | str, state: dict) -> None:
    """Write the entries of a checkpoint file, whole or not at all; UserError if there is no room."""
    with write_whole(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # how torch's zip writer reports that it could not write
            raise OSError(errno.ENOSPC, str(error).splitlines()[0]) from error


def save_untrained(path: Path | str, model, cfg) -> None:
    """Write a network that was never trained, to predict with: what a trained one is compared to."""
    save_checkpoint(path, model, torch.optim.Adam(model.parameters()), 0, network_settings(cfg))


def load_checkpoint(path: Path | str, model, cfg, optimizer=None, key: str = "TRAIN.CHECKPOINT") -> int:
    """Load the weights to predict with and return the iteration at which they were saved.

    With an optimizer, load its state and the weights to train on with: they differ where the run averages its weights.
    Published checkpoints, which hold no iteration, give the number at the end of their file name, else 0.

    Args:
        key: the config key that names the file, for messages.

    Raises:
        UserError: no such file; truncated, foreign or with pickled code in it; weights of another network.
    """
    if not path:
        raise UserError(f"{key} is empty: set it to a file model_checkpoint_ITERATION that trainer.py wrote")
    path = Path(path)
    state = read_checkpoint(path, key)
    weights = state["model_state_dict"] if optimizer else state.get("ema_state_dict", state["model_state_dict"])
    _check_same_network(path, weights, state.get("network_settings", {}), model, cfg, key)
    model.load_state_dict(weights, strict=True)
    if optimizer is not None and "optimizer_state_dict" in state:
        optimizer.load_state_dict(state["optimizer_state_dict"])
    number = re.search(r"_(\d+)$", path.name)
    return state.get("iteration", int(number[1]) if number else 0)


def read_checkpoint(path: Path | str, key: str = "TRAIN.CHECKPOINT") -> dict:
    """All entries of a checkpoint file; raises UserError as `load_checkpoint`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: set {key} to a model_checkpoint_N file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken files; the remedy is the same for all
        if _is_pickle(path) and "GLOBAL" in str(error):
            reason = "holds pickled code, which is never run"
        else:
            reason = "is truncated or no checkpoint"
        raise UserError(
            f"{path} {reason}: take it from its source again, or name another model_checkpoint_N file"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("model_state_dict"), dict):
        raise UserError(f"{path} is no checkpoint of this suite (no model_state_dict in it): set {key} to another file")
    return state


def _is_pickle(path: Path) -> bool:
    """Whether a file is a torch archive or a bare pickle, by its first bytes."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def _check_same_network(path: Path, weights: dict, trained: dict, model, cfg, key: str) -> None:
    for setting, now in network_settings(cfg).items():
        if setting in trained and trained[setting] != now:
            if key == "TRAIN.CHECKPOINT":
                remedy = "set it to that, or give the new network a CKPT_FOLDER of its own"
            else:
                remedy = f"name another checkpoint in {key}"
            raise UserError(f"{setting} is {now} but {path} was trained with {trained[setting]}: {remedy}")

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} belongs to another network: {name} is {_shape(found.get(name))} there and "
                f"{_shape(expected.get(name))} here: {_responsible_keys(name)}"
            )


def _shape(shape) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def _responsible_keys(tensor_name: str) -> str:
    if "_head." in tensor_name:
        return "check TRAIN.MODEL_TYPE, TRAIN.NEIGHBORHOOD and NUM_FMAPS_OUT"
    return "check NUM_FMAPS, FMAP_INC_FACTOR, DOWNSAMPLE_FACTORS and KERNEL_SIZE_DOWN/UP"
