"""What each model type is: one entry here, from which network, targets, losses and arrays on disk all follow.

A model type is a U-Net with one head per task. What goes into it is raw data, or what another model type, trained
before, predicts from raw data (auto-context: Sheridan et al., Nature Methods 2023).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What one head predicts; on disk it is `volumes/pred_TASK`.

    Attributes:
        head: name of the head in the state dict (contract with published checkpoints).
        loss_weight: key of TRAIN that weighs its loss, a weighted mean squared error.
        labels: key of DATA that names the labels it is trained on; with _MASK behind it, their mask.
    """

    head: str
    loss_weight: str
    labels: str = "NEURON_LABELS"


TASKS = {
    "lsds": Task("lsd_head", "LSD_LOSS_WEIGHT"),
    "affs": Task("aff_head", "AFF_LOSS_WEIGHT"),
    "mito": Task("mito_head", "MITO_LOSS_WEIGHT", "MITO_LABELS"),
}


@dataclass(frozen=True)
class ModelType:
    """A network and what it is trained on.

    Attributes:
        tasks: names in TASKS, in the order in which the network returns them.
        inputs: what the network sees, in the order of its input channels: "raw", and tasks of `first`.
        first: the model type whose predictions go into this one. None: only raw does.
    """

    tasks: tuple[str, ...]
    inputs: tuple[str, ...] = ("raw",)
    first: str | None = None


MODEL_TYPES = {
    "MTLSD": ModelType(("lsds", "affs")),
    "LSD": ModelType(("lsds",)),
    "AFF": ModelType(("affs",)),
    "ACLSD": ModelType(("affs",), inputs=("lsds",), first="LSD"),
    "ACRLSD": ModelType(("affs",), inputs=("raw", "lsds"), first="LSD"),
    "MTLSDMITO": ModelType(("lsds", "affs", "mito")),
}


def task_channels(cfg) -> dict[str, int]:
    """Task -> number of output channels of the configured model type, in output order."""
    channels = {"lsds": cfg.MODEL.LSDS, "affs": len(cfg.TRAIN.NEIGHBORHOOD), "mito": 1}
    return {task: channels[task] for task in MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].tasks}


def label_keys(cfg) -> list[str]:
    """Keys of DATA that name the labels which the configured model type is trained on; those of neurons come first."""
    tasks = MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].tasks
    return list(dict.fromkeys(["NEURON_LABELS", *(TASKS[task].labels for task in tasks)]))


def input_channels(cfg) -> int:
    """Number of input channels of the configured model type's own network."""
    channels = {"raw": cfg.MODEL.IN_CHANNELS, "lsds": cfg.MODEL.LSDS}
    return sum(channels[name] for name in MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].inputs)
