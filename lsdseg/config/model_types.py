"""Tasks and model types: each is one entry in a table here.

A task is what one head of a network predicts. A model type is a U-Net with one head per task. Its input is raw, or what
another model type, trained before, predicts from raw (auto-context: Sheridan et al., Nature Methods 2023). The network,
targets, losses, config keys and arrays on disk all follow from these tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode


@dataclass(frozen=True)
class Labels:
    """A kind of ground truth. Its name in LABELS is also the key of DATA that names its dataset.

    Attributes:
        dataset: default name of the dataset in a zarr.
        mask: default name of its mask, which is 1 where labels are known. The key of DATA ends in _MASK.
    """

    dataset: str
    mask: str


LABELS = {
    "NEURON_LABELS": Labels("volumes/labels/neuron_ids", "volumes/labels/labels_mask"),
    "MITO_LABELS": Labels("volumes/labels/mito_ids", "volumes/labels/labels_mask_mito"),
}


def lsd_channels(cfg: CfgNode) -> int:
    """Return the number of LSDs: 10 in 3D, 6 in 2D."""
    return 6 if cfg.DATA.DIM_2D else 10


def affinity_offsets(cfg: CfgNode) -> list[list[int]]:
    """Return the offsets (z, y, x) in voxels of the affinities, one per channel. In 2D, z is 0."""
    return [[0] * (3 - len(offset)) + list(offset) for offset in cfg.TRAIN.NEIGHBORHOOD]


def placement_offsets(cfg: CfgNode) -> list[list[int]]:
    """Return the offsets (z, y, x) in voxels of the placement: the direct neighbors, in 2D those in the section."""
    return [[-1, 0, 0], [0, -1, 0], [0, 0, -1]][int(cfg.DATA.DIM_2D) :]


@dataclass(frozen=True)
class Task:
    """What one head predicts. On disk it is the dataset `volumes/pred_TASK`.

    Attributes:
        head: name of the head in the state dict. Published checkpoints depend on it.
        loss_weight: key of TRAIN for the weight of its loss.
        channels: takes a config and returns the number of channels.
        target: "module:function" that makes its training target; see `lsdseg.engine.training.targets`.
        labels: name in LABELS of the ground truth to train on.
        loss: key of TRAIN that names its loss, "mse" or "bce". None: mean squared error.
        balanced: whether 0 and 1 of the target count the same in its loss.
        touching: whether it learns from neuron labels between which no boundary was grown.
        attributes: takes a config and returns attributes of the array on disk, in addition to its placement.
    """

    head: str
    loss_weight: str
    channels: Callable[[CfgNode], int]
    target: str
    labels: str = "NEURON_LABELS"
    loss: str | None = None
    balanced: bool = False
    touching: bool = False
    attributes: Callable[[CfgNode], dict[str, Any]] = lambda cfg: {}

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ValueError(f"labels {self.labels!r} of a task are not in LABELS: {', '.join(LABELS)}")


TASKS = {
    "lsds": Task("lsd_head", "LSD_LOSS_WEIGHT", lsd_channels, "lsdseg.engine.training.targets:lsd_target"),
    "affs": Task(
        "aff_head",
        "AFF_LOSS_WEIGHT",
        lambda cfg: len(cfg.TRAIN.NEIGHBORHOOD),
        "lsdseg.engine.training.targets:affinity_target",
        loss="AFF_LOSS",
        balanced=True,
        attributes=lambda cfg: {"offsets": affinity_offsets(cfg)},
    ),
    "placement": Task(
        "placement_head",
        "PLACEMENT_LOSS_WEIGHT",
        lambda cfg: len(placement_offsets(cfg)),
        "lsdseg.engine.training.targets:placement_target",
        loss="AFF_LOSS",
        balanced=True,
        touching=True,
        attributes=lambda cfg: {"offsets": placement_offsets(cfg)},
    ),
    "mito": Task(
        "mito_head",
        "MITO_LOSS_WEIGHT",
        lambda cfg: 1,
        "lsdseg.engine.training.targets:foreground_target",
        labels="MITO_LABELS",
        balanced=True,
    ),
}


@dataclass(frozen=True)
class ModelType:
    """What a network predicts, and from what.

    Attributes:
        tasks: names in TASKS, in the order in which the network returns them.
        inputs: what goes in, in the order of the input channels: "raw", and tasks of `first`.
        first: the model type whose predictions go into this one. None: only raw goes in.
    """

    tasks: tuple[str, ...]
    inputs: tuple[str, ...] = ("raw",)
    first: str | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - TASKS.keys():
            raise ValueError(f"tasks {sorted(unknown)} of a model type are not in TASKS: {', '.join(TASKS)}")


MODEL_TYPES = {
    "MTLSD": ModelType(("lsds", "affs")),
    "LSD": ModelType(("lsds",)),
    "AFF": ModelType(("affs",)),
    "ACLSD": ModelType(("affs",), inputs=("lsds",), first="LSD"),
    "ACRLSD": ModelType(("affs",), inputs=("raw", "lsds"), first="LSD"),
    "MTLSDMITO": ModelType(("lsds", "affs", "mito")),
}


def tasks_of(cfg: CfgNode) -> tuple[str, ...]:
    """Return the tasks of the configured network in output order.

    They are those of its model type and, with TRAIN.PLACEMENT, "placement" if it predicts affinities.
    """
    tasks = MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].tasks
    return (*tasks, "placement") if cfg.TRAIN.PLACEMENT and "affs" in tasks else tasks


def task_channels(cfg: CfgNode) -> dict[str, int]:
    """Return task -> number of output channels of the configured network, in output order."""
    return {task: TASKS[task].channels(cfg) for task in tasks_of(cfg)}


def label_keys(cfg: CfgNode) -> list[str]:
    """Return the keys of DATA for the labels that the configured model type is trained on, those of neurons first."""
    return list(dict.fromkeys(["NEURON_LABELS", *(TASKS[task].labels for task in tasks_of(cfg))]))


def input_channels(cfg: CfgNode) -> int:
    """Return the number of input channels of the configured model type's own network. Raw has one."""
    inputs = MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].inputs
    return sum(1 if name == "raw" else TASKS[name].channels(cfg) for name in inputs)
