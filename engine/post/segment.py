"""Segmentation of whole volumes in memory: affinities from disk, fragments, every threshold, back to disk.

One merge goes through all thresholds, so a segmentation for each costs hardly more than one.
"""

import time

import numpy as np
from tqdm import tqdm

from config.errors import UserError
from data_utils.layout import block_markers, output_path, volumes_in
from data_utils.volumes import open_array, read, rename_array, room_on_disk, write_array
from engine.post.agglomerate import agglomerate, default_merge_function, float_affinities, scoring_function
from engine.post.fragments import extract_fragments

AFFINITIES = "volumes/pred_affs"
FRAGMENTS = "volumes/fragments"


def segment(cfg):
    """Segment the predicted affinities of every volume in the test folder.

    Raises:
        UserError: before anything is written, if affinities are missing or a setting cannot be used.
    """
    outputs = [output_path(cfg, sample) for sample in volumes_in(cfg, "test")]
    for output in outputs:
        open_affinities(output)
    for number, output in enumerate(outputs, start=1):
        print(f"[{number}/{len(outputs)}] {output.name}", flush=True)
        began = time.monotonic()
        names = segment_volume(output, cfg)
        print(f"{names[0]} and {names[1]} ... {names[-1]} in {output} ({time.monotonic() - began:.0f} s)")


def segment_volume(path, cfg):
    """Segment `volumes/pred_affs` of one zarr, in memory, at every INS_SEGMENT.THRESHOLDS.

    Writes `volumes/fragments` and one `volumes/segmentation_055` per threshold (uint64, 0 is background),
    with the attributes merge_function and threshold. Each gets its name only when it is complete.

    Returns:
        The names of the datasets.

    Raises:
        UserError: before anything is written, if the affinities or a setting cannot be used.
    """
    settings = cfg.INS_SEGMENT
    merge_function = configured_merge_function(settings)
    names = segment_names(settings.THRESHOLDS)
    array = open_affinities(path)
    placement = {"voxel_size": array.voxel_size, "offset": array.offset}
    mask = read_mask(settings.MASK_FILE, settings.MASK_DATASET, array.roi, array.voxel_size)
    try:
        affinities = float_affinities(read(array)[:3])
    except ValueError as error:
        raise UserError(f"{AFFINITIES} in {path}: {error}; run predicter.py again") from error

    def write(name, labels, **attributes):
        write_array(path, f"{name}.partial", labels, **placement, attributes=attributes)
        rename_array(path, f"{name}.partial", name)

    with room_on_disk(path), tqdm(total=1 + len(names), unit="step") as bar:
        bar.set_description("fragments")
        fragments = extract_fragments(affinities, mask=mask, **fragment_settings(settings))
        # Fragments that were made block by block stay: the region adjacency graph speaks of them.
        if not block_markers(path, "fragments").is_dir():
            write(FRAGMENTS, fragments)
        bar.update()
        bar.set_description(merge_function)
        for threshold, segmentation in agglomerate(affinities, fragments, list(names), merge_function):
            write(names[threshold], segmentation, threshold=threshold, merge_function=merge_function)
            bar.set_description(f"{merge_function} {threshold:.2f}")
            bar.update()
    return [FRAGMENTS, *names.values()]


def fragment_settings(settings):
    """Arguments of `extract_fragments` from a section INS_SEGMENT."""
    return {
        "fragments_in_xy": settings.FRAGMENTS_IN_XY,
        "background_mask": settings.BACKGROUND_MASK,
        "filter_fragments": settings.FILTER_FRAGMENTS,
        "epsilon_agglomerate": settings.EPSILON_AGGLOMERATE,
    }


def segment_names(thresholds):
    """The dataset of every threshold: {0.55: "volumes/segmentation_055"}.

    Raises:
        UserError: two thresholds are equal when rounded to hundredths.
    """
    names = {threshold: f"volumes/segmentation_{round(threshold * 100):03d}" for threshold in thresholds}
    if len(set(names.values())) < len(thresholds):
        raise UserError(f"INS_SEGMENT.THRESHOLDS {list(thresholds)}: two are the same in hundredths; drop one")
    return names


def configured_merge_function(settings):
    """MERGE_FUNCTION of a section INS_SEGMENT, or what `default_merge_function` gives if that is None.

    Raises:
        UserError: a merge function that waterz does not ship compiled.
    """
    name = settings.MERGE_FUNCTION or default_merge_function(settings.THRESHOLDS, settings.EPSILON_AGGLOMERATE)
    scoring_function(name)
    return name


def open_affinities(path):
    """The predicted affinities of a zarr.

    Raises:
        UserError: it has none.
    """
    try:
        return open_array(path, AFFINITIES)
    except UserError as error:
        raise UserError(f"{error}; run predicter.py first") from error


def read_mask(path, dataset, roi, voxel_size):
    """A mask (bool, z, y, x) on the voxels of ``roi``, or None if there is no ``path``.

    The mask may have any voxel size and ROI (nm): every voxel takes the value at its centre, and False
    outside.

    Raises:
        UserError: there is no such dataset.
    """
    if not path:
        return None
    mask = open_array(path, dataset)
    indices = []
    for axis, count in enumerate(roi.shape / voxel_size):
        centers = roi.begin[axis] + (np.arange(count) + 0.5) * voxel_size[axis]
        indices.append(np.floor((centers - mask.offset[axis]) / mask.voxel_size[axis]).astype(int))
    covered = [(i >= 0) & (i < size) for i, size in zip(indices, mask.shape, strict=True)]
    inside = np.zeros([len(i) for i in indices], bool)
    if all(c.any() for c in covered):
        needed = [i[c] for i, c in zip(indices, covered, strict=True)]
        part = read(mask, tuple(slice(i[0], i[-1] + 1) for i in needed)) != 0
        inside[np.ix_(*covered)] = part[np.ix_(*(i - i[0] for i in needed))]
    return inside
