"""Training targets of the tasks: what a head should predict, made from augmented labels, and where that is known.

`config.model_types.TASKS` names the function of each task. It is called as function(cfg, labels, mask), with the keys
of the task's labels and of the mask that says what is labeled. It returns a `Target`.
"""

from typing import NamedTuple

import gunpowder as gp
import numpy as np
from yacs.config import CfgNode

from lsdseg.config.model_types import affinity_offsets, placement_offsets
from lsdseg.engine.sections import along_zyx
from lsdseg.engine.training.nodes import AddAffinities, AddLocalShapeDescriptors, TargetFromLabels


class Target(NamedTuple):
    """What a task is trained on.

    Attributes:
        values: key of the target, (channels, z, y, x) in 0..1. If there is only one channel, its axis is missing.
        known: key of where the target is known: uint8, 0 or 1, of the same shape or with one channel for all.
        nodes: the nodes that make both.
    """

    values: gp.ArrayKey
    known: gp.ArrayKey
    nodes: list[gp.BatchFilter]


def lsd_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on the local shape descriptors of the labels."""
    lsds, known = gp.ArrayKey("LSDS"), gp.ArrayKey("LSDS_MASK")
    node = AddLocalShapeDescriptors(
        labels,
        mask,
        lsds,
        known,
        voxel_size=along_zyx(cfg.MODEL.VOXEL_SIZE, 1),
        sigma=cfg.MODEL.LSD_SIGMA,
        downsample=cfg.MODEL.LSD_DOWNSAMPLE,
        sections=cfg.DATA.DIM_2D,
    )
    return Target(lsds, known, [node])


def affinity_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on the affinities of the labels."""
    return _affinities_at(affinity_offsets(cfg), labels, mask, "AFFS")


def placement_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on the affinities of direct neighbors. The labels should touch."""
    return _affinities_at(placement_offsets(cfg), labels, mask, "PLACEMENT")


def _affinities_at(offsets: list[list[int]], labels: gp.ArrayKey, mask: gp.ArrayKey, name: str) -> Target:
    affs, known = gp.ArrayKey(name), gp.ArrayKey(f"{name}_MASK")
    return Target(affs, known, [AddAffinities(offsets, labels, mask, affs, known)])


def foreground_target(_cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Train on 1 where there are labels and 0 elsewhere."""
    foreground = gp.ArrayKey(f"{labels.identifier}_FOREGROUND")
    return Target(foreground, mask, [TargetFromLabels(labels, foreground, lambda ids: ids != 0, dtype=np.uint8)])
