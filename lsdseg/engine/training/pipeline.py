"""Training batches: from labeled volumes to augmented raw data with its targets.

The order matters. Geometric augmentation comes before the targets, because LSDs and affinities have directions.
Boundaries are grown after it, because deformation would close a one-voxel boundary again.
"""

from __future__ import annotations

import math
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gunpowder as gp
import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.config.implementations import resolve
from lsdseg.config.model_types import LABELS, TASKS, affinity_offsets, label_keys
from lsdseg.data_utils.gray import gray_percentiles, own_window
from lsdseg.data_utils.labels import open_labels, open_labels_mask
from lsdseg.data_utils.placement import begun_at, in_picometers, nanometers, units_per_nanometer, voxel_size_nm
from lsdseg.data_utils.volumes import open_array, source_defaults
from lsdseg.engine.intensity import network_scale_shift, raw_window
from lsdseg.engine.sections import along_zyx
from lsdseg.engine.training.appearance import AppearanceAugment
from lsdseg.engine.training.nodes import (
    Binarize,
    CompactLabels,
    CopyLabels,
    DefectAugment,
    GrowBoundary,
    LabeledLocation,
    PadLabels,
    PreCache,
    SeedPatches,
    ShareMemory,
    ToUnit,
    lsd_context,
    mistake_behind,
)
from lsdseg.engine.training.targets import Target

RAW = gp.ArrayKey("RAW")
# Key of DATA that names a labels dataset -> array keys of the labels and of their mask.
LABEL_ARRAYS = {key: (gp.ArrayKey(key), gp.ArrayKey(f"{key}_MASK")) for key in LABELS}
NEURONS, NEURONS_MASK = LABEL_ARRAYS["NEURON_LABELS"]
# The neuron labels before boundaries are grown.
TOUCHING_NEURONS = gp.ArrayKey("TOUCHING_NEURON_LABELS")
# Keys of MODEL that may be a list of two values, for two passes of elastic augmentation.
PER_PASS = ("PROB_ELASTIC", "CONTROL_POINT_SPACING", "JITTER_SIGMA", "PROB_SLIP", "PROB_SHIFT", "MAX_MISALIGN")


class TrainingBatch(NamedTuple):
    """One batch. In 2D, the axis z is missing.

    Attributes:
        raw: (batch, 1, z, y, x) float32, the input of the network.
        labels: (batch, z, y, x) uint32, on the voxels of the output, boundaries grown.
        targets: task -> (batch, channels, z, y, x), float32, or uint8 if they are 0 or 1.
        known: task -> uint8, 1 where the target is known, else 0; of the same shape or with one channel for all.
    """

    raw: NDArray[np.float32]
    labels: NDArray[np.uint32]
    targets: dict[str, NDArray[np.float32 | np.uint8]]
    known: dict[str, NDArray[np.uint8]]


@contextmanager
def training_batches(
    cfg: CfgNode, volumes: list[Path], tasks: tuple[str, ...], first_patch: int = 0, stride: int = 1
) -> Iterator[Iterator[TrainingBatch]]:
    """Start to make batches. The context provides an endless iterator of them.

    Args:
        cfg: the config.
        volumes: volumes with raw data and labels, and perhaps a labels mask.
        tasks: the tasks to make targets for.
        first_patch: the number of the first patch, see `SeedPatches`.
        stride: the difference between the numbers of two patches in a row.

    Raises:
        UserError: a volume cannot be read; also when a batch is taken.
    """
    raws = [open_array(path, cfg.DATA.RAW, **source_defaults(cfg)) for path in volumes]
    if any(units_per_nanometer(raw) > 1 for raw in raws):  # all ROIs need one unit
        raws = [in_picometers(raw) for raw in raws]
    targets = {task: _target(cfg, task) for task in tasks}
    shapes = {RAW: gp.Coordinate(along_zyx(cfg.MODEL.RAW_SHAPE, 1))}
    for key in (NEURONS, *(key for target in targets.values() for key in (target.values, target.known))):
        shapes[key] = gp.Coordinate(along_zyx(cfg.MODEL.OUTPUT_SHAPE, 1))
    request = gp.BatchRequest()
    for key, shape in shapes.items():
        request.add(key, shape * raws[0].voxel_size)

    pipeline = _pipeline(cfg, dict(zip(volumes, raws, strict=True)), targets, request)
    pipeline += SeedPatches(cfg.TRAIN.SEED, first_patch, stride)
    pipeline += gp.Stack(cfg.TRAIN.BATCH_SIZE)
    if cfg.SYSTEM.NUM_WORKERS:
        # Each array in shared memory is an open file.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        pipeline += ShareMemory(cfg.SYSTEM.NUM_WORKERS)
        pipeline += PreCache(cache_size=cfg.SYSTEM.CACHE_SIZE, num_workers=cfg.SYSTEM.NUM_WORKERS)
    try:
        with gp.build(pipeline) as provider:
            yield _batches(provider, request, targets, sections=cfg.DATA.DIM_2D)
    except (gp.PipelineSetupError, gp.PipelineRequestError) as error:
        if mistake := mistake_behind(error):
            raise mistake from None
        raise


