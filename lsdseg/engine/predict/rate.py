"""Under which name it is kept how fast a network predicts: that depends on the network and on what it runs on."""

import hashlib
import json

import torch
from yacs.config import CfgNode

from lsdseg.config.rules import NETWORK, settings_of
from lsdseg.engine.blocks.rates import rate_name
from lsdseg.engine.blocks.workers import workers_class
from lsdseg.engine.device import cpu_threads, gpus_of

# Keys that change the time or the size of a prediction, beside those of the network.
KEYS = ("VIEWS", "AFFS_DTYPE")


def prediction_rate(cfg: CfgNode, workers: int = 0) -> str:
    """Return the name, see `rates.py`.

    Args:
        cfg: the config.
        workers: how many predict side by side. 0: this process predicts.
    """
    settings = settings_of(cfg, NETWORK) | {key: cfg.DATA[key] for key in KEYS}
    settings |= {"precision": cfg.TRAIN.MIXED_PRECISION}
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
    what = f"prediction by network {digest}"
    if workers and cfg.CLUSTER.TYPE != "local":
        gpus = 0 if cfg.TRAIN.DEVICE == "cpu" else cfg.CLUSTER.GPUS_PER_WORKER
        return rate_name(cfg, f"{what}, {gpus} GPUs, {threads_of_worker(cfg, workers)} threads")
    if gpus := gpus_of(cfg):
        sharing = -(-workers // gpus)
        return f"{what} on {torch.cuda.get_device_name()}" + (f", shared by {sharing}" if sharing > 1 else "")
    return rate_name(cfg, f"{what}, {threads_of_worker(cfg, workers)} threads")


def threads_of_worker(cfg: CfgNode, workers: int) -> int:
    """Return how many threads the network has in each of some workers. 0: in this process."""
    return int(cfg.TRAIN.THREADS or workers_class(cfg).threads(cfg, workers)) if workers else cpu_threads(cfg)
