"""Targets of the tasks: from labels, as they are after augmentation, to what a head should predict, and its weights.

`config.model_types.TASKS` names the function of each task. It is called as function(cfg, labels, mask) with the keys of
the task's labels and of the mask of what is labeled, and returns a `Target`.
"""

from typing import NamedTuple

import gunpowder as gp
from yacs.config import CfgNode

from lsdseg.config.model_types import affinity_offsets
from lsdseg.engine.training.nodes import AddLocalShapeDescriptors, Binarize


class Target(NamedTuple):
    """What a task is trained on.

    Attributes:
        values: key of the target, (channels, z, y, x) in 0..1; without an axis for channels if there is one.
        weights: key of the weights of its entries, the same shape; 0 where nothing is known.
        nodes: what makes the two.
    """

    values: gp.ArrayKey
    weights: gp.ArrayKey
    nodes: list[gp.BatchFilter]


def lsd_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Local shape descriptors of the labels."""
    lsds, weights = gp.ArrayKey("LSDS"), gp.ArrayKey("LSDS_WEIGHTS")
    options = {
        "sigma": cfg.MODEL.LSD_SIGMA,
        "downsample": cfg.MODEL.LSD_DOWNSAMPLE,
        "sections": cfg.DATA.DIM_2D,
    }
    return Target(lsds, weights, [AddLocalShapeDescriptors(labels, mask, lsds, weights, **options)])


def affinity_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """Affinities of the labels, weighted so that 0 and 1 count the same in each patch."""
    affs, known, weights = gp.ArrayKey("AFFS"), gp.ArrayKey("AFFS_MASK"), gp.ArrayKey("AFFS_WEIGHTS")
    offsets = affinity_offsets(cfg)
    nodes = [
        gp.AddAffinities(offsets, labels, affs, labels_mask=mask, affinities_mask=known),
        gp.BalanceLabels(affs, weights, mask=known),
    ]
    return Target(affs, weights, nodes)


def foreground_target(cfg: CfgNode, labels: gp.ArrayKey, mask: gp.ArrayKey) -> Target:
    """1 where there are labels, 0 elsewhere, weighted so that both count the same in each patch."""
    weights = gp.ArrayKey(f"{labels.identifier}_WEIGHTS")
    return Target(labels, weights, [Binarize(labels), gp.BalanceLabels(labels, weights, mask=mask)])
