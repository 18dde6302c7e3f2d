"""Training batches: from labelled volumes to augmented raw data with its targets and weights.

The order matters. Geometric augmentation comes before the targets, since LSDs and affinities have directions;
boundaries are grown after it, since deforming would close a one-voxel boundary again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import gunpowder as gp
import numpy as np

from data_utils.volumes import open_array, source_defaults
from engine.intensity import network_scale_shift, unit_factor
from engine.training.nodes import (
    AddLocalShapeDescriptors,
    CompactLabels,
    DefectAugment,
    GrowBoundary,
    LabelledLocation,
    SeedBatches,
    lsd_context,
)

RAW = gp.ArrayKey("RAW")
LABELS = gp.ArrayKey("LABELS")
LABELS_MASK = gp.ArrayKey("LABELS_MASK")
LSDS = gp.ArrayKey("LSDS")
LSDS_WEIGHTS = gp.ArrayKey("LSDS_WEIGHTS")
AFFS = gp.ArrayKey("AFFS")
AFFS_MASK = gp.ArrayKey("AFFS_MASK")
AFFS_WEIGHTS = gp.ArrayKey("AFFS_WEIGHTS")

# Task -> keys of its target and of the weights of the target's entries.
TARGETS = {"lsds": (LSDS, LSDS_WEIGHTS), "affs": (AFFS, AFFS_WEIGHTS)}


class TrainingBatch(NamedTuple):
    """One batch.

    raw: (batch, 1, z, y, x) float32, the network's input.
    labels: (batch, z, y, x) uint32 of the output's shape, boundaries grown.
    targets, weights: task -> (batch, channels, z, y, x) float32.
    """

    raw: np.ndarray
    labels: np.ndarray
    targets: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


@contextmanager
def training_batches(cfg, volumes: list[Path], tasks: tuple[str, ...], first_batch: int):
    """Context manager that gives an endless iterator of `TrainingBatch`.

    Args:
        cfg: resolved config.
        volumes: zarrs with raw, labels and labels mask.
        tasks: which targets to make.
        first_batch: number of the first batch (see `SeedBatches`).
    """
    voxel_size = gp.Coordinate(cfg.MODEL.VOXEL_SIZE)
    shapes = {RAW: gp.Coordinate(cfg.MODEL.INPUT_SHAPE)}
    for key in (LABELS, *(key for task in tasks for key in TARGETS[task])):
        shapes[key] = gp.Coordinate(cfg.MODEL.OUTPUT_SHAPE)
    request = gp.BatchRequest()
    for key, shape in shapes.items():
        request.add(key, shape * voxel_size)

    with gp.build(_pipeline(cfg, volumes, request, first_batch)) as provider:
        yield _batches(provider, request, tasks)


def _batches(provider, request, tasks) -> Iterator[TrainingBatch]:
    while True:
        batch = provider.request_batch(request)
        yield TrainingBatch(
            raw=batch[RAW].data[:, None],
            labels=batch[LABELS].data,
            targets={task: batch[TARGETS[task][0]].data.astype(np.float32) for task in tasks},
            weights={task: batch[TARGETS[task][1]].data for task in tasks},
        )


def _pipeline(cfg, volumes: list[Path], request: gp.BatchRequest, first_batch: int):
    model = cfg.MODEL
    sources = tuple(_source(cfg, path, request) for path in volumes)
    pipeline = sources + gp.RandomProvider([_labelled_size(cfg, path) for path in volumes])
    pipeline += CompactLabels(LABELS)

    if cfg.TRAIN.AUGMENT:
        for augment in _elastic_augments(model):
            pipeline += augment
        pipeline += gp.SimpleAugment(transpose_only=list(model.TRANSPOSE))
        pipeline += gp.IntensityAugment(
            RAW,
            scale_min=model.INTENSITYAUG_SCALE_MIN,
            scale_max=model.INTENSITYAUG_SCALE_MAX,
            shift_min=model.INTENSITYAUG_SHIFT_MIN,
            shift_max=model.INTENSITYAUG_SHIFT_MAX,
            # Sections of an anisotropic volume are imaged one by one, each with its own brightness.
            slab=None if cfg.DATA.FIB else (1, -1, -1),
        )
        if model.DEFECT_AUGMENT:
            pipeline += _defect_augment(cfg)

    if model.GROWBOUNDARY_STEPS:
        pipeline += GrowBoundary(LABELS, model.GROWBOUNDARY_STEPS, only_xy=not cfg.DATA.FIB)
    pipeline += AddLocalShapeDescriptors(
        LABELS, LABELS_MASK, LSDS, LSDS_WEIGHTS, sigma=model.LSD_SIGMA, downsample=model.LSD_DOWNSAMPLE
    )
    pipeline += gp.AddAffinities(
        cfg.TRAIN.NEIGHBORHOOD, LABELS, AFFS, labels_mask=LABELS_MASK, affinities_mask=AFFS_MASK
    )
    pipeline += gp.BalanceLabels(AFFS, AFFS_WEIGHTS, mask=AFFS_MASK)
    pipeline += gp.IntensityScaleShift(RAW, *network_scale_shift(cfg))
    pipeline += gp.Stack(cfg.TRAIN.BATCH_SIZE)
    pipeline += SeedBatches(cfg.TRAIN.SEED, first_batch)
    if cfg.SYSTEM.NUM_WORKERS:
        pipeline += gp.PreCache(cache_size=cfg.SYSTEM.CACHE_SIZE, num_workers=cfg.SYSTEM.NUM_WORKERS)
    return pipeline


def _source(cfg, path: Path, request: gp.BatchRequest):
    """One volume at random locations, mirrored raw and unlabelled margins as wide as any request can need."""
    names = {RAW: cfg.DATA.RAW, LABELS: cfg.DATA.NEURON_LABELS, LABELS_MASK: cfg.DATA.NEURON_LABELS_MASK}
    data = {key: open_array(path, name, **source_defaults(cfg)) for key, name in names.items()}
    arrays = tuple(gp.ArraySource(key, array, interpolatable=key == RAW) for key, array in data.items())
    voxel_size = data[RAW].voxel_size

    # A rotated request reaches as far as its diagonal.
    context = lsd_context(cfg.MODEL.LSD_SIGMA, voxel_size, cfg.MODEL.LSD_DOWNSAMPLE)
    largest = request[RAW].roi.shape + context + context
    margin = gp.Coordinate(math.ceil(math.hypot(*largest) / 2 / v) * v for v in voxel_size)
    source = arrays + gp.MergeProvider()
    source += gp.Normalize(RAW, factor=unit_factor(data[RAW].dtype))
    source += gp.Pad(RAW, margin, mode="reflect")
    source += gp.Pad(LABELS, margin, value=0)
    source += gp.Pad(LABELS_MASK, margin, value=0)
    return source + LabelledLocation(LABELS_MASK)


def _labelled_size(cfg, path: Path) -> int:
    return open_array(path, cfg.DATA.NEURON_LABELS, **source_defaults(cfg)).roi.size


def _elastic_augments(model) -> list[gp.BatchFilter]:
    """One elastic augmentation, or two in a row where JITTER_SIGMA is a list of two."""
    two = isinstance(model.JITTER_SIGMA[0], list | tuple)

    def of_pass(value, number: int):
        return value[number] if two and isinstance(value, list | tuple) else value

    with warnings.catch_warnings():
        # Its successor knows no slipped and shifted sections, and the config's lengths are in voxels as here.
        warnings.simplefilter("ignore", DeprecationWarning)
        return [
            gp.ElasticAugment(
                control_point_spacing=model.CONTROL_POINT_SPACING,
                jitter_sigma=of_pass(model.JITTER_SIGMA, number),
                rotation_interval=model.ROTATION_INTERVAL,
                prob_slip=of_pass(model.PROB_SLIP, number),
                prob_shift=of_pass(model.PROB_SHIFT, number),
                max_misalign=of_pass(model.MAX_MISALIGN, number),
                subsample=model.SUBSAMPLE,
                p=of_pass(model.PROB_ELASTIC, number),
            )
            for number in range(2 if two else 1)
        ]


def _defect_augment(cfg):
    """Missing, low-contrast and (from the configured zarr) damaged sections."""
    artifacts, artifacts_mask = gp.ArrayKey("ARTIFACTS"), gp.ArrayKey("ARTIFACTS_MASK")
    path = cfg.MODEL.DEFECT_AUGMENT
    raw, mask = open_array(path, "defect_sections/raw"), open_array(path, "defect_sections/mask")
    source = (
        (gp.ArraySource(artifacts, raw, True), gp.ArraySource(artifacts_mask, mask, True))
        + gp.MergeProvider()
        + gp.RandomLocation(min_masked=0.05, mask=artifacts_mask)
        + gp.Normalize(artifacts, factor=unit_factor(raw.dtype))
        + gp.AsType(artifacts_mask, np.float32)
        + gp.IntensityAugment(artifacts, 0.9, 1.1, -0.1, 0.1)
        + gp.SimpleAugment(transpose_only=[1, 2])
    )
    return DefectAugment(
        RAW,
        prob_missing=0.03,
        prob_low_contrast=0.01,
        prob_artifact=0.03,
        artifact_source=source,
        artifacts=artifacts,
        artifacts_mask=artifacts_mask,
        contrast_scale=0.5,
    )