def _target(cfg: CfgNode, name: str) -> Target:
    """Make the target of a task."""
    task = TASKS[name]
    labels, mask = LABEL_ARRAYS[task.labels]
    target: Target = resolve(task.target)(cfg, TOUCHING_NEURONS if task.touching else labels, mask)
    return target


def _batches(
    provider: Any, request: gp.BatchRequest, targets: dict[str, Target], sections: bool
) -> Iterator[TrainingBatch]:
    """Yield batches forever."""

    def data(batch: gp.Batch, key: gp.ArrayKey, axes: int) -> NDArray[Any]:
        """Return an array with this number of axes: add a missing channel axis, and in 2D drop the axis z."""
        array: NDArray[Any] = np.asarray(batch[key].data)
        array = array[..., 0, :, :] if sections else array
        return array[:, None] if array.ndim < axes else array

    axes = 4 if sections else 5
    while True:
        batch = provider.request_batch(request)
        yield TrainingBatch(
            raw=data(batch, RAW, axes),
            labels=data(batch, NEURONS, axes - 1),
            targets={task: data(batch, target.values, axes) for task, target in targets.items()},
            known={task: data(batch, target.known, axes) for task, target in targets.items()},
        )


def _pipeline(
    cfg: CfgNode, volumes: dict[Path, Array], targets: dict[str, Target], request: gp.BatchRequest
) -> gp.Pipeline:
    """Connect sources (zarr -> raw), augmentation and targets. The result provides one patch per request."""
    model = cfg.MODEL
    sources = tuple(_source(cfg, path, raw, request) for path, raw in volumes.items())
    pipeline = sources + gp.RandomProvider([_labels_size(cfg, path) for path in volumes])
    for key in label_keys(cfg):
        pipeline += CompactLabels(LABEL_ARRAYS[key][0])

    if cfg.TRAIN.AUGMENT:
        for augment in _elastic_augments(model):
            pipeline += augment
        pipeline += gp.SimpleAugment(transpose_only=[axis + cfg.DATA.DIM_2D for axis in model.TRANSPOSE])
        pipeline += gp.IntensityAugment(
            RAW,
            scale_min=model.INTENSITYAUG_SCALE_MIN,
            scale_max=model.INTENSITYAUG_SCALE_MAX,
            shift_min=model.INTENSITYAUG_SHIFT_MIN,
            shift_max=model.INTENSITYAUG_SHIFT_MAX,
            # The sections of an anisotropic volume are imaged one by one, each with its own brightness.
            slab=None if cfg.DATA.FIB else (1, -1, -1),
        )
        appearance = AppearanceAugment(RAW, model)
        if appearance.is_on:
            pipeline += appearance
        if model.DEFECT_AUGMENT:
            pipeline += _defect_augment(cfg)

    if any(TASKS[task].touching for task in targets):
        pipeline += CopyLabels(NEURONS, TOUCHING_NEURONS)
    if model.GROWBOUNDARY_STEPS:
        only_xy = cfg.DATA.DIM_2D or not cfg.DATA.FIB
        pipeline += GrowBoundary(NEURONS, NEURONS_MASK, model.GROWBOUNDARY_STEPS, only_xy)
    for target in targets.values():
        for node in target.nodes:
            pipeline += node
    return pipeline + gp.IntensityScaleShift(RAW, *network_scale_shift(cfg))


