"""Weights & Biases: a copy of what a run writes to TensorBoard, with PREPROCESS.USE_WANDB.

The package wandb is optional. Its own environment variables say where the copy goes: `WANDB_MODE=offline` keeps it in
the folder of the logs until `wandb sync`, `WANDB_PROJECT` and `WANDB_ENTITY` name the project.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from yacs.config import CfgNode

from lsdseg.config.rules import NETWORK, TRAINING, settings_of
from lsdseg.errors import UserError
from lsdseg.pictures import RGBImage

PROJECT = "lsd"


class Copy:
    """A run of Weights & Biases that is going on. Without one, nothing happens."""

    def __init__(self, wandb: ModuleType | None = None, run: Any = None) -> None:
        self._wandb, self._run = wandb, run

    def add(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Log numbers."""
        if self._run is not None:
            self._run.log({**scalars, "iteration": iteration})

    def add_pictures(self, pictures: Mapping[str, RGBImage], iteration: int) -> None:
        """Log pictures."""
        if self._run is not None and self._wandb is not None:
            images = {name: self._wandb.Image(image) for name, image in pictures.items()}
            self._run.log({**images, "iteration": iteration})


def import_wandb() -> ModuleType:
    """Import wandb.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(
            "PREPROCESS.USE_WANDB is True but wandb is not installed: pip install wandb, or set it to False"
        ) from None
    module: ModuleType = wandb
    return module


@contextmanager
def wandb_copy(cfg: CfgNode) -> Iterator[Copy]:
    """Begin a run, or go on with that of the same checkpoint folder, and end it with the context.

    Raises:
        UserError: wandb is not installed, or cannot begin a run: nobody is logged in, or there is no connection.
    """
    if not cfg.PREPROCESS.USE_WANDB:
        yield Copy()
        return
    wandb, folder = import_wandb(), Path(cfg.MODEL.CKPT_FOLDER).resolve()
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest(),
            resume="allow",
            name=folder.name,
            dir=cfg.MODEL.LOG_DIR,
            config=settings_of(cfg, NETWORK) | settings_of(cfg, TRAINING),
            settings=wandb.Settings(console="off"),
        )
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"Weights & Biases cannot begin a run ({error}): run wandb login, set the environment variable "
            "WANDB_MODE=offline, or set PREPROCESS.USE_WANDB to False"
        ) from error
    # A run that goes on from an earlier checkpoint repeats iterations, which the step of wandb's own must not.
    run.define_metric("*", step_metric="iteration")
    code = 1
    try:
        yield Copy(wandb, run)
        code = 0
    finally:
        run.finish(exit_code=code)
