"""Training targets of the tasks: what a head should predict, made from augmented labels, and the weights of its loss.

`config.model_types.TASKS` names the function of each task. It is called as function(cfg, labels, mask), with the keys
of the task's labels and of the mask that says what is labeled. It returns a `Target`.
"""

from typing import NamedTuple

import gunpowder as gp
import numpy as np
from yacs.config import CfgNode

from lsdseg.config.model_types import affinity_offsets, placement_offsets
from lsdseg.engine.training.nodes import AddLocalShapeDescriptors, TargetFromLabels


class Target(NamedTuple):
    """What a task is trained on.

    Attributes:
        values: key of the target, (channels, z, y, x) in 0..1. If there is only one channel, its axis is missing.
        weights: key of the weights, of the same shape; 0 where the target is unknown.
        nodes: the nodes that make both.
    """

    values: gp.ArrayKey
    weights: gp.ArrayKey
    nodes: list[gp.BatchFilter]


def lsd_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on the local shape descriptors of the labels."""
    lsds, weights = gp.ArrayKey("LSDS"), gp.ArrayKey("LSDS_WEIGHTS")
    node = AddLocalShapeDescriptors(
        labels,
        mask,
        lsds,
        weights,
        sigma=cfg.MODEL.LSD_SIGMA,
        downsample=cfg.MODEL.LSD_DOWNSAMPLE,
        sections=cfg.DATA.DIM_2D,
    )
    return Target(lsds, weights, [node])


def affinity_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on the affinities of the labels, weighted as in `_affinities_at`."""
    return _affinities_at(affinity_offsets(cfg), cfg, labels, mask, "AFFS")


def placement_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on the affinities of direct neighbors, weighted as in `_affinities_at`. The labels should touch."""
    return _affinities_at(placement_offsets(cfg), cfg, labels, mask, "PLACEMENT")


def _affinities_at(offsets: list[list[int]], cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey, name: str) -> Target:
    """Train on affinities, weighted so that 0 and 1 count the same in each patch.

    With TRAIN.AFF_LOSS "bce" they count the same in each channel of a patch.
    """
    affs, known, weights = (gp.ArrayKey(f"{name}{suffix}") for suffix in ("", "_MASK", "_WEIGHTS"))
    slab = (1, -1, -1, -1) if cfg.TRAIN.AFF_LOSS == "bce" else None
    nodes = [
        gp.AddAffinities(offsets, labels, affs, labels_mask=mask, affinities_mask=known),
        gp.BalanceLabels(affs, weights, mask=known, slab=slab),
    ]
    return Target(affs, weights, nodes)


def foreground_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on 1 where there are labels and 0 elsewhere, weighted so that both count the same in each patch."""
    foreground, weights = (gp.ArrayKey(f"{labels.identifier}_{name}") for name in ("FOREGROUND", "FOREGROUND_WEIGHTS"))
    nodes = [
        TargetFromLabels(labels, foreground, lambda ids: ids != 0, dtype=np.uint8),
        gp.BalanceLabels(foreground, weights, mask=mask),
    ]
    return Target(foreground, weights, nodes)