def _source(cfg: CfgNode, path: Path, raw: Array, request: gp.BatchRequest) -> gp.Pipeline:
    """Provide one volume at random locations near its neuron labels, with margins that are wide enough for any request.

    In the margins, raw data is mirrored and labels are 0. Labels of other kinds may cover less of the volume than those
    of neurons.
    """
    defaults = source_defaults(cfg)
    data = {RAW: raw}
    for key in label_keys(cfg):
        labels, mask = LABEL_ARRAYS[key]
        data[labels] = open_labels(path, cfg.DATA[key], **defaults)
        data[mask] = open_labels_mask(path, cfg.DATA[f"{key}_MASK"], data[labels], **defaults)
    if units_per_nanometer(raw) > 1:
        data = {key: in_picometers(array) for key, array in data.items()}
    # gunpowder takes only offsets of whole voxels, so all is counted from where raw begins.
    data = {key: begun_at(array, array.offset - raw.offset) for key, array in data.items()}
    arrays = tuple(gp.ArraySource(key, array, interpolatable=key == RAW) for key, array in data.items())
    voxel_size = raw.voxel_size

    def margin(largest: gp.Coordinate) -> gp.Coordinate:
        """Return how far a request of this shape reaches around a voxel: if it is rotated, as far as its diagonal."""
        sides = [math.ceil(math.hypot(*largest) / 2 / v) * v for v in voxel_size]
        return gp.Coordinate((0, *sides[1:]) if cfg.DATA.DIM_2D else sides)

    model = cfg.MODEL
    voxels = lsd_context(model.LSD_SIGMA, voxel_size_nm(raw), model.LSD_DOWNSAMPLE, sections=cfg.DATA.DIM_2D)
    context = voxels * voxel_size
    largest = request[RAW].roi.shape + context + context
    source = arrays + gp.MergeProvider()
    source += ToUnit(RAW, raw_window(raw, cfg))
    source += gp.Pad(RAW, margin(largest), mode="reflect")
    # Affinities look at labels beyond the patch.
    reach = gp.Coordinate(max(map(abs, steps)) for steps in zip(*affinity_offsets(cfg), strict=True)) * voxel_size
    labeled = request[NEURONS].roi.shape + reach + reach
    around = margin(gp.Coordinate(map(max, zip(largest, labeled, strict=True))))
    reachable = data[NEURONS].roi.grow(around, around)
    for key in label_keys(cfg):
        labels, mask = LABEL_ARRAYS[key]
        # The mask must be 0 or 1: weights are multiplied by it.
        source += Binarize(mask)
        source += PadLabels(mask, reachable)
        source += PadLabels(labels, reachable)
    return source + LabeledLocation(NEURONS_MASK, data[NEURONS_MASK].roi, request[NEURONS].roi.shape)


def _labels_size(cfg: CfgNode, path: Path) -> float:
    """Return the size of the labels in nm^3. The larger it is, the more patches come from the volume."""
    labels = open_array(path, cfg.DATA.NEURON_LABELS, **source_defaults(cfg))
    return math.prod(nanometers(labels.roi.shape, labels))


def _elastic_augments(model: CfgNode) -> list[gp.BatchFilter]:
    """Make one elastic augmentation, or two in a row if any key is a list of two values, one for each."""
    # A value that both passes share is a number or a tuple.
    two = any(isinstance(model[key], list) for key in PER_PASS)

    def of_pass(key: str, number: int) -> Any:
        return model[key][number] if isinstance(model[key], list) else model[key]

    with warnings.catch_warnings():
        # gunpowder's new node cannot slip or shift sections. Lengths in the config are in voxels, as in this node.
        warnings.simplefilter("ignore", DeprecationWarning)
        return [
            gp.ElasticAugment(
                control_point_spacing=along_zyx(of_pass("CONTROL_POINT_SPACING", number), 1),
                jitter_sigma=along_zyx(of_pass("JITTER_SIGMA", number), 0),
                rotation_interval=model.ROTATION_INTERVAL,
                prob_slip=of_pass("PROB_SLIP", number),
                prob_shift=of_pass("PROB_SHIFT", number),
                max_misalign=of_pass("MAX_MISALIGN", number),
                subsample=model.SUBSAMPLE,
                p=of_pass("PROB_ELASTIC", number),
            )
            for number in range(2 if two else 1)
        ]


def _defect_augment(cfg: CfgNode) -> DefectAugment:
    """Make sections missing, low in contrast, or damaged as in the zarr MODEL.DEFECT_AUGMENT."""
    artifacts, artifacts_mask = gp.ArrayKey("ARTIFACTS"), gp.ArrayKey("ARTIFACTS_MASK")
    path = cfg.MODEL.DEFECT_AUGMENT
    raw, mask = open_array(path, "defect_sections/raw"), open_array(path, "defect_sections/mask")
    source = (
        (gp.ArraySource(artifacts, raw, True), gp.ArraySource(artifacts_mask, mask, True))
        + gp.MergeProvider()
        + gp.RandomLocation(min_masked=0.05, mask=artifacts_mask)
        + ToUnit(artifacts, own_window(raw.dtype) or gray_percentiles(raw))
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
