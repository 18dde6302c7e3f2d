"""What a training run says: on the screen, and with the time in `train.log` beside its checkpoints.

A run takes days, often without a terminal. Whoever looks at it later needs what it said, and a line per point in
TensorBoard, which the progress bar shows on a screen. So all messages go to one logger: `INFO` and above to both,
`DEBUG` to the file alone.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.rules import NETWORK, TRAINING, settings_of
from lsdseg.data_utils.placement import voxel_size_nm
from lsdseg.data_utils.volumes import open_array, source_defaults
from lsdseg.engine.device import Precision
from lsdseg.engine.intensity import raw_window
from lsdseg.errors import UserError, without_secrets
from lsdseg.files import explain_os_errors

TRAIN_LOG = "train.log"

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)
log.propagate = False
log.addHandler(logging.NullHandler())  # of several processes, only the first one says anything


class _Screen(logging.Handler):
    """Print above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
        sys.stdout.flush()


class _File(logging.FileHandler):
    """Append to a file. One that cannot be written ends no run: if its disk is full, the next checkpoint says so."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        log.removeHandler(self)
        log.warning("warning: %s cannot be written any more (%s): see the screen", self.baseFilename, sys.exc_info()[1])


@contextmanager
def say_on_screen() -> Iterator[None]:
    """Print what is logged in this context. Only one process of a run must do so."""
    screen = _Screen(logging.INFO)
    log.addHandler(screen)
    try:
        yield
    finally:
        log.removeHandler(screen)


@contextmanager
def keep_log(folder: Path) -> Iterator[None]:
    """Append what is logged in this context to `train.log` in a folder, and how the context ended if it failed.

    Raises:
        UserError: the file cannot be written.
    """
    with explain_os_errors(folder / TRAIN_LOG):
        folder.mkdir(parents=True, exist_ok=True)
        file = _File(folder / TRAIN_LOG, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(file)
    try:
        yield
    except UserError as error:
        log.debug("ended: error: %s", error)
        raise
    except SystemExit:
        raise
    except BaseException:
        log.debug("ended:", exc_info=True)
        raise
    finally:
        log.removeHandler(file)
        with suppress(OSError):  # what is left to write goes nowhere either
            file.close()


def log_start(cfg: CfgNode, volumes: Sequence[Path], precision: Precision) -> None:
    """Write to the file what a run consists of: the command, the settings, the machine and the volumes."""
    settings = settings_of(cfg, NETWORK) | settings_of(cfg, TRAINING)
    log.debug("command: %s", without_secrets(shlex.join(sys.argv)))
    log.debug("settings: %s", ", ".join(f"{key} {value}" for key, value in settings.items()))
    device = precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    log.debug(
        "device: %s (%s), precision %s, PyTorch %s", device, name, precision.dtype or torch.float32, torch.__version__
    )
    for path in volumes:
        raw = open_array(path, cfg.DATA.RAW, **source_defaults(cfg))
        low, high = raw_window(raw, cfg)
        window = f"{low:g} becomes 0, and {high:g} becomes 1"
        log.debug("volume: %s, %s voxels of %s nm, %s, %s", path, raw.shape, voxel_size_nm(raw), raw.dtype, window)
